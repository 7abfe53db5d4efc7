"""Where jobs run: what a place has to offer, and this machine as one.

Responsibility: start a job, learn how it ended, hold or stop it, and take over or
clear away one that an earlier service left. Does not know attempts, retries or
outcomes. (`cluster` is the other place.)
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from arriero.errors import ArrieroError, Unavailable
from arriero.operations.memory import oom_kills
from arriero.operations.process import MARKER, end_job
from arriero.operations.queue import Demand
from arriero.rpc.parent import ProcessId


def _nobody(error: ArrieroError | None) -> None:
    del error


@dataclass(frozen=True)
class Launch:
    """What a runner needs to start a job; `log` is appended to.

    Attributes:
        assignment: its file, or its URL in a store that the job has to ask.
        attempt: number of the attempt.
        profile: name of the resource profile; empty for the default one.
        nodes: machines that the work asks for.
        facts: run, stage, owner and the like, for whoever looks at the place.
        tell: called with what the job waits for before it runs, None when it does.
    """

    module: str
    assignment: Path | str
    execution: str
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    attempt: int = 1
    profile: str = ""
    nodes: int = 1
    facts: Mapping[str, str] = field(default_factory=dict)
    tell: Callable[[ArrieroError | None], None] = _nobody


@dataclass(frozen=True)
class Exit:
    """How a job left its place.

    Attributes:
        code: exit code, -n for signal n; None when nobody saw it end.
        oom_killed: whether memory ran out; None: not known.
        evicted: why the place took it away, where that was no fault of the job.
        problem: why it never ran, or what the place knows better than an exit code.
        lines: that it last wrote, where they are not in the log.
    """

    code: int | None
    oom_killed: bool | None = None
    evicted: str = ""
    problem: ArrieroError | None = None
    lines: Sequence[str] = ()


class Handle(Protocol):
    """A job that was started."""

    @property
    def process(self) -> ProcessId | None:
        """Its process on this machine, if it has one."""

    async def wait(self) -> Exit:
        """How it ended, when it and all that it started are gone."""

    async def terminate(self) -> None:
        """Tell it to keep what it has and leave."""

    async def kill(self) -> None:
        """End it and all that it started, now; returns when they are gone."""

    async def suspend(self) -> bool:
        """Hold it in its place without its resources; False where it has to leave for that."""

    async def resume(self) -> None:
        """Let it go on that `suspend` holds."""


class Runner(Protocol):
    """A place where jobs run."""

    @property
    def detached(self) -> bool:
        """Whether jobs go on when the service ends, so that the next one adopts them."""

    def demand(self, profile: str, nodes: int) -> Demand:
        """What a job of a profile takes.

        Raises:
            InvalidArgument: no such profile, or other nodes than it has.
        """

    async def start(self, launch: Launch) -> Handle:
        """Start a job; finds the one that this attempt has already.

        Raises:
            Unavailable, ResourceExhausted: it cannot be started now.
            ArrieroError: it can never be started so.
        """

    async def adopt(self, launch: Launch, process: ProcessId | None, grace: float) -> Handle | None:
        """The job of an attempt that an earlier service started, if it can be waited for.

        Where it cannot, none of the execution runs any more when this returns:
        one that does is given `grace` seconds to leave by itself, then killed.

        Raises:
            Unavailable: it does not go away.
        """

    async def close(self) -> None:
        """Let go of what was needed to look after jobs."""


class LocalProcess:
    """Jobs as child processes, each the leader of a session of its own."""

    detached = False

    def demand(self, profile: str, nodes: int) -> Demand:
        """Nothing of note: one machine has no profiles, and pipelines may name them."""
        return Demand()

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

    async def adopt(self, launch: Launch, process: ProcessId | None, grace: float) -> None:
        """None: a job sees that its service is gone, and leaves; see `Runner`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace
        while process is not None and process.alive() and loop.time() < deadline:
            await asyncio.sleep(0.1)
        if not await asyncio.to_thread(end_job, launch.execution, process):
            raise Unavailable(
                f"an earlier job of {launch.execution} does not end "
                f"(pid {process.pid if process else 'unknown'}); end it by hand"
            )

    async def close(self) -> None:
        """Nothing to let go of."""


class _Child:
    """A child process; its exit shows through a pidfd where there are pidfds."""

    def __init__(self, popen: subprocess.Popen[bytes], execution: str) -> None:
        self._popen = popen
        self._execution = execution
        self._process = ProcessId.of(popen.pid)
        self._oom_kills = oom_kills()

    @property
    def process(self) -> ProcessId | None:
        """None when it was gone at once."""
        return self._process

    async def wait(self) -> Exit:
        """See `Handle`."""
        await self._exited()
        # What it started must not outlive it: the next attempt would meet it.
        await asyncio.to_thread(end_job, self._execution, None)
        before = self._oom_kills
        killed = None if before is None else (oom_kills() or 0) > before
        return Exit(self._popen.wait(), oom_killed=killed)

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

    async def terminate(self) -> None:
        """SIGTERM to the job alone: its children are its own to tell."""
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGTERM)

    async def kill(self) -> None:
        """See `Handle`."""
        await asyncio.to_thread(end_job, self._execution, self._process)

    async def suspend(self) -> bool:
        """False: a process that is stopped keeps its memory; it saves and leaves instead."""
        return False

    async def resume(self) -> None:
        """Never asked."""


def _prefer_for_oom(pid: int) -> None:
    """When memory runs out, the kernel should take the job and not the service."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("500", encoding="ascii")
