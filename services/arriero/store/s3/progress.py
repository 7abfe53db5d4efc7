"""How far a fetch is, for whoever reads the log.

Responsibility: a line now and then. Does not know what is fetched.
"""

from __future__ import annotations

import logging
import threading
import time

from arriero.store.disk import shown
from arriero.store.manifest import Manifest

_SECONDS = 10.0
_log = logging.getLogger(__name__)


class Progress:
    """Counts the bytes of an artifact as they come; from several threads."""

    def __init__(self, manifest: Manifest) -> None:
        self._what = f"{manifest.kind} {manifest.name}"
        self._size = manifest.size
        self._done = 0
        self._begun = self._told = time.monotonic()
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        """So many more are there."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._told < _SECONDS:
                return
            self._told = now
            rate = self._done / (now - self._begun)
        _log.info(
            "fetching %s: %s of %s, %s/s",
            *(self._what, shown(self._done), shown(self._size), shown(int(rate))),
        )
