"""Bytes on disk: atomic files, durable trees, safe names.

Responsibility: the few filesystem operations that everything else in the store
is made of, each of which a SIGKILL leaves either undone or done. Does not know
what an artifact is.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from arriero.errors import DataLoss, DiskFull, FailedPrecondition, InvalidArgument, PermissionDenied

FILE_MODE = 0o444
DIRECTORY_MODE = 0o555
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,190}")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
_HASH_CHUNK = 1 << 22


def safe_relative(text: str, *, field: str = "path") -> PurePosixPath:
    """A relative path that cannot climb out of the directory it is joined to.

    Raises:
        InvalidArgument: absolute, empty, with `..`, NUL, a backslash or a
            character that has no UTF-8 form.
    """
    expected = "expected a relative path with forward slashes that stays inside its directory"
    if not text or text in (".", "./"):
        raise InvalidArgument.field(field, f"empty path; {expected}")
    if "\0" in text or "\\" in text:
        raise InvalidArgument.field(field, f"{text!r} holds NUL or a backslash; {expected}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument.field(field, f"{text!r} is not valid UTF-8; {expected}") from None
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts:
        raise InvalidArgument.field(field, f"{text!r} climbs out; {expected}")
    return path


def safe_name(text: str, *, field: str) -> str:
    """A single file name made of letters, digits, `.`, `_` and `-`, not starting with `.`.

    Raises:
        InvalidArgument: anything else.
    """
    if not _NAME.fullmatch(text):
        raise InvalidArgument.field(
            field, f"{text!r} is not a name; expected letters, digits, '.', '_', '-' (at most 191)"
        )
    return text


def now() -> str:
    """The time as RFC 3339 in UTC, with microseconds."""
    return rfc3339(datetime.now(UTC))


def rfc3339(moment: datetime) -> str:
    """A time that knows its zone, in UTC, always of the same length."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def free_bytes(directory: Path) -> int:
    """Bytes that an unprivileged process may still write in the directory's filesystem."""
    figures = os.statvfs(directory)
    return figures.f_bavail * figures.f_frsize


@contextlib.contextmanager
def os_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn the operating system's refusals into errors that say what to do.

    Raises:
        DiskFull: no space or quota; `needed` bytes is what was being written.
        PermissionDenied: not ours to write, or a read-only filesystem.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = free_bytes(path.parent)
            raise DiskFull(
                f"no space left for {path.name}: {needed} bytes needed, {free} bytes free on its "
                "filesystem; free some (`arriero artifacts gc`) or move the store",
                needed=needed,
                free=free,
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionDenied(
                f"{path} can't be written: {error.strerror}; expected a store that this user owns"
            ) from error
        raise


def fsync_directory(path: Path) -> None:
    """Make the directory's entries durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directories(path: Path, *, below: Path) -> None:
    """Create `path` and the missing directories between it and `below`, durably."""
    if path.is_dir():
        return
    if path != below:
        make_directories(path.parent, below=below)
    with os_errors(path):
        path.mkdir(exist_ok=True)
    fsync_directory(path.parent)


def write_atomic(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace a file so that readers, and whoever comes after a crash, see old or new.

    Writes a temporary file beside it, fsyncs, renames, fsyncs the directory.
    `durable=False` leaves the fsyncs out: atomic still, but not sure to
    survive a loss of power.

    Raises:
        DiskFull, PermissionDenied: as the operating system says; nothing is left.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    with os_errors(path, len(data)):
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            with open(fd, "wb", buffering=0) as file:
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
                if durable:
                    os.fsync(fd)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    if durable:
        fsync_directory(path.parent)


def is_temporary(name: str) -> bool:
    """Whether a file name is one that `write_atomic` left behind when it was killed."""
    return _TEMPORARY.fullmatch(name) is not None


def to_json(value: Any) -> bytes:
    """Canonical JSON: sorted keys, no spaces, UTF-8, finite numbers.

    Raises:
        InvalidArgument: not representable.
    """
    try:
        text = json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return text.encode()
    except (TypeError, ValueError) as error:
        raise InvalidArgument(
            f"not representable as JSON: {error}; expected text, finite numbers, lists, objects"
        ) from error


def read_json(path: Path, newest: int, what: str) -> dict[str, Any]:
    """Read a JSON object that carries a version in `format`.

    Raises:
        FileNotFoundError: no such file.
        DataLoss, FailedPrecondition: as `parse_json`.
    """
    return parse_json(path.read_bytes(), newest, f"{what} {path}")


def parse_json(data: bytes, newest: int, what: str) -> dict[str, Any]:
    """The JSON object in `data`, which carries a version in `format`.

    Raises:
        DataLoss: torn or not what was written.
        FailedPrecondition: written by a newer version.
    """
    try:
        value = json.loads(data)
        version = int(value["format"])
    except (ValueError, TypeError, KeyError) as error:
        raise DataLoss(
            f"{what} is damaged ({len(data)} bytes: {error}); expected a JSON object "
            "with a format version; restore it from a backup"
        ) from error
    refuse_newer(version, newest, what)
    result: dict[str, Any] = value
    return result


def refuse_newer(found: int, newest: int, what: str) -> None:
    """Refuse what a newer version wrote.

    Raises:
        FailedPrecondition: `found` is above `newest`.
    """
    if found > newest:
        raise FailedPrecondition(
            f"{what} has format {found}; this version of Arriero reads up to {newest}: "
            "upgrade Arriero, or use a store of its own",
            reason="FORMAT_TOO_NEW",
            metadata={"found": str(found), "newest": str(newest)},
        )


def sha256_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> tuple[int, str]:
    """Size in bytes and hexadecimal sha256 of a file's content.

    Args:
        path: the file.
        on_bytes: called with the bytes read so far, now and then.
    """
    with path.open("rb") as file:
        if on_bytes is None:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), digest
        hasher = hashlib.sha256()
        while chunk := file.read(_HASH_CHUNK):
            hasher.update(chunk)
            on_bytes(file.tell())
        return file.tell(), hasher.hexdigest()


def tree_files(directory: Path) -> dict[str, os.stat_result]:
    """Every regular file below a directory: relative posix path → status, sorted.

    Raises:
        InvalidArgument: a symbolic link, device, socket or unrepresentable name,
            none of which an artifact may hold.
    """
    found: dict[str, os.stat_result] = {}
    for base, names, files in os.walk(directory):
        for name in (*names, *files):
            path = Path(base, name)
            status = path.lstat()
            relative = path.relative_to(directory).as_posix()
            safe_relative(relative)
            if stat.S_ISREG(status.st_mode):
                found[relative] = status
            elif not stat.S_ISDIR(status.st_mode):
                raise InvalidArgument(
                    f"{relative} is a {_type_name(status.st_mode)}; an artifact holds regular "
                    "files and directories only: put a copy of the content there"
                )
    return dict(sorted(found.items()))


def _type_name(mode: int) -> str:
    return "symbolic link" if stat.S_ISLNK(mode) else "special file"


def tree_size(directory: Path) -> int:
    """Bytes of all files below a directory; what vanishes meanwhile counts nothing."""
    total = 0
    for base, _, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(base, name)).st_size
    return total


def tree_newest(directory: Path) -> float:
    """Newest modification time (Unix seconds) of anything in a tree, itself included."""
    newest = 0.0
    for base, _, files in os.walk(directory):
        for path in (base, *(os.path.join(base, name) for name in files)):
            with contextlib.suppress(FileNotFoundError):
                newest = max(newest, os.lstat(path).st_mtime)
    return newest


def seal_tree(directory: Path, keep_writable: Path) -> None:
    """Make a tree read-only, all but the directory `keep_writable`."""
    for base, _, files in os.walk(directory):
        for name in files:
            os.chmod(os.path.join(base, name), FILE_MODE)
        if Path(base) != keep_writable:
            os.chmod(base, DIRECTORY_MODE)


def fsync_tree(directory: Path) -> None:
    """Make a tree's files and directories durable."""
    for base, _, files in os.walk(directory, topdown=False):
        for name in files:
            fd = os.open(os.path.join(base, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        fsync_directory(Path(base))


def remove_tree(directory: Path) -> None:
    """Delete a tree, read-only directories too; gone already is fine."""
    for base, names, files in os.walk(directory):
        with contextlib.suppress(FileNotFoundError):
            os.chmod(base, 0o755)
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(base, name))
        for name in names:  # os.walk reports links to directories as directories
            path = os.path.join(base, name)
            if os.path.islink(path):
                os.unlink(path)
    for base, _, _ in os.walk(directory, topdown=False):
        try:
            os.rmdir(base)
        except OSError as error:  # NFS keeps open files, renamed; the next gc finds them
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise
