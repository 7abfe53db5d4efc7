"""Tags: names that move, set by compare-and-set without any lock.

Responsibility: `tags/<kind>/<name>/<tag>/<n>`. Each value is a file of its own,
created exclusively (O_EXCL) with the next number; the highest whole one is the
tag's value, and the others are its history. Does not know what a digest names.

A setter that is killed between creating its file and writing it leaves an empty
number, which readers pass over and the next setter, after a short wait, leaves
behind. Should such a setter only have been asleep, whoever passed it looks back
before writing, and gives way (a `void` entry); so two setters that expected the
same value never both succeed.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from arriero import refs
from arriero.errors import Aborted, InvalidArgument, NotFound
from arriero.store.files import fsync_directory, now, os_errors, refuse_newer, to_json
from arriero.store.layout import Layout
from arriero.store.manifest import FORMAT

log = logging.getLogger(__name__)

# How long a setter that has taken its number may need to write some 120 bytes.
UNWRITTEN_SECONDS = 1.0
NONE = "none"


@dataclass(frozen=True, slots=True)
class TagEntry:
    """A tag's value: `kind/name:tag`, digest, and when it was set (RFC 3339)."""

    tag: str
    digest: str
    time: str


@dataclass(frozen=True, slots=True)
class _Entry:
    digest: str | None  # None: void
    time: str
    passed: bool  # its setter took the one before for dead


class Tags:
    """The tags of one store."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def get(self, tag: str) -> TagEntry:
        """The value of `kind/name:tag`.

        Raises:
            NotFound: never set. InvalidArgument: not a tag.
        """
        entry = self._value(self._directory(parse_tag(tag)))
        if entry is None:
            raise NotFound(f"no tag {tag}; `arriero artifacts list` shows what there is")
        return TagEntry(str(parse_tag(tag)), entry.digest or "", entry.time)

    def set(self, tag: str, digest: str, expected: str | None) -> None:
        """Make `digest` the value, if the value is what is expected.

        Args:
            expected: a digest, `none` for a tag that must not exist, None for any.

        Raises:
            Aborted: another value, or another setter was faster.
        """
        ref = parse_tag(tag)
        if expected is not None and expected != NONE and not refs.is_digest(expected):
            raise InvalidArgument.field(
                "expected_digest", f"{expected!r}: expected a digest, `none`, or nothing"
            )
        directory = self._layout.under("tags", ref.kind or "", ref.name or "", ref.tag or "")
        while True:
            number, skipped = self._next(directory)
            current = self._value(directory)
            found = current.digest if current else None
            if expected is not None and (found or NONE) != expected:
                raise Aborted(
                    f"{ref} points at {found or 'nothing'}, expected {expected}; somebody else "
                    "set it: look at it again and decide",
                    reason="TAG_MOVED",
                    metadata={"found": found or NONE, "expected": expected},
                )
            if found == digest:
                return
            if self._create(directory, number, skipped, digest, ref):
                return

    def all(self, kind: str | None = None) -> list[TagEntry]:
        """The value of every tag, by name."""
        found = []
        base = self._layout.root / "tags"
        for path in sorted(base.glob(f"{kind or '*'}/*/*")):
            entry = self._value(path)
            if entry is not None and entry.digest is not None:
                kind_, name, tag = path.relative_to(base).parts
                found.append(TagEntry(f"{kind_}/{name}:{tag}", entry.digest, entry.time))
        return found

    def history(self, tag: str) -> list[TagEntry]:
        """Every value that a tag had, newest first."""
        ref = parse_tag(tag)
        found = []
        for path in _numbered(self._directory(ref)):
            entry = _read(path)
            if entry is not None and entry.digest is not None:
                found.append(TagEntry(str(ref), entry.digest, entry.time))
        return found

    def _directory(self, ref: refs.Ref) -> Path:
        return self._layout.root.joinpath("tags", ref.kind or "", ref.name or "", ref.tag or "")

    def _value(self, directory: Path) -> _Entry | None:
        for path in _numbered(directory):
            entry = _read(path)
            if entry is not None and entry.digest is not None:
                return entry
        return None

    def _next(self, directory: Path) -> tuple[int, Path | None]:
        """The number to take, and the unwritten entry before it, if there is one."""
        deadline = time.monotonic() + UNWRITTEN_SECONDS
        while True:
            newest = next(_numbered(directory), None)
            if newest is None:
                return 1, None
            if _read(newest) is not None:
                return int(newest.name) + 1, None
            if time.monotonic() >= deadline:
                return int(newest.name) + 1, newest
            time.sleep(0.01)

    def _create(
        self, directory: Path, number: int, skipped: Path | None, digest: str, ref: refs.Ref
    ) -> bool:
        """Whether the entry was made; False when its number was taken before."""
        path = directory / str(number)
        with os_errors(path, 256):
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
            except FileExistsError:
                return False
            try:
                # The entry that was passed over may have been written since: it was first.
                void = skipped is not None and _read(skipped) is not None
                entry = {
                    "format": FORMAT,
                    "digest": None if void else digest,
                    "time": now(),
                    "passed": skipped is not None,
                }
                os.write(fd, to_json(entry))
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_directory(directory)
        if void:
            return False
        self._look_back(directory / str(number + 1), ref)
        return True

    def _look_back(self, following: Path, ref: refs.Ref) -> None:
        """Give up when the next entry's setter took us for dead and passed us.

        Raises:
            Aborted: it did, or may have.
        """
        deadline = time.monotonic() + UNWRITTEN_SECONDS
        while following.exists():
            entry = _read(following)
            if entry is not None and (entry.digest is None or not entry.passed):
                return
            if entry is not None or time.monotonic() >= deadline:
                raise Aborted(
                    f"setting {ref} took so long that another setter passed; look at it again "
                    "and decide",
                    reason="TAG_MOVED",
                )
            time.sleep(0.01)


def parse_tag(tag: str) -> refs.Ref:
    """Parse `kind/name:tag`.

    Raises:
        InvalidArgument: anything else, a digest included.
    """
    ref = refs.parse(tag, field="tag")
    if ref.tag is None:
        raise InvalidArgument.field("tag", f"{tag!r} is not a tag; expected kind/name:tag")
    return ref


def _numbered(directory: Path) -> Iterator[Path]:
    """The entries of a tag, highest number first."""
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return
    for number in sorted((int(name) for name in names if name.isdecimal()), reverse=True):
        yield directory / str(number)


def _read(path: Path) -> _Entry | None:
    """An entry, or None while (or since) its setter has not written it."""
    data = b""
    try:
        data = path.read_bytes()
        value = json.loads(data)
        version = int(value["format"])
        refuse_newer(version, FORMAT, f"the tag {path}")
        return _Entry(value["digest"], value["time"], value["passed"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        if data:  # a kill leaves nothing written; this is a loss of power, or damage
            log.warning("tag entry %s is damaged; the one before it counts", path)
        return None
