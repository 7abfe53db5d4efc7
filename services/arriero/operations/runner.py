"""Where jobs run: on this machine, as processes of their own.

Responsibility: start a job, learn how it ended, stop it, and clear away one
that an earlier service left. Does not know attempts, retries or outcomes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from arriero.errors import Unavailable
from arriero.operations.process import MARKER, end_job
from arriero.rpc.parent import ProcessId


@dataclass(frozen=True)
class Launch:
    """What a runner needs to start a job; `log` is appended to."""

    module: str
    assignment: Path
    execution: str
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)


class Handle(Protocol):
    """A job that was started."""

    @property
    def process(self) -> ProcessId | None:
        """Its process on this machine, if it has one."""

    async def wait(self) -> int:
        """The exit code when it and all that it started are gone; -n for signal n."""

    def terminate(self) -> None:
        """SIGTERM: keep what you have and leave."""

    async def kill(self) -> None:
        """End it and all that it started, now; returns when they are gone."""


class Runner(Protocol):
    """A place where jobs run."""

    async def start(self, launch: Launch) -> Handle:
        """Start a job. Raises `Unavailable` where it cannot be started now."""

    async def clear(self, execution: str, process: ProcessId | None, grace: float) -> None:
        """Make sure that no job of an execution runs any more.

        Waits `grace` seconds for it to leave by itself, then kills it.

        Raises:
            Unavailable: it does not go away.
        """


class LocalProcess:
    """Jobs as child processes, each the leader of a session of its own."""

    async def start(self, launch: Launch) -> Handle:
        """Start `python -m <module> <assignment>`; see `Runner`."""
        environment = {
            # Threads that spin at barriers cost a machine that is shared (by services,
            # replicas and other jobs) several times what they gain on an idle one.
            "OMP_WAIT_POLICY": "PASSIVE",
            **os.environ,
            **launch.environment,
            MARKER: launch.execution,
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
        }
        try:
            with launch.log.open("ab") as log:
                # exec without preexec_fn: gRPC in this process does not survive a bare fork.
                popen = subprocess.Popen(
                    [sys.executable, "-m", launch.module, str(launch.assignment)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=environment,
                )
        except OSError as error:
            raise Unavailable(f"the job could not be started: {error}") from error
        _prefer_for_oom(popen.pid)
        return _Child(popen, launch.execution)

    async def clear(self, execution: str, process: ProcessId | None, grace: float) -> None:
        """See `Runner`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace
        while process is not None and process.alive() and loop.time() < deadline:
            await asyncio.sleep(0.1)
        if not await asyncio.to_thread(end_job, execution, process):
            raise Unavailable(
                f"an earlier job of {execution} does not end "
                f"(pid {process.pid if process else 'unknown'}); end it by hand"
            )


class _Child:
    """A child process; its exit shows through a pidfd where there are pidfds."""

    def __init__(self, popen: subprocess.Popen[bytes], execution: str) -> None:
        self._popen = popen
        self._execution = execution
        self._process = ProcessId.of(popen.pid)

    @property
    def process(self) -> ProcessId | None:
        """None when it was gone at once."""
        return self._process

    async def wait(self) -> int:
        """See `Handle`."""
        await self._exited()
        # What it started must not outlive it: the next attempt would meet it.
        await asyncio.to_thread(end_job, self._execution, None)
        return self._popen.wait()

    async def _exited(self) -> None:
        loop = asyncio.get_running_loop()
        descriptor = -1
        if sys.platform == "linux" and self._popen.poll() is None:
            with contextlib.suppress(OSError):
                descriptor = os.pidfd_open(self._popen.pid)
        if descriptor >= 0:
            gone = asyncio.Event()
            loop.add_reader(descriptor, gone.set)
            try:
                await gone.wait()
            finally:
                loop.remove_reader(descriptor)
                os.close(descriptor)
        while self._popen.poll() is None:
            await asyncio.sleep(0.05)

    def terminate(self) -> None:
        """SIGTERM to the job alone: its children are its own to tell."""
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGTERM)

    async def kill(self) -> None:
        """See `Handle`."""
        await asyncio.to_thread(end_job, self._execution, self._process)


def _prefer_for_oom(pid: int) -> None:
    """When memory runs out, the kernel should take the job and not the service."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("500", encoding="ascii")
