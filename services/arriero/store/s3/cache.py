"""Artifacts of a store elsewhere, as they lie on this machine.

Responsibility: verified directories that several processes share, at most so many
bytes of them, the longest unused first to go, and none that is in use. Does not
know where they come from.

    artifacts/<hex>/   files, read-only; being there means complete
    partial/<hex>/     on its way; taken up again by whoever wants it next
    locks/<hex>.use    shared lock: in use; exclusive: fetched or removed just now.
                       Its time says when it was last used.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from arriero.errors import DiskFull
from arriero.store.disk import shown
from arriero.store.files import (
    DIRECTORY_MODE,
    free_bytes,
    fsync_directory,
    fsync_tree,
    os_errors,
    remove_tree,
    seal_tree,
    tree_size,
)

DIRECTORIES = ("artifacts", "partial", "locks", "staging", "trash", "operations")


class Use:
    """An artifact in the cache that stays there as long as this object lives."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)  # and with it the lock


class Cache:
    """The cache of one store in the directory `root`; `limit` in bytes, None for none."""

    def __init__(self, root: Path, limit: int | None) -> None:
        self.root = root
        self.limit = limit

    def get(
        self, name: str, size: int, reserve: Callable[[Path], None], fill: Callable[[Path], None]
    ) -> Use:
        """An artifact's directory, fetched where it is not there.

        Of several processes that want it one fetches, and the others wait.

        Args:
            name: its digest in hex.
            size: bytes of its files.
            reserve: makes its files in a directory, with their sizes and without content.
            fill: fills and verifies them.

        Raises:
            DiskFull: no room, also without everything that is not in use.
        """
        while True:
            use = self.known(name)
            if use is not None:
                return use
            with self._locked(name, fcntl.LOCK_EX):
                if not self._path(name).is_dir():
                    partial = self.root / "partial" / name
                    with self._locked("cache", fcntl.LOCK_EX):
                        self._make_room(size - tree_size(partial), size)
                        partial.mkdir(exist_ok=True)
                        reserve(partial)
                    fill(partial)
                    self._place(partial, name)

    def known(self, name: str) -> Use | None:
        """An artifact's directory, if it is there."""
        fd = self._open(name)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            if self._path(name).is_dir():
                os.utime(fd)
                use = Use(self._path(name), fd)
                fd = -1
                return use
            return None
        finally:
            if fd >= 0:
                os.close(fd)

    def adopt(self, source: Path, name: str, size: int) -> None:
        """Take a directory that was published from here; it is deleted if there is no room."""
        with self._locked(name, fcntl.LOCK_EX):
            if not self._path(name).is_dir():
                with self._locked("cache", fcntl.LOCK_EX):
                    try:
                        self._make_room(size, size, there=size)
                        self._place(source, name)
                    except (DiskFull, OSError):  # another filesystem, say
                        remove_tree(source)
                return
        remove_tree(source)

    def remove(self, name: str) -> None:
        """Forget an artifact, unless somebody uses it."""
        self._evict(name)

    def free(self, needed: int) -> None:
        """Remove what is not in use until so many bytes are free on the disk, or all is gone."""
        with self._locked("cache", fcntl.LOCK_EX):
            for name in self._oldest():
                if free_bytes(self.root) >= needed:
                    return
                self._evict(name)

    def _make_room(self, more: int, size: int, *, there: int = 0) -> None:
        """Remove the longest unused until `more` bytes fit; `there` lie on this disk already."""
        held = tree_size(self.root / "artifacts") + tree_size(self.root / "partial")
        for name in self._oldest():
            if self._lacks(more, there, held) <= 0:
                return
            held -= self._evict(name)
        lacking = self._lacks(more, there, held)
        if lacking > 0:
            limit = f"ARRIERO_STORE_CACHE_BYTES is {shown(self.limit)}; " if self.limit else ""
            raise DiskFull(
                f"an artifact of {shown(size)} ({size} bytes) does not fit the cache at "
                f"{self.root}, by {shown(lacking)}: {limit}{shown(held)} in it are in use, "
                f"{shown(free_bytes(self.root))} are free on its disk; give it more room",
                needed=size,
                free=max(0, size - lacking),
            )

    def _lacks(self, more: int, there: int, held: int) -> int:
        over = held + more - self.limit if self.limit is not None else 0
        return max(over, more - there - free_bytes(self.root))

    def _oldest(self) -> list[str]:
        names = {
            path.name: self._used(path.name)
            for kind in ("artifacts", "partial")
            for path in (self.root / kind).iterdir()
        }
        return sorted(names, key=lambda name: names[name])

    def _used(self, name: str) -> float:
        with contextlib.suppress(FileNotFoundError):
            return (self.root / "locks" / f"{name}.use").stat().st_mtime
        return 0.0

    def _evict(self, name: str) -> int:
        """Remove an artifact, whole or half fetched; its bytes, 0 when it is in use."""
        fd = self._open(name)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return 0
        try:
            gone = 0
            for path in (self._path(name), self.root / "partial" / name):
                if path.is_dir():
                    gone += tree_size(path)
                    dead = self.root / "trash" / f"{name}.dead-{secrets.token_hex(6)}"
                    path.chmod(0o755)  # moving a directory rewrites its `..`
                    path.rename(dead)
                    remove_tree(dead)
            return gone
        finally:
            os.close(fd)

    def _place(self, source: Path, name: str) -> None:
        seal_tree(source, keep_writable=source)
        with os_errors(source):
            fsync_tree(source)
            source.chmod(0o755)
            source.rename(self._path(name))
        self._path(name).chmod(DIRECTORY_MODE)
        fsync_directory(self.root / "artifacts")

    def _path(self, name: str) -> Path:
        return self.root / "artifacts" / name

    def _open(self, name: str) -> int:
        path = self.root / "locks" / f"{name}.use"
        with os_errors(path):
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    @contextlib.contextmanager
    def _locked(self, name: str, how: int) -> Iterator[None]:
        fd = self._open(name)
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)
