"""The processes of a job: which they are, and ending all of them.

Responsibility: groups, sessions and markers. Does not know what the processes do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import psutil

from arriero.rpc.parent import ProcessId, process_start

# Set for a job and so for everything that it starts; the value is the execution's id.
MARKER = "ARRIERO_JOB_EXECUTION"


def marked(execution: str) -> Iterator[int]:
    """Pids of the living processes that were started by a job of this execution."""
    for pid in psutil.pids():
        if pid == os.getpid():
            continue
        try:
            process = psutil.Process(pid)
            if process.environ().get(MARKER) == execution and process_start(pid) is not None:
                yield pid
        except (psutil.Error, OSError):
            continue


def end_job(execution: str, leader: ProcessId | None, *, timeout: float = 5.0) -> bool:
    """SIGKILL a job: its process group and every process that carries its marker.

    torchrun puts each worker into a session of its own, so the group alone
    would leave them alive. Returns whether all were gone within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        if leader is not None and leader.alive():
            _kill_group(leader.pid)
        rest = list(marked(execution))
        for pid in rest:
            _kill(pid)
        if not rest and (leader is None or not leader.alive()):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(OSError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)


def _kill(pid: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def end_self(code: int) -> None:
    """End this process and everything below it at once; nothing is cleaned up."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            _kill(child.pid)
    os._exit(code)
