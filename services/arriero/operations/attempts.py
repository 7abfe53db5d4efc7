"""The life of one execution: attempt after attempt, until something is final.

Responsibility: start jobs, hold and judge them, retry, take up what an earlier
service left, publish. Never two jobs of an execution at once. Does not know
operations, that is, who waits, nor where jobs run, nor what lies where (`staging`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from arriero.errors import ArrieroError, Cancelled, Internal, Unavailable
from arriero.operations import logs
from arriero.operations.delivery import failure
from arriero.operations.endings import Ending, Next, ending_of, reason_of
from arriero.operations.handoff import EXIT_FAILED, Assignment, Outcome, to_json, type_name
from arriero.operations.kinds import WorkKind
from arriero.operations.publishing import publish
from arriero.operations.queue import JobQueue, Place
from arriero.operations.records import ExecutionRecord, JobRecord, Records, Result, State, now
from arriero.operations.runner import Exit, Handle, Launch, Runner
from arriero.operations.staging import Staging
from arriero.rpc.parent import ProcessId
from arriero.rpc.status import to_status
from arriero.store import Store
from arriero.store.files import os_errors

_log = logging.getLogger(__name__)
# How often it is looked whether a store that was away is back.
_STORE_SECONDS = 5.0
# How often the log of work that runs is brought to a store elsewhere.
_LOG_SECONDS = 10.0
# A job of an earlier service sees its death within two seconds.
_WATCHDOG_SECONDS = 3.0


def default_backoff(attempts: int) -> float:
    """Seconds to wait after so many attempts: 1, 2, 4 ... at most 60."""
    return float(min(60, 2 ** max(0, attempts - 1)))


@dataclass
class Execution:
    """An execution while the service runs.

    `stop` is set to interrupt whatever it waits for: because it is cancelled
    (then the record says so) or because the service ends. `turned` is set when it
    was paused or resumed. `waits_for` says what its job waits for before it runs.
    `heir_of` are executions of the same work that ended without a result, newest
    first: it goes on from the checkpoints of one. `received` counts the lines that
    came from each machine of the current attempt.
    """

    record: ExecutionRecord
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    turned: asyncio.Event = field(default_factory=asyncio.Event)
    token: str = ""
    waits_for: ArrieroError | None = None
    heir_of: tuple[str, ...] = ()
    received: dict[int, int] = field(default_factory=dict)
    publishing: bool = False
    task: asyncio.Task[None] | None = None


class _Suspended(Exception):
    """The service ends; the record stays as it is for the next one."""


@dataclass
class Attempts:
    """Runs executions.

    Attributes:
        service: name, for the store's directories.
        queue: who may start a job now.
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
    queue: JobQueue
    ended: Callable[[Execution], None]
    backoff: Callable[[int], float] = default_backoff
    job_grace: float = 15.0
    report_address: str = ""

    def __post_init__(self) -> None:
        apart = self.runner.detached and self.store.remote
        self._staging = Staging(self.service, self.store, self.records, apart=apart)

    async def run(self, execution: Execution) -> None:
        """Bring an execution to its end, or to the service's."""
        record = execution.record
        log = asyncio.create_task(self._keep_log(record))
        if record.cancelled:  # by an earlier service, which did not get to the end of it
            execution.stop.set()
        try:
            done, left = False, record.attempt > 0
            while not done:
                try:
                    await self.records.bring_log(record.id)
                    if execution.heir_of:
                        await asyncio.to_thread(self._staging.inherit, record, execution.heir_of)
                        execution.heir_of = ()
                    if left:
                        done, left = await self._resume(execution), False
                    else:
                        self._check(execution)
                        done = await self._attempt(execution)
                except Unavailable as error:
                    if not self.store.remote:
                        raise
                    # Nothing is lost but time, and nothing is known to be wrong.
                    self._staging.mark(
                        record, f"goes on when the store does: {error.message}", "WARNING"
                    )
                    await self._unless_stopped(execution, asyncio.sleep(_STORE_SECONDS))
                    left = bool(record.jobs) and record.jobs[-1].attempt == record.attempt
        except _Suspended:
            _log.info("%s of %s is left for the next start", record.kind, record.id)
        except Cancelled as error:
            self._end(execution, State.CANCELLED, error)
        except ArrieroError as error:
            self._end(execution, State.FAILED, error)
        except Exception as error:
            _log.exception("execution %s failed in the service", record.id)
            self._end(execution, State.FAILED, Internal(f"{type(error).__name__}: {error}"))
        log.cancel()
        with contextlib.suppress(asyncio.CancelledError, ArrieroError):
            await log
        if record.state.ended and await self._recorded(execution):
            await asyncio.to_thread(self._staging.clean, record)

    async def _recorded(self, execution: Execution) -> bool:
        """Whether the end is in the store, elsewhere too: only then may what led to it go."""
        while self.store.remote:
            try:
                await self.records.keep(execution.record)
                break
            except ArrieroError as error:
                _log.warning("the end of %s is not recorded: %s", execution.record.id, error)
            if execution.stop.is_set():
                return False
            await self._unless_stopped(execution, asyncio.sleep(_STORE_SECONDS))
        return True

    async def _keep_log(self, record: ExecutionRecord) -> None:
        """Let the log outlive this machine, now and then and at the end."""
        seen = -1
        while self.store.remote:
            path = self.records.log_path(record.id)
            size = path.stat().st_size if path.exists() else 0
            try:
                if size > max(0, seen):
                    await asyncio.to_thread(self.records.keep_log, record.id)
                    seen = size
                await asyncio.sleep(_LOG_SECONDS)
            except ArrieroError as error:
                _log.warning("the log of %s could not be kept: %s", record.id, error)
                await asyncio.sleep(_LOG_SECONDS)

    # One attempt

    async def _attempt(self, execution: Execution) -> bool:
        record = execution.record
        await self._while_paused(execution)
        place = self._place(execution)
        try:
            await self._unless_stopped(execution, self.queue.take(place))
            if record.paused:
                return False
            await asyncio.to_thread(self.store.preflight, record.disk_bytes)
            self._check(execution)
            left = await self._run_job(execution, place)
        finally:
            execution.waits_for = None
            self.queue.give_back(place)
        self._check(execution, outcome=await self._staging.told(record))
        return await self._conclude(execution, left)

    def _place(self, execution: Execution) -> Place:
        record = execution.record
        demand = self.runner.demand(record.profile, record.nodes)
        return self.queue.place(record.owner, demand, self._teller(execution))

    async def _run_job(self, execution: Execution, place: Place) -> Exit:
        record = execution.record
        record.attempt += 1
        execution.token = secrets.token_urlsafe(24)
        execution.received = {0: 0}
        assignment = self._assignment(execution)
        with os_errors(assignment.directory):
            path = assignment.write()
        if self._staging.apart:
            await asyncio.to_thread(self.store.keep, path)
        self._staging.mark(record, f"attempt {record.attempt} starts", "INFO")
        job = JobRecord(record.attempt, now())
        record.jobs.append(job)
        record.state = State.RUNNING
        record.start_time = record.start_time or job.start_time
        # On disk before there is a job: a restart must know that there may be one.
        await self.records.keep(record)
        try:
            handle = await self.runner.start(self._to_launch(execution))
        except ArrieroError as error:
            failure(record.attempt, error, _log).write(assignment.directory)
            job.end_time = now()
            return Exit(EXIT_FAILED)
        job.process = handle.process
        await self.records.keep(record)
        return await self._see_out(execution, handle, place)

    def _assignment(self, execution: Execution) -> Assignment:
        record = execution.record
        kind = self.kinds[record.kind]
        outlives = self.runner.detached
        return Assignment(
            service=self.service,
            kind=record.kind,
            spec_type=type_name(kind.spec_type),
            spec=record.spec,
            inputs=record.inputs,
            store=self.store.url,
            staging=str(self._staging.of(record)),
            execution=record.id,
            attempt=record.attempt,
            run=record.run,
            stage=record.stage,
            report_address=self.report_address,
            report_token=execution.token,
            service_process=None if outlives else ProcessId.of(os.getpid()),
            watch_service=not outlives,
            detached=self._staging.apart,
            last_failure=reason_of(record.jobs[-1].status) if record.jobs else "",
        )

    def _to_launch(self, execution: Execution) -> Launch:
        record = execution.record
        path = self._staging.assignment(record)
        place = (
            f"{self.store.url}/{path.relative_to(self.store.root)}" if self._staging.apart else path
        )
        return Launch(
            self.kinds[record.kind].job_module,
            place,
            record.id,
            self.records.log_path(record.id),
            attempt=record.attempt,
            profile=record.profile,
            nodes=record.nodes,
            facts={"run": record.run, "stage": record.stage, "owner": record.owner},
            tell=self._teller(execution),
        )

    def _teller(self, execution: Execution) -> Callable[[ArrieroError | None], None]:
        """Keeps what a job waits for, and writes it to the log when it changed."""

        def tell(waits_for: ArrieroError | None) -> None:
            if waits_for is not None and str(waits_for) != str(execution.waits_for):
                level = "INFO" if waits_for.reason == "QUEUED" else "WARNING"
                self._staging.mark(execution.record, waits_for.message, level)
            execution.waits_for = waits_for

        return tell

    async def _see_out(self, execution: Execution, handle: Handle, place: Place) -> Exit:
        """Wait for a job's end; hold it while it is paused, stop it when it is to stop."""
        record = execution.record
        waiting = asyncio.ensure_future(handle.wait())
        stopped = asyncio.ensure_future(execution.stop.wait())
        held = False
        try:
            while not waiting.done() and not execution.stop.is_set():
                if record.paused and not held:
                    held = await handle.suspend()
                    if not held:
                        await self._send_away(handle, waiting)
                        return replace(await waiting, evicted="its run was paused")
                    self.queue.give_back(place)
                elif held and not record.paused:
                    await self._unless_stopped(execution, self.queue.take(place))
                    await asyncio.to_thread(self._staging.forget_outcome, record)
                    await handle.resume()
                    held = False
                turned = asyncio.ensure_future(execution.turned.wait())
                await asyncio.wait({waiting, stopped, turned}, return_when=asyncio.FIRST_COMPLETED)
                turned.cancel()
                execution.turned.clear()
            if not waiting.done():
                if record.cancelled:
                    await handle.kill()
                elif self.runner.detached:
                    raise _Suspended
                else:
                    await self._send_away(handle, waiting)
            left = await waiting
            record.jobs[-1].end_time = now()
            return left
        finally:
            execution.waits_for = None
            stopped.cancel()
            if not waiting.done():
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await waiting

    async def _send_away(self, handle: Handle, waiting: asyncio.Future[Exit]) -> None:
        """Let a job save and leave; end it when it does not."""
        await handle.terminate()
        await asyncio.wait({waiting}, timeout=self.job_grace)
        if not waiting.done():
            await handle.kill()
        await asyncio.wait({waiting})

    async def _while_paused(self, execution: Execution) -> None:
        while execution.record.paused:
            await self._unless_stopped(execution, execution.turned.wait())
            execution.turned.clear()

    # What follows

    async def _resume(self, execution: Execution) -> bool:
        """Take up what an earlier service left; whether that ended it."""
        record = execution.record
        job = record.jobs[-1]
        left = Exit(None)
        if not job.end_time:
            launch = self._to_launch(execution)
            handle = await self._adopt(execution, launch, job)
            if handle is not None:
                self._staging.mark(
                    record, f"attempt {record.attempt} goes on after a restart", "INFO"
                )
                execution.token = await asyncio.to_thread(self._staging.token, record)
                place = self._place(execution)
                self.queue.hold(place)
                try:
                    left = await self._see_out(execution, handle, place)
                finally:
                    self.queue.give_back(place)
            job.end_time = now()
        self._check(execution, outcome=await self._staging.told(record))
        if job.status is not None and await self._staging.told(record) is None:
            return False  # judged already: the next attempt was due
        return await self._conclude(execution, left)

    async def _adopt(self, execution: Execution, launch: Launch, job: JobRecord) -> Handle | None:
        """What an earlier service started; a wish to cancel does not keep it from being found."""
        adopting = asyncio.ensure_future(self.runner.adopt(launch, job.process, _WATCHDOG_SECONDS))
        stopped = asyncio.ensure_future(execution.stop.wait())
        await asyncio.wait({adopting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not adopting.done() and not execution.record.cancelled:
            adopting.cancel()
            raise _Suspended
        return await adopting

    async def _conclude(self, execution: Execution, left: Exit) -> bool:
        """Judge the newest attempt; whether that ended the execution."""
        record = execution.record
        outcome = await self._staging.told(record)
        lines: Sequence[str] = []
        if outcome is None:
            self._staging.fill_in(record, left.lines, execution.received.get(0))
            lines = logs.tail(self.records.log_path(record.id)) or left.lines[-3:]
        ending = ending_of(
            left.code,
            outcome,
            lines,
            oom_killed=left.oom_killed,
            evicted=left.evicted,
            problem=left.problem,
        )
        job = record.jobs[-1]
        job.status, job.counted = ending.status, ending.counted
        if ending.next is Next.PUBLISH:
            assert outcome is not None
            await self.records.keep(record)
            await self._publish(execution, outcome)
            return True
        self._staging.mark(record, f"attempt {record.attempt} ended: {ending.message}", "WARNING")
        attempts = self.kinds[record.kind].max_attempts
        if ending.next is Next.FAIL or record.counted >= attempts:
            self._fail(execution, ending)
            return True
        await asyncio.to_thread(self._staging.forget_attempt, record)
        await self.records.keep(record)
        pause = self.backoff(max(1, record.counted))
        await self._unless_stopped(execution, asyncio.sleep(pause))
        return False

    async def _publish(self, execution: Execution, outcome: Outcome) -> None:
        record = execution.record
        execution.publishing = True
        directory = self._staging.attempt(record)
        published = await asyncio.to_thread(
            publish, self.store, self.service, record, outcome, directory
        )
        if record.cacheable and published.reusable:
            digests = {name: artifact.digest for name, artifact in published.artifacts.items()}
            await asyncio.to_thread(
                self.store.put_result, self.service, record.result_key, digests, published.gates
            )
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
            self._staging.mark(record, error.message, "ERROR")
        record.state, record.end_time = state, now()
        if record.jobs and not record.jobs[-1].end_time:
            record.jobs[-1].end_time = record.end_time
        try:
            # A store elsewhere is not waited for: a restart judges again.
            self.records.save(record, durable=not self.store.remote)
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
