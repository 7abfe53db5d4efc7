"""Trash: the one decision between whoever removes a directory and whoever uses it.

Responsibility: that a directory which somebody has claimed never moves. Does
not know why something is to go.

The remover marks what it means to remove, reads every root again, and then
takes what is still marked, which is the rename of the mark; a user who finds a
mark deletes it. One of the two succeeds. So whoever first writes a root and
then claims either has been seen by the remover, or has met its mark, or learns
that the directory is gone.

    trash/<name>.doomed         means to remove
    trash/<name>.taken          is moving the directory
    trash/<name>.dead-<random>  the directory, no longer whole
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from arriero.errors import FailedPrecondition
from arriero.store import lock
from arriero.store.files import fsync_directory, os_errors, remove_tree
from arriero.store.layout import Layout

_DOOMED, _TAKEN, _DEAD = ".doomed", ".taken", ".dead-"
# Between a `taken` mark and the end of it lie two renames.
_PATIENCE_SECONDS = 10.0


class Trash:
    """The trash of one store."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    @contextlib.contextmanager
    def remover(self) -> Iterator[None]:
        """Be the one who removes.

        Raises:
            FailedPrecondition: somebody else does; names its pid.
        """
        with lock.hold(self._layout.root / "locks" / "gc.lock", "garbage collector"):
            yield

    def claim(self, path: Path) -> bool:
        """Whether a directory is there, and will stay if a root was written before."""
        doomed, taken = self._mark(path, _DOOMED), self._mark(path, _TAKEN)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            with contextlib.suppress(OSError):  # not marked; or a read-only store
                doomed.unlink()
            if not taken.exists():
                return path.is_dir()  # looked at last: a mark goes after its directory
            if time.monotonic() >= deadline:
                return False
            try:
                with self.remover():
                    self.settle()  # who took it died before moving it
            except FailedPrecondition:
                time.sleep(0.01)

    def doom(self, path: Path) -> None:
        """Mark a directory; users may claim it from now on."""
        mark = self._mark(path, _DOOMED)
        with os_errors(mark):
            mark.touch()

    def spare(self, path: Path) -> None:
        """Take the mark off again."""
        self._mark(path, _DOOMED).unlink(missing_ok=True)

    def take(self, path: Path) -> bool:
        """Delete a marked directory; False when somebody claimed it or it is gone."""
        taken = self._mark(path, _TAKEN)
        try:
            self._mark(path, _DOOMED).rename(taken)
        except FileNotFoundError:
            return False
        dead = self._mark(path, _DEAD + secrets.token_hex(6))
        try:
            with os_errors(path):
                path.chmod(0o755)  # moving a directory rewrites its `..`
                path.rename(dead)
        except FileNotFoundError:
            return False
        finally:
            taken.unlink(missing_ok=True)
        fsync_directory(path.parent)  # before half of it may be gone
        fsync_directory(dead.parent)
        remove_tree(dead)
        return True

    def settle(self) -> None:
        """As the remover: finish what one that was killed had begun."""
        for path in (self._layout.root / "trash").iterdir():
            if _DEAD in path.name:
                remove_tree(path)
            elif path.name.endswith((_DOOMED, _TAKEN)):
                path.unlink(missing_ok=True)

    def _mark(self, path: Path, suffix: str) -> Path:
        name = self._layout.relative(path).replace("/", "+")
        return self._layout.root / "trash" / f"{name}{suffix}"
