"""How a container ends, where it is but a process of this machine.

Responsibility: kill a process with all that it started, as a container's end does. Does
not know pods.
"""

from __future__ import annotations

import contextlib
import subprocess

import psutil

__all__ = ["kill"]


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a container's first process, and those that it started."""
    if process.poll() is not None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        first.suspend()  # starts no more meanwhile
        for started in first.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                started.kill()
    process.kill()
