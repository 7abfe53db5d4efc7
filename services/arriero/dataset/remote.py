"""Sources that lie elsewhere: S3, and data sets of a Hugging Face hub.

Responsibility: say what a remote source holds, and fetch it. Does not know what
rows are, beyond the names of their files.

S3 is reached as the environment says (`AWS_ENDPOINT_URL`, `AWS_REGION`,
credentials), the hub by `HF_ENDPOINT`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from arriero.dataset import rows
from arriero.errors import InvalidArgument, NotFound, PermissionDenied, Unavailable

S3, HUB = "s3://", "hf://datasets/"
FORMS = "s3://bucket/key or hf://datasets/org/name@revision/path"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_REPOSITORY = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w.%-]+))?(?:/(?P<path>.*))?", re.ASCII
)
# What pyarrow says of S3's refusals.
_DENIED = re.compile("ACCESS_DENIED|HTTP status 403|INVALID_ACCESS_KEY|SIGNATURE")
_MISSING = re.compile("NO_SUCH_BUCKET|NO_SUCH_KEY|RESOURCE_NOT_FOUND|HTTP status 404")
_COPY_BYTES = 1 << 20
_CONNECT_SECONDS, _REQUEST_SECONDS = 10, 60
# huggingface_hub's HTTP client has changed its package twice.
_NETWORK = {"HTTPError", "TransportError", "RequestException"}


@dataclass(frozen=True, slots=True)
class Remote:
    """A remote source; what it holds is known once it was looked up.

    Attributes:
        text: as it was written; a hub's revision is its commit once looked up.
        scheme: `S3` or `HUB`.
        place: bucket, or repository.
        path: key or path, or the beginning of several.
        revision: of a hub's repository.
        files: (path, bytes), sorted.
        identity: changes when the bytes do.
    """

    text: str
    scheme: str
    place: str
    path: str
    revision: str = ""
    files: tuple[tuple[str, int], ...] = ()
    identity: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files)


def parse(text: str, *, field: str) -> Remote:
    """Read a remote source; nothing is asked of the network.

    Raises:
        InvalidArgument: none of the two forms.
    """
    if ".." in text.split("/"):
        raise InvalidArgument.field(field, f"{text!r} climbs with '..'")
    if text.startswith(S3):
        bucket, _, key = text.removeprefix(S3).partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise InvalidArgument.field(
                field, f"{text!r} names no bucket; expected s3://bucket/key"
            )
        return Remote(text, S3, bucket, key.strip("/"))
    found = _REPOSITORY.fullmatch(text.removeprefix(HUB)) if text.startswith(HUB) else None
    if found is None:
        raise InvalidArgument.field(field, f"{text!r} is no remote source; expected {FORMS}")
    revision = unquote(found["revision"] or "main")
    return Remote(text, HUB, found["name"], (found["path"] or "").strip("/"), revision)


def look_up(remote: Remote, *, token: str | None, field: str) -> Remote:
    """What a source holds now: its files of rows, and for a hub the commit.

    Raises:
        NotFound: nothing is there, or no file of rows.
        PermissionDenied: it may not be read with these credentials.
        Unavailable: nobody answers.
    """
    with _translated(remote, field):
        found = _s3_files(remote) if remote.scheme == S3 else _hub_files(remote, token)
    if not found.files:
        raise NotFound(f"{remote.text} holds no file of rows; expected {', '.join(rows.KINDS)}").at(
            field
        )
    return found


def fetch(
    remote: Remote,
    directory: Path,
    *,
    token: str | None,
    field: str,
    report: Callable[[int], None] = lambda _: None,
) -> list[tuple[Path, str]]:
    """Fetch the files of a source that was looked up.

    Args:
        remote: looked up.
        directory: below which they come to lie.
        token: the hub's, or None.
        field: what errors name.
        report: called with the bytes fetched so far; may raise to stop.

    Returns:
        (path, what to call it) of each file; raises as `look_up`.
    """
    fetched, done = [], 0
    with _translated(remote, field):
        for path, size in remote.files:
            target = directory / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if remote.scheme == S3:
                # As it is: pyarrow would unpack what is called .gz.
                where = f"{remote.place}/{path}"
                with _s3(remote).open_input_stream(where, compression=None) as stream:
                    _copy(stream, target, report, done)
                name = f"{S3}{remote.place}/{path}"
            else:
                _hub_fetch(remote, path, directory, token)
                name = f"{HUB}{remote.place}@{remote.revision[:12]}/{path}"
            if target.stat().st_size != size:
                raise Unavailable(
                    f"{name} has {target.stat().st_size} bytes, expected {size}: it changed while "
                    "it was fetched; start again"
                )
            done += size
            report(done)
            fetched.append((target, name))
    return fetched


def _copy(stream: Any, target: Path, report: Callable[[int], None], done: int) -> None:
    with target.open("wb") as file:
        while data := stream.read(_COPY_BYTES):
            file.write(data)
            done += len(data)
            report(done)


def _s3(remote: Remote) -> Any:
    from pyarrow import fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    options: dict[str, Any] = {}
    if endpoint:
        url = urlsplit(endpoint)
        options = {"endpoint_override": url.netloc, "scheme": url.scheme}
        region = region or "us-east-1"
    return fs.S3FileSystem(
        region=region or fs.resolve_s3_region(remote.place),
        connect_timeout=_CONNECT_SECONDS,
        request_timeout=_REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=3),
        **options,
    )


def _s3_files(remote: Remote) -> Remote:
    from pyarrow import fs

    system = _s3(remote)
    root = f"{remote.place}/{remote.path}".rstrip("/")
    info = system.get_file_info(root)
    if info.type == fs.FileType.File:
        found = [info]
    elif info.type == fs.FileType.Directory:
        listed = system.get_file_info(fs.FileSelector(root, recursive=True))
        found = [item for item in listed if item.is_file and rows.is_rows(item.path)]
        found = _without_notes(found, lambda item: str(item.path))
    else:
        raise FileNotFoundError(root)
    found.sort(key=lambda item: item.path)
    digest = hashlib.sha256()
    for item in found:
        digest.update(f"{item.path}\0{item.size}\0{item.mtime_ns}\n".encode())
    files = tuple((item.path.partition("/")[2], item.size) for item in found)
    return replace(remote, files=files, identity=digest.hexdigest())


def _hub_files(remote: Remote, token: str | None) -> Remote:
    from huggingface_hub import HfApi

    info = HfApi(token=token or False).dataset_info(
        remote.place, revision=remote.revision, files_metadata=True, timeout=_REQUEST_SECONDS
    )
    named = [
        item
        for item in info.siblings or []
        if item.rfilename == remote.path
        or (
            (not remote.path or item.rfilename.startswith(f"{remote.path}/"))
            and rows.is_rows(item.rfilename)
        )
    ]
    named = _without_notes(named, lambda item: str(item.rfilename))
    commit = str(info.sha or remote.revision)
    files = tuple(sorted((item.rfilename, int(item.size or 0)) for item in named))
    path = f"/{remote.path}" if remote.path else ""
    return replace(
        remote,
        text=f"{HUB}{remote.place}@{commit}{path}",
        revision=commit,
        files=files,
        identity=f"{remote.place}@{commit}/{remote.path}",
    )


def _hub_fetch(remote: Remote, path: str, directory: Path, token: str | None) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(
        remote.place,
        path,
        repo_type="dataset",
        revision=remote.revision,
        local_dir=directory,
        token=token or False,
    )


def _without_notes(found: list[Any], name: Callable[[Any], str]) -> list[Any]:
    tables = [item for item in found if not rows.is_text(name(item))]
    return tables or found


@contextmanager
def _translated(remote: Remote, field: str) -> Iterator[None]:
    """What clients of S3 and the hub raise, in this project's words."""
    what = remote.text
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"{what} does not exist").at(field) from error
    except Exception as error:
        names = {cls.__name__ for cls in type(error).__mro__}
        said = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        status = getattr(getattr(error, "response", None), "status_code", None)
        denied = _DENIED.search(said)
        missing = _MISSING.search(said)
        if "GatedRepoError" in names or status in (401, 403) or denied:
            raise PermissionDenied(
                f"{what} may not be read with this service's credentials ({said}); give "
                "token_secret (hub), or AWS credentials to the dataset service (S3)"
            ).at(field) from error
        if {"RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError"} & names or (
            missing
        ):
            raise NotFound(
                f"{what} does not exist, or is private ({said}); check the name or give credentials"
            ).at(field) from error
        if isinstance(error, OSError) or _NETWORK & names or "HfHubHTTPError" in names:
            raise Unavailable(f"{field}: {what} cannot be reached: {said}") from error
        raise
