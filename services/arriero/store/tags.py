"""Tags: names that move, set by compare-and-set without any lock.

Responsibility: `tags/<kind>/<name>/<tag>/<n>`. Each value is a record of its own,
created exclusively with the next number; the highest whole one is the
tag's value, and the others are its history. Does not know what a digest names.

On a filesystem, a setter that is killed between creating and writing leaves an empty
number, which readers pass over and the next setter, after a short wait, leaves
behind. Should such a setter only have been asleep, whoever passed it looks back
before writing, and gives way (a `void` entry); so two setters that expected the
same value never both succeed.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from arriero import refs
from arriero.errors import Aborted, InvalidArgument, NotFound
from arriero.store.files import now, refuse_newer, safe_name, to_json
from arriero.store.manifest import FORMAT
from arriero.store.objects import Objects

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

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def get(self, tag: str) -> TagEntry:
        """The value of `kind/name:tag`.

        Raises:
            NotFound: never set. InvalidArgument: not a tag.
        """
        entry = self._value(self._numbers(_directory(parse_tag(tag))))
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
        directory = _directory(ref)
        while True:
            number, skipped = self._next(directory)
            current = self._value(self._numbers(directory))
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
        numbers: dict[str, list[int]] = {}
        for record in self._objects.find(
            f"tags/{safe_name(kind, field='kind')}/" if kind else "tags/"
        ):
            directory, _, number = record.key.rpartition("/")
            if number.isdecimal():
                numbers.setdefault(directory + "/", []).append(int(number))
        found = []
        for directory in sorted(numbers):
            newest = sorted(numbers[directory], reverse=True)
            entry = self._value(f"{directory}{number}" for number in newest)
            if entry is not None and entry.digest is not None:
                _, kind_, name, tag, _ = directory.split("/")
                found.append(TagEntry(f"{kind_}/{name}:{tag}", entry.digest, entry.time))
        return found

    def history(self, tag: str) -> list[TagEntry]:
        """Every value that a tag had, newest first."""
        ref = parse_tag(tag)
        found = []
        for key in self._numbers(_directory(ref)):
            entry = self._read(key)
            if entry is not None and entry.digest is not None:
                found.append(TagEntry(str(ref), entry.digest, entry.time))
        return found

    def _value(self, keys: Iterable[str]) -> _Entry | None:
        for key in keys:
            entry = self._read(key)
            if entry is not None and entry.digest is not None:
                return entry
        return None

    def _next(self, directory: str) -> tuple[int, str | None]:
        """The number to take, and the unwritten entry before it, if there is one."""
        deadline = time.monotonic() + UNWRITTEN_SECONDS
        while True:
            newest = next(iter(self._numbers(directory)), None)
            if newest is None:
                return 1, None
            number = int(newest.removeprefix(directory)) + 1
            if self._read(newest) is not None:
                return number, None
            if time.monotonic() >= deadline:
                return number, newest
            time.sleep(0.01)

    def _create(
        self, directory: str, number: int, skipped: str | None, digest: str, ref: refs.Ref
    ) -> bool:
        """Whether the entry was made; False when its number was taken before."""
        void = False

        def entry() -> bytes:
            nonlocal void
            # The entry that was passed over may have been written since: it was first.
            void = skipped is not None and self._read(skipped) is not None
            return to_json(
                {
                    "format": FORMAT,
                    "digest": None if void else digest,
                    "time": now(),
                    "passed": skipped is not None,
                }
            )

        if not self._objects.create(f"{directory}{number}", entry) or void:
            return False
        self._look_back(f"{directory}{number + 1}", ref)
        return True

    def _look_back(self, following: str, ref: refs.Ref) -> None:
        """Give up when the next entry's setter took us for dead and passed us.

        Raises:
            Aborted: it did, or may have.
        """
        deadline = time.monotonic() + UNWRITTEN_SECONDS
        while self._objects.time_ns(following) is not None:
            entry = self._read(following)
            if entry is not None and (entry.digest is None or not entry.passed):
                return
            if entry is not None or time.monotonic() >= deadline:
                raise Aborted(
                    f"setting {ref} took so long that another setter passed; look at it again "
                    "and decide",
                    reason="TAG_MOVED",
                )
            time.sleep(0.01)

    def _numbers(self, directory: str) -> list[str]:
        """The entries of a tag, highest number first."""
        names = [found.key.removeprefix(directory) for found in self._objects.find(directory)]
        numbers = sorted((int(name) for name in names if name.isdecimal()), reverse=True)
        return [f"{directory}{number}" for number in numbers]

    def _read(self, key: str) -> _Entry | None:
        """An entry, or None while (or since) its setter has not written it."""
        data = b""
        try:
            data = self._objects.read(key)
            value = json.loads(data)
            refuse_newer(int(value["format"]), FORMAT, f"the tag {self._objects.shown(key)}")
            return _Entry(value["digest"], value["time"], value["passed"])
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            if data:  # a kill leaves nothing written; this is a loss of power, or damage
                log.warning(
                    "tag entry %s is damaged; the one before it counts", self._objects.shown(key)
                )
            return None


def parse_tag(tag: str) -> refs.Ref:
    """Parse `kind/name:tag`.

    Raises:
        InvalidArgument: anything else, a digest included.
    """
    ref = refs.parse(tag, field="tag")
    if ref.tag is None:
        raise InvalidArgument.field("tag", f"{tag!r} is not a tag; expected kind/name:tag")
    return ref


def _directory(ref: refs.Ref) -> str:
    names = (safe_name(name or "", field="tag") for name in (ref.kind, ref.name, ref.tag))
    return f"tags/{'/'.join(names)}/"
