"""A process tied to the life of the one that started it.

Responsibility: who the supervising process is (pid and start time, so that a
reused pid is not mistaken for it) and whether it still lives. Does not know
what the supervised process does.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from arriero.errors import InvalidArgument

__all__ = [
    "PID",
    "START",
    "ProcessId",
    "environment",
    "from_env",
    "process_start",
    "watch",
]

PID = "ARRIERO_PARENT_PID"
START = "ARRIERO_PARENT_START"


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that is never mistaken for a later one with the same pid.

    `start` is the start time: clock ticks since boot from /proc/<pid>/stat, or
    psutil's `create_time` in microseconds where there is no /proc.
    """

    pid: int
    start: str

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process with this pid now; None when there is none (zombies count as none)."""
        start = process_start(pid)
        return None if start is None else cls(pid, start)

    def alive(self) -> bool:
        """Whether this very process still runs."""
        return process_start(self.pid) == self.start


def environment() -> dict[str, str]:
    """Variables that tie a child to this process."""
    me = ProcessId.of(os.getpid())
    assert me is not None, "the running process has a start time"
    return {PID: str(me.pid), START: me.start}


def from_env(env: Mapping[str, str] | None = None) -> ProcessId | None:
    """The supervising process; None when nothing supervises.

    A pid without a start time is taken as it is now.

    Raises:
        InvalidArgument: the pid is not a number.
    """
    env = os.environ if env is None else env
    text = env.get(PID, "")
    if not text:
        return None
    if not text.isdigit():
        raise InvalidArgument.field(PID, f"{text!r} is not a process id")
    pid = int(text)
    start = env.get(START) or process_start(pid) or ""
    return ProcessId(pid, start)


def watch(
    process: ProcessId,
    on_death: Callable[[], None],
    *,
    interval: float = 1.0,
    stop: threading.Event | None = None,
) -> threading.Thread:
    """Call `on_death` once, from a thread of its own, when the process is gone.

    A thread and not a task: a busy event loop must not outlive its supervisor.
    """
    ended = stop or threading.Event()

    def run() -> None:
        while process.alive():
            if ended.wait(interval):
                return
        on_death()

    thread = threading.Thread(target=run, name="parent-watch", daemon=True)
    thread.start()
    return thread


def process_start(pid: int) -> str | None:
    """The start time of the process with this pid now, as `ProcessId.start`.

    None when there is none; a zombie counts as none.
    """
    if Path("/proc/self/stat").exists():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        except OSError:
            return None
        # proc(5): the command in parentheses may hold anything; state is field 3
        # and starttime field 22.
        fields = stat.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return str(round(process.create_time() * 1e6))
    except psutil.Error:
        return None
