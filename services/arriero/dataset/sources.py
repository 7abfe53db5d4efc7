"""Where rows come from: files and directories that may be read, and the store.

Responsibility: turn a spec's sources into files, and their bytes into digests.
Does not know what the files hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from arriero import refs
from arriero.dataset import remote, rows
from arriero.dataset.remote import Remote
from arriero.errors import FailedPrecondition, InvalidArgument, NotFound
from arriero.gates import remedy
from arriero.settings import SourceSettings
from arriero.store import Artifact, Store

# A file of this name makes an artifact a prepared dataset, not raw rows.
PREPARED = "data.arrow"


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read, and what to call it."""

    path: Path
    name: str


@dataclass(frozen=True, slots=True)
class Source:
    """One source, resolved.

    Attributes:
        text: the source with its tag, revision or links resolved.
        files: in reading order; none of a remote source that was not fetched.
        artifact: digest of the store's artifact; None for paths.
        remote: where it lies elsewhere.
    """

    text: str
    files: tuple[SourceFile, ...]
    artifact: str | None = None
    remote: Remote | None = None

    @property
    def here(self) -> bool:
        """Whether its files can be read."""
        return self.remote is None or bool(self.files)

    @property
    def size(self) -> int:
        """Bytes of all files; of a remote source as far as it was looked up."""
        if self.remote is not None and not self.files:
            return self.remote.size
        return sum(file.path.stat().st_size for file in self.files)


def locate(text: str, *, store: Store, allowed: SourceSettings | None, field: str) -> Source:
    """Find the files of one source.

    Args:
        text: an absolute path, a reference to a dataset in the store, or a
            remote source, of which only the form is looked at.
        store: what references are looked up in.
        allowed: what paths are checked against; None for a source that
            was checked before.
        field: what errors name.

    Raises:
        InvalidArgument: neither, not allowed, or without a file of rows.
        NotFound: nothing is there.
        FailedPrecondition: a quarantined artifact.
    """
    if "://" in text:
        return Source(text, (), remote=remote.parse(text, field=field))
    if text.startswith("/"):
        path = allowed.check(text, field=field) if allowed else Path(text)
        return Source(str(path), tuple(_files(path, allowed, field)))
    if not refs.looks_like_ref(text) or ".." in text.split("/"):
        raise InvalidArgument.field(
            field,
            f"{text!r} is neither an absolute path nor a reference; expected /path/to/rows.jsonl, "
            f"a directory of such files, dataset/name:tag, {remote.FORMS}",
        )
    ref = refs.parse(text, field=field)
    try:
        artifact = store.get(ref)
    except NotFound as error:
        raise error.at(field) from None
    kind = artifact.manifest.kind
    if kind != "dataset":
        raise InvalidArgument.field(field, f"{text!r} is a {kind}; expected a dataset of raw files")
    if artifact.quarantined:
        gates = artifact.manifest.failed_gates
        raise FailedPrecondition(
            f"{text!r} is quarantined by {', '.join(gates)}; {remedy(gates)}",
            reason="QUARANTINED",
        ).at(field)
    files = tuple(
        SourceFile(artifact.file(entry.path), f"{text}/{entry.path}")
        for entry in sorted(artifact.manifest.files, key=lambda entry: entry.path)
        if rows.is_rows(entry.path)
    )
    files = tuple(_without_notes(files))
    if any(entry.path == PREPARED for entry in artifact.manifest.files):
        raise InvalidArgument.field(
            field, f"{text!r} is prepared already (it holds {PREPARED}); expected raw rows"
        )
    _refuse_none(files, text, field)
    return Source(artifact.digest, files, artifact.digest)


def locate_all(
    texts: Sequence[str],
    artifacts: Sequence[Artifact],
    store: Store,
    allowed: SourceSettings | None,
) -> list[Source]:
    """The sources of a spec, and after them the rows of other stages; raises as `locate`."""
    named = [(text, f"sources[{i}]") for i, text in enumerate(texts)]
    named += [(artifact.digest, f"rows[{i}]") for i, artifact in enumerate(artifacts)]
    return [locate(text, store=store, allowed=allowed, field=field) for text, field in named]


def look_up(
    sources: Sequence[Source], token: str | None, *, field: str = "sources"
) -> list[Source]:
    """Remote sources as they are now, the others unchanged; raises as `remote.look_up`."""
    found = []
    for number, source in enumerate(sources):
        if source.remote is not None:
            now = remote.look_up(source.remote, token=token, field=f"{field}[{number}]")
            source = replace(source, text=now.text, remote=now)
        found.append(source)
    return found


def identities(sources: Sequence[Source]) -> dict[str, str]:
    """For a result's key: what remote sources that were looked up hold, by their place."""
    return {
        f"sources[{number}]": source.remote.identity
        for number, source in enumerate(sources)
        if source.remote is not None
    }


def fetch(
    sources: Sequence[Source],
    directory: Path,
    *,
    token: str | None,
    report: Callable[[int, int], None] = lambda *_: None,
    field: str = "sources",
) -> list[Source]:
    """Sources whose files are all here: remote ones are fetched below a directory.

    Args:
        sources: located.
        directory: for the files, which are as safe as it is.
        token: of the hub, or None.
        report: called with bytes fetched and to be fetched; may raise to stop.
        field: what errors name.
    """
    found = look_up(sources, token, field=field)
    total = sum(source.size for source in found if not source.here)
    done = 0
    for number, source in enumerate(found):
        if source.remote is None:
            continue
        files = remote.fetch(
            source.remote,
            directory / str(number),
            token=token,
            field=f"{field}[{number}]",
            report=partial(_tell, report, done, total),
        )
        done += source.size
        found[number] = replace(source, files=tuple(SourceFile(*file) for file in files))
    return found


def _tell(report: Callable[[int, int], None], done: int, total: int, got: int) -> None:
    report(done + got, total)


def is_stored(text: str) -> bool:
    """Whether a source is one of the store's."""
    return not text.startswith("/") and "://" not in text


def _files(path: Path, allowed: SourceSettings | None, field: str) -> list[SourceFile]:
    if path.is_file():
        return [SourceFile(path, str(path))]
    if not path.is_dir():
        raise InvalidArgument.field(field, f"{str(path)!r} is neither a file nor a directory")
    files = []
    for entry in sorted(path.rglob("*")):
        parts = entry.relative_to(path).parts
        if any(part.startswith(".") for part in parts) or not rows.is_rows(entry.name):
            continue
        # A link inside of the directory may lead out of what is allowed.
        real = allowed.check(str(entry), field=field) if allowed else entry
        if real.is_file():
            files.append(SourceFile(real, str(entry)))
    files = _without_notes(files)
    _refuse_none(files, str(path), field)
    return files


def _without_notes(files: Sequence[SourceFile]) -> list[SourceFile]:
    """Beside tables and JSON, text files are notes about them."""
    tables = [file for file in files if not rows.is_text(file.name)]
    return tables or list(files)


def _refuse_none(files: Sequence[SourceFile], text: str, field: str) -> None:
    if not files:
        raise InvalidArgument.field(
            field, f"{text!r} holds no file of rows; expected {', '.join(rows.KINDS)}"
        )


def digest(source: Source) -> str:
    """`sha256:` of a source's bytes.

    Of one file: what `sha256sum` says. Of several: the sha256 of the files'
    hexadecimal digests, one a line, in reading order.
    """
    digests = [_sha256(file.path) for file in source.files]
    if len(digests) == 1:
        return f"sha256:{digests[0]}"
    lines = "".join(f"{item}\n" for item in digests)
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
