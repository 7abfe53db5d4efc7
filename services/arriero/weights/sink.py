"""Files that are written, hashed and made durable while their bytes are still being made.

Responsibility: take stretches of bytes, in any order, and have other threads put
them into their files, hash them and push them to the disk. Does not know what
the bytes mean.

The interpreter's lock is free while a thread writes, hashes or syncs, so on two
cores the work takes as long as its slowest part.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import mmap
import os
import queue
import threading
from dataclasses import dataclass
from pathlib import Path

from arriero.errors import DiskFull, Internal

__all__ = ["Sink", "SinkFile", "Written"]

# What is computed is gathered in buffers of this size; so many exist at most. Small
# enough to be in the cache still when they are written and hashed.
BUFFER = 1 << 20
_BUFFERS = 8
# What is copied from another file goes in pieces of this size.
_PIECE = 1 << 25
# Bytes after which a file is pushed to the disk, so that the last sync is short.
_DIRTY = 1 << 24
# Start writing to the disk, and do not wait for it (sync_file_range(2)).
_SYNC_FILE_RANGE_WRITE = 2
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Written:
    """What a file was when it was closed; a digest of it holds as long as it is that.

    Attributes:
        size: bytes.
        mtime_ns: time of the last change, nanoseconds since the epoch.
        sha256: in hex.
    """

    size: int
    mtime_ns: int
    sha256: str


class SinkFile:
    """A file in the making; nobody asks for a `scratch` one after a loss of power."""

    def __init__(self, path: Path, size: int, *, scratch: bool = False) -> None:
        """Create it in full length, its space reserved.

        Raises:
            DiskFull: there is no room for it, with figures; nothing was written.
        """
        self.path = path
        self.size = size
        self.scratch = scratch
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self.hash = hashlib.sha256()
        self.hashed = 0
        self.dirty = 0
        try:
            _reserve(self.descriptor, size, path)
        except BaseException:
            os.close(self.descriptor)
            path.unlink(missing_ok=True)
            raise

    def update(self, offset: int, data: memoryview) -> None:
        """Hash, as long as what comes is what follows."""
        if offset == self.hashed and not self.scratch:
            self.hash.update(data)
            self.hashed += data.nbytes

    def written(self) -> Written | None:
        """Its digest, where all of it came in order and it is to stay."""
        if self.hashed != self.size:
            return None
        status = os.fstat(self.descriptor)
        return Written(status.st_size, status.st_mtime_ns, self.hash.hexdigest())


@dataclass(slots=True)
class _Stretch:
    """Bytes on their way to a file; `buffer` goes back to be used again.

    `source` is a descriptor and offset that hold the same bytes.
    """

    file: SinkFile
    offset: int
    data: memoryview
    buffer: memoryview | None = None
    source: tuple[int, int] | None = None


class Sink:
    """Writes files in threads of its own; at most 8 MiB of copies are on their way.

    Not for several threads at once. What goes wrong in a thread is raised by the
    next call.
    """

    def __init__(self) -> None:
        """Nothing runs before the first file."""
        self.files: list[SinkFile] = []
        self._sources: dict[Path, int] = {}
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._buffers = 0
        self._open: _Stretch | None = None
        self._to_write: queue.Queue[_Stretch | None] = queue.Queue(_BUFFERS)
        self._to_hash: queue.Queue[_Stretch | None] = queue.Queue(_BUFFERS)
        self._to_sync: queue.Queue[SinkFile | None] = queue.Queue(2)
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def add(self, path: Path, size: int, *, scratch: bool = False) -> SinkFile:
        """Create a file; a `scratch` one is neither hashed nor pushed to the disk.

        Raises:
            DiskFull: no room for it, with figures.
        """
        file = SinkFile(path, size, scratch=scratch)
        self.files.append(file)
        if not self._threads:
            for work in (self._write, self._hash, self._sync):
                thread = threading.Thread(target=work, name=f"sink{work.__name__}", daemon=True)
                thread.start()
                self._threads.append(thread)
        return file

    def put(self, file: SinkFile, offset: int, data: memoryview) -> None:
        """Copy bytes and write them some time; the caller may change them afterwards."""
        data = data.cast("B")
        done = 0
        while done < data.nbytes:
            stretch = self._stretch(file, offset + done)
            assert stretch.buffer is not None
            filled = stretch.data.nbytes
            size = min(data.nbytes - done, BUFFER - filled)
            stretch.buffer[filled : filled + size] = data[done : done + size]
            stretch.data = stretch.buffer[: filled + size]
            done += size

    def room(self, file: SinkFile, offset: int, size: int) -> memoryview:
        """Memory that is written some time, to be filled before the next call.

        Args:
            file: the target.
            offset: in the target.
            size: bytes, 1 MiB at most.
        """
        if size > BUFFER:
            raise Internal(f"{size} bytes asked for, at most {BUFFER} are there at once")
        current = self._open
        if current is not None and current.data.nbytes + size > BUFFER:
            self._flush()
        stretch = self._stretch(file, offset)
        assert stretch.buffer is not None
        filled = stretch.data.nbytes
        stretch.data = stretch.buffer[: filled + size]
        return stretch.buffer[filled : filled + size]

    def put_file(
        self, file: SinkFile, offset: int, data: memoryview, source: Path, start: int
    ) -> None:
        """Write bytes of another file, which stays as it is.

        Args:
            file: the target.
            offset: in the target.
            data: the bytes, mapped.
            source: the file that they are of; copied by the kernel where it can.
            start: where they begin in it.
        """
        self._flush()
        if source not in self._sources:
            self._sources[source] = os.open(source, os.O_RDONLY)
        for done in range(0, data.nbytes, _PIECE):
            piece = data[done : done + _PIECE]
            place = (self._sources[source], start + done)
            self._give(_Stretch(file, offset + done, piece, source=place))

    def close(self) -> dict[str, Written]:
        """Wait until everything that is to stay is on the disk, and close the files.

        Returns:
            Digests by file name, of those files that came in order.
        """
        self._flush()
        self._stop()
        if self._error is not None:
            self._release()
            raise self._error
        digests = {}
        for file in self.files:
            if not file.scratch:
                os.fsync(file.descriptor)
            if (written := file.written()) is not None:
                digests[file.path.name] = written
        self._release()
        return digests

    def abandon(self) -> None:
        """Stop and close the files, whatever state they are in."""
        self._error = self._error or RuntimeError("abandoned")
        self._stop()
        self._release()

    # --- on the caller's thread -----------------------------------------------------------

    def _stretch(self, file: SinkFile, offset: int) -> _Stretch:
        """The buffer that continues here, with room in it."""
        current = self._open
        if (
            current is not None
            and current.file is file
            and current.offset + current.data.nbytes == offset
            and current.data.nbytes < BUFFER
        ):
            return current
        self._flush()
        buffer = self._buffer()
        self._open = _Stretch(file, offset, buffer[:0], buffer)
        return self._open

    def _buffer(self) -> memoryview:
        if self._buffers < _BUFFERS and self._free.empty():
            self._buffers += 1
            return memoryview(mmap.mmap(-1, BUFFER))
        return self._free.get()

    def _flush(self) -> None:
        if self._open is not None:
            stretch, self._open = self._open, None
            self._give(stretch)

    def _give(self, stretch: _Stretch) -> None:
        if self._error is not None:
            raise self._error
        self._to_write.put(stretch)

    def _stop(self) -> None:
        if self._threads:
            self._to_write.put(None)
            for thread in self._threads:
                thread.join()
            self._threads = []

    def _release(self) -> None:
        for descriptor in (*self._sources.values(), *(file.descriptor for file in self.files)):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._sources = {}
        self.files = []

    # --- the threads ----------------------------------------------------------------------

    def _write(self) -> None:
        while (stretch := self._to_write.get()) is not None:
            if self._error is None:
                try:
                    _put(stretch)
                except BaseException as error:
                    self._error = _translated(error, stretch.file)
            stretch.file.dirty += stretch.data.nbytes
            if stretch.file.dirty >= _DIRTY and not stretch.file.scratch:
                with contextlib.suppress(queue.Full):  # busy with an earlier stretch
                    self._to_sync.put_nowait(stretch.file)
                    stretch.file.dirty = 0
            self._to_hash.put(stretch)
        self._to_hash.put(None)
        self._to_sync.put(None)

    def _hash(self) -> None:
        while (stretch := self._to_hash.get()) is not None:
            if self._error is None:
                stretch.file.update(stretch.offset, stretch.data)
            if stretch.buffer is not None:
                self._free.put(stretch.buffer)

    def _sync(self) -> None:
        while (file := self._to_sync.get()) is not None:
            if hasattr(_libc, "sync_file_range"):  # not everywhere; the last sync is longer then
                everything = (ctypes.c_int64(0), ctypes.c_int64(0))
                _libc.sync_file_range(file.descriptor, *everything, _SYNC_FILE_RANGE_WRITE)


def _put(stretch: _Stretch) -> None:
    descriptor, offset = stretch.file.descriptor, stretch.offset
    done = 0
    if stretch.source is not None:
        source, start = stretch.source
        with contextlib.suppress(OSError):  # other filesystems, old kernels: by hand
            while done < stretch.data.nbytes:
                count = os.copy_file_range(
                    source, descriptor, stretch.data.nbytes - done, start + done, offset + done
                )
                if not count:
                    break
                done += count
    while done < stretch.data.nbytes:
        done += os.pwrite(descriptor, stretch.data[done:], offset + done)


def _reserve(descriptor: int, size: int, path: Path) -> None:
    """Give a file its length and, where the filesystem can, its blocks."""
    # Not os.posix_fallocate: where a filesystem cannot, that writes every block.
    if size and hasattr(_libc, "fallocate"):
        arguments = (ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size))
        if _libc.fallocate(ctypes.c_int(descriptor), *arguments) == 0:
            return
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path, size)
    os.ftruncate(descriptor, size)


def _full(path: Path, needed: int) -> DiskFull:
    figures = os.statvfs(path.parent)
    free = figures.f_bavail * figures.f_frsize
    return DiskFull(
        f"no space left for {path.name}: {needed} bytes needed, {free} bytes free on its "
        "filesystem; free some (`arriero artifacts gc`) or move the store",
        needed=needed,
        free=free,
    )


def _translated(error: BaseException, file: SinkFile) -> BaseException:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _full(file.path, file.size)
    return error
