"""Where a pull's files come before they are whole.

Responsibility: a directory in the goal's own filesystem, that two pulls never
share and that a killed one leaves for the next to remove. Does not know what is
pulled.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from arriero.errors import DiskFull, FailedPrecondition, PermissionDenied

__all__ = ["Aside", "check_room", "explained"]

_EXPECTED = "pull into a new or empty directory"


class Aside:
    """Beside a goal that is not there yet; within one that is, which may be a mount, or
    somebody's working directory.

    Attributes:
        path: of the directory to fill.

    Raises:
        FailedPrecondition: the goal has something in it, or is being filled.
    """

    def __init__(self, goal: Path) -> None:
        """Make it, once leftovers of pulls that were killed are gone."""
        self._goal = goal
        self._within = goal.is_dir()
        if goal.exists() and not self._within:
            raise FailedPrecondition(f"{goal} is a file; {_EXPECTED}")
        place = goal if self._within else goal.parent
        place.mkdir(parents=True, exist_ok=True)
        form = re.compile(rf"\.{re.escape(goal.name)}\.[0-9a-f]{{8}}\.pull")
        others = [path for path in place.iterdir() if form.fullmatch(path.name)]
        if self._within and len(list(place.iterdir())) > len(others):
            raise FailedPrecondition(f"{goal} has something in it; {_EXPECTED}")
        for other in others:
            if _is_alive(other):
                raise _taken(goal)
            shutil.rmtree(other, ignore_errors=True)
        self.path = place / f".{goal.name}.{secrets.token_hex(4)}.pull"
        self.path.mkdir()
        self._lock = os.open(self.path, os.O_RDONLY)
        with suppress(OSError):  # some network filesystems lock no directories
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not self.path.exists():  # another one saw it before it was locked
            os.close(self._lock)
            raise _taken(goal)

    def arrive(self) -> None:
        """Give the goal what has come.

        Raises:
            FailedPrecondition: something is in it meanwhile.
        """
        if self._goal.exists() and len(list(self._goal.iterdir())) > self._within:
            raise FailedPrecondition(f"{self._goal} was filled by somebody else meanwhile")
        if self._within:
            for path in sorted(self.path.iterdir()):
                path.rename(self._goal / path.name)
        else:
            self.path.rename(self._goal)

    def remove(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _is_alive(path: Path) -> bool:
    """Whether the process that fills a directory is there yet, by its lock."""
    try:
        lock = os.open(path, os.O_RDONLY)
    except FileNotFoundError:  # it has just arrived, or given up
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


def _taken(goal: Path) -> FailedPrecondition:
    return FailedPrecondition(f"another pull is filling {goal}; wait for it")


def check_room(directory: Path, needed: int) -> None:
    """Refuse what does not fit.

    Raises:
        DiskFull: with the figures.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise DiskFull(
            f"{needed} bytes are needed in {directory.parent}, {free} are free; nothing was "
            "fetched: free some, or pull to another filesystem",
            needed=needed,
            free=free,
        )


@contextmanager
def explained(goal: Path) -> Iterator[None]:
    """This machine's refusals, in words.

    Raises:
        DiskFull, PermissionDenied, FailedPrecondition: as the operating system says.
    """
    try:
        yield
    except OSError as error:
        said = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"{goal}: {said}; nothing is kept", needed=0, free=0) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionDenied(f"{goal} can't be written: {said}") from error
        raise FailedPrecondition(f"{goal} can't be filled: {said}; {_EXPECTED}") from error
