"""Sealing: a directory that a job filled, made durable, read-only and known.

Responsibility: from a directory to the entries of a manifest, or to what is wrong
with it. Does not know where the files go afterwards.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from arriero.errors import DataLoss, FailedPrecondition, InvalidArgument
from arriero.store.files import (
    fsync_tree,
    is_temporary,
    os_errors,
    safe_relative,
    seal_tree,
    tree_files,
)
from arriero.store.manifest import FileEntry


def seal(
    source: Path,
    expected: Sequence[FileEntry] | None,
    read: Callable[[Path], tuple[int, str]],
    *,
    durable: bool = True,
) -> list[FileEntry]:
    """Make the source read-only, then read what it holds.

    Args:
        source: a directory.
        expected: what it must hold, to the byte; None for anything.
        read: gives the size and sha256 of a file; it may keep the bytes as well.
        durable: fsync first.

    Raises:
        DataLoss: not what was expected.
        InvalidArgument: links, special files, or no files at all.
    """
    with os_errors(source):
        for relative, status in tree_files(source).items():
            path = source / relative
            if is_temporary(path.name):
                path.unlink()
            elif status.st_nlink > 1:
                _own(path, status.st_size)
        seal_tree(source, keep_writable=source)
        if durable:
            fsync_tree(source)
    found = []
    for relative in tree_files(source):
        size, sha256 = read(source / relative)
        found.append(FileEntry(relative, size, sha256))
    if not found:
        raise InvalidArgument.field("source", f"{source} holds no files")
    if expected is not None:
        compare(found, checked(expected))
    return found


def checked(entries: Sequence[FileEntry]) -> list[FileEntry]:
    """Announced files, if their paths can be files of one artifact."""
    found = [
        FileEntry(str(safe_relative(e.path, field="files")), e.size, e.sha256) for e in entries
    ]
    if len({entry.path for entry in found}) != len(found):
        raise InvalidArgument.field("files", "the same path twice")
    return found


def compare(found: Sequence[FileEntry], expected: Sequence[FileEntry]) -> None:
    """Refuse files that are not what was announced.

    Raises:
        DataLoss: naming each.
    """
    there = {entry.path: entry for entry in found}
    wrong = []
    for entry in expected:
        other = there.pop(entry.path, None)
        if other is None:
            wrong.append(f"{entry.path} is missing")
        elif other.size != entry.size:
            wrong.append(f"{entry.path} has {other.size} bytes, expected {entry.size}")
        elif other.sha256 != entry.sha256:
            wrong.append(f"{entry.path} has sha256 {other.sha256}, expected {entry.sha256}")
    wrong += [f"{path} was not announced" for path in there]
    if wrong:
        raise DataLoss(f"not published, the files are not what was announced: {'; '.join(wrong)}")


def rename(source: Path, final: Path) -> bool:
    """Whether the source is in place; False when something is there already.

    Raises:
        FailedPrecondition: another filesystem.
    """
    try:
        source.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        if error.errno == errno.EXDEV:
            raise FailedPrecondition(
                f"{source} is on another filesystem than the store that it is published to "
                f"({final.parent.parent}); fill a directory that Store.staging made"
            ) from error
        raise
    return True


def _own(path: Path, size: int) -> None:
    """Replace a hard link by a copy: the other name's owner could change our bytes."""
    copy = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    with os_errors(path, size):
        try:
            shutil.copyfile(path, copy)
            copy.replace(path)
        except BaseException:
            copy.unlink(missing_ok=True)
            raise
