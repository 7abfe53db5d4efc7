"""What work and proofs cost: seconds, and private memory at its peak.

Responsibility: sample this process and its children, and keep separate accounts.
Does not know what is being done.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Cost", "Meter", "private_bytes"]

_INTERVAL = 0.1
_PROC = Path("/proc")


@dataclass(slots=True)
class Cost:
    """What something took.

    Attributes:
        seconds: of wall time.
        memory_bytes: most private memory (mapped files apart) of the process and its
            children meanwhile; 0 where the host does not tell.
    """

    seconds: float = 0.0
    memory_bytes: int = 0


class Meter:
    """Charges what this process uses to one account at a time.

    Looks when the account changes, and ten times a second where it is told to watch:
    a shorter peak may be missed.

    Attributes:
        work: the account of everything that is not charged to another.
    """

    def __init__(self) -> None:
        """Start counting."""
        self.work = Cost()
        self._current = self.work
        self._since = time.monotonic()
        self._lock = threading.Lock()

    def watch(self) -> None:
        """Look in between as well, from a thread, as long as the process lives."""
        threading.Thread(target=self._run, name="cost", daemon=True).start()

    @contextmanager
    def charged(self, account: Cost) -> Iterator[None]:
        """Everything inside belongs to an account."""
        before = self._switch(account)
        try:
            yield
        finally:
            self._switch(before)

    def read(self) -> Cost:
        """The work's account, up to now."""
        self._switch(self._current)
        return Cost(self.work.seconds, self.work.memory_bytes)

    def _switch(self, account: Cost) -> Cost:
        with self._lock:
            self._sample()
            now, before = time.monotonic(), self._current
            before.seconds += now - self._since
            self._since, self._current = now, account
        return before

    def _sample(self) -> None:
        self._current.memory_bytes = max(self._current.memory_bytes, private_bytes())

    def _run(self) -> None:
        while True:
            time.sleep(_INTERVAL)
            with self._lock:
                self._sample()


def private_bytes() -> int:
    """Anonymous memory of this process and its children; 0 where the host does not tell."""
    return sum(_anonymous(pid) for pid in (os.getpid(), *_children()))


def _children() -> list[int]:
    found: list[int] = []
    try:
        for task in (_PROC / "self/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    except (OSError, ValueError):  # a thread that ended, a kernel without the file
        pass
    return found


def _anonymous(pid: int) -> int:
    try:
        for line in (_PROC / str(pid) / "status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):  # it ended meanwhile
        pass
    return 0
