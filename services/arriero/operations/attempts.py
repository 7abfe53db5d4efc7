"""The life of one execution: attempt after attempt, until something is final.

Responsibility: start jobs, judge their ends, retry, resume after a restart of
the service, publish. Never two jobs of an execution at once. Does not know
operations, that is, who waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from arriero.errors import ArrieroError, Cancelled, Internal, Unavailable
from arriero.operations import logs
from arriero.operations.delivery import failure
from arriero.operations.endings import Ending, Next, ending_of, reason_of
from arriero.operations.handoff import EXIT_FAILED, Assignment, Outcome, to_json, type_name
from arriero.operations.kinds import WorkKind
from arriero.operations.memory import oom_kills
from arriero.operations.publishing import publish
from arriero.operations.records import ExecutionRecord, JobRecord, Records, Result, State, now
from arriero.operations.runner import Handle, Launch, Runner
from arriero.rpc.parent import ProcessId
from arriero.rpc.status import to_status
from arriero.store import Store
from arriero.store.files import os_errors, remove_tree

_log = logging.getLogger(__name__)
# A job of an earlier service sees its death within two seconds.
_WATCHDOG_SECONDS = 3.0


def default_backoff(attempts: int) -> float:
    """Seconds to wait after so many attempts: 1, 2, 4 ... at most 60."""
    return float(min(60, 2 ** max(0, attempts - 1)))


@dataclass
class Execution:
    """An execution while the service runs.

    `stop` is set to interrupt whatever it waits for: because it is cancelled
    (then the record says so) or because the service ends.
    """

    record: ExecutionRecord
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    token: str = ""
    publishing: bool = False
    task: asyncio.Task[None] | None = None


class _Suspended(Exception):
    """The service ends; the record stays as it is for the next one."""


@dataclass
class Attempts:
    """Runs executions.

    Attributes:
        service: name, for the store's directories.
        slots: how many jobs may run at once.
        backoff: seconds to wait after the n-th counted attempt.
        job_grace: seconds that a job gets to save when the service ends.
        report_address: where jobs report; empty for nowhere.
        ended: called when an execution has ended, in the same turn of the loop.
    """

    service: str
    store: Store
    records: Records
    kinds: Mapping[str, WorkKind]
    runner: Runner
    slots: asyncio.Semaphore
    ended: Callable[[Execution], None]
    backoff: Callable[[int], float] = default_backoff
    job_grace: float = 15.0
    report_address: str = ""

    async def run(self, execution: Execution) -> None:
        """Bring an execution to its end, or to the service's."""
        record = execution.record
        try:
            if record.attempt:
                done = await self._resume(execution)
            else:
                done = False
            while not done:
                self._check(execution)
                done = await self._attempt(execution)
        except _Suspended:
            _log.info("%s of %s is left for the next start", record.kind, record.id)
        except Cancelled as error:
            self._end(execution, State.CANCELLED, error)
        except ArrieroError as error:
            self._end(execution, State.FAILED, error)
        except Exception as error:
            _log.exception("execution %s failed in the service", record.id)
            self._end(execution, State.FAILED, Internal(f"{type(error).__name__}: {error}"))
        if record.state.ended:
            await asyncio.to_thread(self._clean, record)

    # One attempt

    async def _attempt(self, execution: Execution) -> bool:
        record = execution.record
        await self._unless_stopped(execution, self.slots.acquire())
        try:
            self._check(execution)
            await asyncio.to_thread(self.store.preflight, record.disk_bytes)
            self._check(execution)
            kills = oom_kills()
            code = await self._run_job(execution)
            killed = None if kills is None else (oom_kills() or 0) > kills
        finally:
            self.slots.release()
        self._check(execution, outcome=self._outcome(record))
        return await self._conclude(execution, code, oom_killed=killed)

    async def _run_job(self, execution: Execution) -> int:
        record = execution.record
        kind = self.kinds[record.kind]
        record.attempt += 1
        execution.token = secrets.token_urlsafe(24)
        assignment = Assignment(
            service=self.service,
            kind=record.kind,
            spec_type=type_name(kind.spec_type),
            spec=record.spec,
            inputs=record.inputs,
            store=str(self.store.root),
            staging=str(self._staging(record)),
            execution=record.id,
            attempt=record.attempt,
            run=record.run,
            stage=record.stage,
            report_address=self.report_address,
            report_token=execution.token,
            service_process=ProcessId.of(os.getpid()),
            last_failure=reason_of(record.jobs[-1].status) if record.jobs else "",
        )
        log = self.records.log_path(record.id)
        with os_errors(assignment.directory):
            launch = Launch(kind.job_module, assignment.write(), record.id, log)
        self._mark(record, f"attempt {record.attempt} starts", "INFO")
        job = JobRecord(record.attempt, now())
        record.jobs.append(job)
        record.state = State.RUNNING
        record.start_time = record.start_time or job.start_time
        # On disk before there is a job: a restart must know that there may be one.
        self.records.save(record)
        try:
            handle = await self.runner.start(launch)
        except Unavailable as error:
            failure(record.attempt, error, _log).write(assignment.directory)
            job.end_time = now()
            return EXIT_FAILED
        job.process = handle.process
        self.records.save(record)
        code = await self._watch(execution, handle)
        job.end_time = now()
        return code

    async def _watch(self, execution: Execution, handle: Handle) -> int:
        """Wait for a job's end; stop it when the execution is to stop."""
        waiting = asyncio.ensure_future(handle.wait())
        stopped = asyncio.ensure_future(execution.stop.wait())
        try:
            await asyncio.wait({waiting, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done() and not execution.record.cancelled:
                handle.terminate()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(waiting), self.job_grace)
            if not waiting.done():
                await handle.kill()
            return await waiting
        finally:
            stopped.cancel()

    # What follows

    async def _resume(self, execution: Execution) -> bool:
        """Take up what an earlier service left; whether that ended it."""
        record = execution.record
        job = record.jobs[-1]
        if not job.end_time:
            await self.runner.clear(record.id, job.process, _WATCHDOG_SECONDS)
            job.end_time = now()
        self._check(execution, outcome=self._outcome(record))
        if job.status is not None and self._outcome(record) is None:
            return False  # judged already: the next attempt was due
        return await self._conclude(execution, None)

    async def _conclude(
        self, execution: Execution, code: int | None, *, oom_killed: bool | None = None
    ) -> bool:
        """Judge the newest attempt; whether that ended the execution."""
        record = execution.record
        outcome = self._outcome(record)
        lines = [] if outcome else logs.tail(self.records.log_path(record.id))
        ending = ending_of(code, outcome, lines, oom_killed=oom_killed)
        job = record.jobs[-1]
        job.status, job.counted = ending.status, ending.counted
        if ending.next is Next.PUBLISH:
            assert outcome is not None
            self.records.save(record)
            await self._publish(execution, outcome)
            return True
        self._mark(record, f"attempt {record.attempt} ended: {ending.message}", "WARNING")
        attempts = self.kinds[record.kind].max_attempts
        if ending.next is Next.FAIL or record.counted >= attempts:
            self._fail(execution, ending)
            return True
        await asyncio.to_thread(self._forget_attempt, record)
        self.records.save(record)
        pause = self.backoff(max(1, record.counted))
        await self._unless_stopped(execution, asyncio.sleep(pause))
        return False

    async def _publish(self, execution: Execution, outcome: Outcome) -> None:
        record = execution.record
        execution.publishing = True
        directory = self._staging(record) / "attempts" / str(record.attempt)
        published = await asyncio.to_thread(
            publish, self.store, self.service, record, outcome, directory
        )
        if record.cacheable and published.reusable:
            digests = {name: artifact.digest for name, artifact in published.artifacts.items()}
            self.store.put_result(self.service, record.result_key, digests, published.gates)
        record.result = published.result()
        error = published.error()
        if error is None:
            self._end(execution, State.SUCCEEDED, None)
        else:
            self._end(execution, State.FAILED, error)

    def _fail(self, execution: Execution, ending: Ending) -> None:
        execution.record.result = Result(error=ending.status)
        self._end(execution, State.FAILED, None)

    def _end(self, execution: Execution, state: State, error: ArrieroError | None) -> None:
        record = execution.record
        if error is not None:
            record.result.error = to_json(to_status(error))
            self._mark(record, error.message, "ERROR")
        record.state, record.end_time = state, now()
        if record.jobs and not record.jobs[-1].end_time:
            record.jobs[-1].end_time = record.end_time
        try:
            self.records.save(record)
        except ArrieroError:  # a full disk: memory knows, and a restart judges again
            _log.exception("the end of %s could not be recorded", record.id)
        self.ended(execution)

    # Pieces

    def _check(self, execution: Execution, *, outcome: Outcome | None = None) -> None:
        """Leave when the execution is to stop; a finished job is published first."""
        if execution.record.cancelled:
            raise Cancelled("cancelled; nothing was published")
        if execution.stop.is_set() and (outcome is None or not outcome.ok):
            raise _Suspended

    async def _unless_stopped(self, execution: Execution, work: Awaitable[object]) -> None:
        waiting = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(execution.stop.wait())
        try:
            await asyncio.wait({waiting, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                return
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
        finally:
            stopped.cancel()
        self._check(execution)

    def _outcome(self, record: ExecutionRecord) -> Outcome | None:
        """The newest attempt's outcome; one of an earlier attempt is never looked at."""
        outcome = Outcome.read(Outcome.path(self._staging(record), record.attempt))
        return outcome if outcome is not None and outcome.attempt == record.attempt else None

    def _staging(self, record: ExecutionRecord) -> Path:
        return self.store.staging(self.service, record.id)

    def _mark(self, record: ExecutionRecord, message: str, level: str) -> None:
        log = self.records.log_path(record.id)
        with contextlib.suppress(OSError):
            logs.mark(log, message, attempt=record.attempt, stage=record.stage, level=level)

    def _forget_attempt(self, record: ExecutionRecord) -> None:
        """Remove what an attempt wrote for itself; its outcome stays as evidence."""
        directory = self._staging(record) / "attempts" / str(record.attempt)
        for name in ("outputs", "scratch"):
            remove_tree(directory / name)

    def _clean(self, record: ExecutionRecord) -> None:
        """Checkpoints of work that did not succeed stay for a retry, until gc."""
        staging = self._staging(record)
        try:
            checkpoints = staging / "checkpoints"
            kept = checkpoints.is_dir() and any(checkpoints.iterdir())
            if record.state is State.SUCCEEDED or not kept:
                remove_tree(staging)
            else:
                remove_tree(staging / "attempts")
        except OSError as error:
            _log.warning("staging of %s was not removed: %s", record.id, error)


def inherit_checkpoints(source: Path, target: Path) -> bool:
    """Move the checkpoints of work that ended to the same work's next execution."""
    old, new = source / "checkpoints", target / "checkpoints"
    if not old.is_dir() or new.exists():
        return False
    old.rename(new)
    shutil.rmtree(source, ignore_errors=True)
    return True
