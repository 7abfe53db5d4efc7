"""Checkpoints that outlive their machine.

Responsibility: bring what a directory holds to the store, soon after it changed,
beside the work. Does nothing for a store that the directory lies in. Does not know
what a checkpoint is.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from arriero.errors import ArrieroError
from arriero.store import Store

__all__ = ["Keeper"]

log = logging.getLogger("arriero.job")

_SECONDS = 1.0


class Keeper:
    """Keeps a directory of a job's staging as long as the context lasts, and at its end.

    What a store that is away missed is kept when it is back. On entering, what an
    earlier attempt kept comes back, unless it is here.
    """

    def __init__(self, store: Store, directory: Path) -> None:
        self._store = store
        self._directory = directory
        self._kept: object = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def __enter__(self) -> Keeper:
        if self._store.remote:
            self._store.bring(self._directory)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._store.remote:
            self._ended.set()
            self._thread.join()
            self._keep()

    def _run(self) -> None:
        while not self._ended.wait(_SECONDS):
            self._keep()

    def _keep(self) -> None:
        state = self._state()
        if state == self._kept:
            return
        try:
            self._store.keep(self._directory)
            self._kept = state
        except ArrieroError as error:
            log.warning("a checkpoint could not be brought to the store: %s", error)

    def _state(self) -> object:
        """Changes when a file does."""
        found = []
        for base, names, files in os.walk(self._directory):
            names[:] = [name for name in names if not name.startswith(".")]
            for name in files:
                path = Path(base, name)
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                found.append((str(path), status.st_size, status.st_mtime_ns))
        return sorted(found)
