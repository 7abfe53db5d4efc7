"""Small records by key: manifests, tags, pins, leases, results.

Responsibility: what every backend does for records of some hundred bytes, and how
a filesystem does it. Does not know what a record says.

Keys are relative paths with forward slashes, such as `roots/endpoints/live.json`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from arriero.store.files import fsync_directory, make_directories, os_errors, write_atomic


@dataclass(frozen=True, slots=True)
class Found:
    """A record that is there: its key, bytes, and when it was last written (Unix seconds)."""

    key: str
    size: int
    time: float


class Objects(Protocol):
    """The records of one store. Every method raises what the backend says of it."""

    def read(self, key: str) -> bytes:
        """The bytes of a record. Raises `FileNotFoundError`."""

    def write(self, key: str, data: bytes, *, durable: bool = True) -> None:
        """Replace a record: readers see old or new, whatever is killed.

        `durable=False`: may be lost with the power.
        """

    def create(self, key: str, make: Callable[[], bytes]) -> bool:
        """Make a record that is not there yet; False when somebody did before.

        Of several that try, one succeeds. `make` is called once the key is taken,
        where the backend takes it before it writes.
        """

    def delete(self, key: str) -> None:
        """Forget a record; none is fine."""

    def touch(self, key: str) -> None:
        """Make a record look as if it was written now, if it is there and ours."""

    def time_ns(self, key: str) -> int | None:
        """When a record was last written (Unix ns); None when it is not there."""

    def find(self, prefix: str) -> Iterator[Found]:
        """Every record below `prefix` (which ends with `/`), by key; half-written ones not."""

    def shown(self, key: str) -> str:
        """Where a record is, for people."""


class FileObjects:
    """Records as files below a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def read(self, key: str) -> bytes:
        """See `Objects`."""
        return (self._root / key).read_bytes()

    def write(self, key: str, data: bytes, *, durable: bool = True) -> None:
        """See `Objects`."""
        path = self._root / key
        make_directories(path.parent, below=self._root)
        write_atomic(path, data, durable=durable)

    def create(self, key: str, make: Callable[[], bytes]) -> bool:
        """See `Objects`. A kill in between leaves an empty file."""
        path = self._root / key
        make_directories(path.parent, below=self._root)
        with os_errors(path, 256):
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
            except FileExistsError:
                return False
            try:
                os.write(fd, make())
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_directory(path.parent)
        return True

    def delete(self, key: str) -> None:
        """See `Objects`."""
        (self._root / key).unlink(missing_ok=True)

    def touch(self, key: str) -> None:
        """See `Objects`."""
        with contextlib.suppress(OSError):  # not there, not ours, or read-only
            os.utime(self._root / key)

    def time_ns(self, key: str) -> int | None:
        """See `Objects`."""
        try:
            return (self._root / key).stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def find(self, prefix: str) -> Iterator[Found]:
        """See `Objects`."""
        for base, names, files in os.walk(self._root / prefix):
            names.sort()
            for name in sorted(files):
                if name.startswith("."):
                    continue
                path = Path(base, name)
                with contextlib.suppress(FileNotFoundError):
                    status = path.lstat()
                    key = path.relative_to(self._root).as_posix()
                    yield Found(key, status.st_size, status.st_mtime)

    def shown(self, key: str) -> str:
        """See `Objects`."""
        return str(self._root / key)
