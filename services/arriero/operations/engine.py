"""Operations of one service: started once, shared, waited for, cancelled.

Responsibility: who asked for what, and which execution answers it. Does not
know how an execution is brought to its end (`attempts`), nor any kind of work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import uuid
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

from google.longrunning import operations_pb2
from google.protobuf.message import Message

from arriero.errors import (
    AlreadyExists,
    ArrieroError,
    Cancelled,
    DataLoss,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from arriero.operations import intake
from arriero.operations.attempts import Attempts, Execution, default_backoff
from arriero.operations.handoff import to_json
from arriero.operations.intake import Work
from arriero.operations.kinds import WorkKind
from arriero.operations.queue import JobQueue
from arriero.operations.records import (
    ExecutionRecord,
    OperationRecord,
    Records,
    Result,
    State,
    now,
)
from arriero.operations.reports import Reports
from arriero.operations.runner import LocalProcess, Runner
from arriero.operations.views import fill_result, operation_message, result_of
from arriero.rpc.auth import caller
from arriero.rpc.status import to_status
from arriero.settings import SourceSettings
from arriero.store import Store
from arriero.v1 import types_pb2

_log = logging.getLogger(__name__)


class Engine:
    """The operations of one service; its records' only writer. `reports` takes what jobs say.

    Args:
        service: name, for the store's directories.
        store: where inputs are, and outputs go.
        kinds: of work that the service does.
        sources: files that rooms may read.
        runner: where jobs run; default: on this machine.
        max_jobs: jobs at once; more wait as PENDING.
        gpus: of all jobs together; 0: as many as they ask for.
        per_owner: jobs of one owner at once; 0: as many as there may be.
        backoff: seconds to wait after the n-th failed attempt.
        job_grace: seconds that a job gets to save when the service ends.

    Raises:
        FailedPrecondition, DataLoss: records of a newer version, or damaged.
    """

    def __init__(
        self,
        *,
        service: str,
        store: Store,
        kinds: Sequence[WorkKind],
        sources: SourceSettings,
        runner: Runner | None = None,
        max_jobs: int = 2,
        gpus: int = 0,
        per_owner: int = 0,
        backoff: Callable[[int], float] = default_backoff,
        job_grace: float = 15.0,
    ) -> None:
        self._service = service
        self._store = store
        self._kinds = {kind.name: kind for kind in kinds}
        self._sources = sources
        self._records = Records(store, service)
        self._runner = runner or LocalProcess()
        self._queue = JobQueue(max_jobs, gpus=gpus, per_owner=per_owner)
        self._attempts = Attempts(
            service=service,
            store=store,
            records=self._records,
            kinds=self._kinds,
            runner=self._runner,
            queue=self._queue,
            ended=self._on_end,
            backoff=backoff,
            job_grace=job_grace,
        )
        self._closing = False
        # By request and by result: one at a time is looked up and written down.
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._starting: set[asyncio.Task[OperationRecord]] = set()
        self._done: dict[str, asyncio.Event] = {}
        self._executions = {r.id: Execution(r) for r in self._records.executions()}
        self.reports = Reports(self._records, self._executions)
        self._operations = {r.id: r for r in self._records.operations()}
        self._reconcile()

    # The service's life

    @property
    def store(self) -> Store:
        """Where inputs are."""
        return self._store

    @property
    def sources(self) -> SourceSettings:
        """What rooms may read."""
        return self._sources

    async def recover(self, report_address: str = "") -> None:
        """Take up every execution that has not ended; returns at once.

        `report_address` is where this service's jobs report their progress.
        """
        self._attempts.report_address = report_address
        for execution in self._executions.values():
            if not execution.record.state.ended and execution.task is None:
                self._launch(execution)

    async def close(self) -> None:
        """Tell running jobs to save and leave; their operations go on at the next start."""
        self._closing = True
        tasks = [e.task for e in self._executions.values() if e.task is not None]
        for execution in self._executions.values():
            execution.stop.set()
        await asyncio.gather(*tasks, *self._starting, return_exceptions=True)
        await self._runner.close()

    def _reconcile(self) -> None:
        """Bring operations and executions together again after a crash between two writes."""
        for operation in self._operations.values():
            if operation.state.ended:
                continue
            execution = self._executions.get(operation.execution)
            if execution is None:
                error = DataLoss(f"the record of {operation.execution} is gone; run it again")
                self._finish(operation, State.FAILED, Result(error=to_json(to_status(error))))
            elif execution.record.state.ended:
                self._adopt_end(operation, execution.record)
        for execution in self._executions.values():
            record = execution.record
            if not record.state.ended and record.kind not in self._kinds:
                error = DataLoss(f"this build does not do {record.kind!r}; use the one that began")
                record.state, record.end_time = State.FAILED, now()
                record.result = Result(error=to_json(to_status(error)))
                self._records.save(record)
                self._on_end(execution)
            elif not record.state.ended:
                # When nobody waits, only its job is to be cleared away.
                record.cancelled = record.cancelled or not self._waiting(record.id)
                record.paused = self._paused(record.id)

    # Starting

    async def start(
        self, kind: str, spec: Message, context: types_pb2.StageContext
    ) -> operations_pb2.Operation:
        """Start work, or find the operation that the same request started before.

        With `context.validate_only` the answer has no name: its metadata hold
        the key, the estimate, and the outputs when the store has them.

        Raises:
            InvalidArgument, NotFound, FailedPrecondition: the request is wrong.
            AlreadyExists: the request id was used for other work.
            DiskFull: the work needs more space than there is.
            Unavailable: the service is stopping, or the store is away.
        """
        intake.check_context(context)
        known_kind = self._kinds.get(kind)
        if known_kind is None:
            raise InvalidArgument.field("kind", f"{kind!r} is none of {', '.join(self._kinds)}")
        if context.validate_only:
            return await self._validate(known_kind, spec, context)
        profile, nodes = self._resources(spec, context)
        starting = asyncio.create_task(self._start(known_kind, spec, context, profile, nodes))
        self._starting.add(starting)
        starting.add_done_callback(self._starting.discard)
        # Whoever asked may leave: what was begun is whole when the request comes again.
        return self._view(await asyncio.shield(starting))

    async def _start(
        self,
        kind: WorkKind,
        spec: Message,
        context: types_pb2.StageContext,
        profile: str,
        nodes: int,
    ) -> OperationRecord:
        request_id = context.request_id or str(uuid.uuid4())
        operation_id = intake.operation_id(self._service, request_id)
        digest = intake.request_digest(kind.name, spec, context)
        async with self._lock(f"request {operation_id}"):
            record = self._operations.get(operation_id)
            if record is None:
                template = OperationRecord(
                    id=operation_id,
                    service=self._service,
                    kind=kind.name,
                    request_id=request_id,
                    request_digest=digest,
                    result_key="",
                    execution="",
                    inputs={},
                    run=context.run,
                    stage=context.stage,
                    owner=context.owner or caller(),
                    labels=dict(context.labels),
                    create_time=now(),
                )
                # gc must see the inputs held before it is looked whether they are there.
                named = intake.named_digests(spec)
                lease = await asyncio.to_thread(self._store.lease, "operations", named)
                try:
                    record = await self._accept(
                        template, kind, spec, force=context.force, profile=profile, nodes=nodes
                    )
                finally:
                    with contextlib.suppress(Unavailable):  # it ends by itself
                        await asyncio.to_thread(lease.release)
            elif record.request_digest != digest:
                raise AlreadyExists(
                    f"request_id {request_id!r} was used for other work ({record.name}, "
                    f"{record.kind}); use a new id for a new request",
                    reason="REQUEST_ID_REUSED",
                    metadata={"operation": record.name},
                )
            return record

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def _resources(self, spec: Message, context: types_pb2.StageContext) -> tuple[str, int]:
        """Name of the resource profile, and machines asked for (0: the work uses one).

        Raises:
            InvalidArgument: two names, no such profile, or one that does not fit.
        """
        own = str(getattr(spec, "resources", ""))
        if own and context.resources and own != context.resources:
            raise InvalidArgument.field(
                "resources", f"is {own!r} here and {context.resources!r} for the stage; name one"
            )
        profile = context.resources or own
        nodes = int(getattr(spec, "nodes", 0)) or ("nodes" in spec.DESCRIPTOR.fields_by_name)
        self._queue.check(self._runner.demand(profile, int(nodes)))
        return profile, int(nodes)

    async def _validate(
        self, kind: WorkKind, spec: Message, context: types_pb2.StageContext
    ) -> operations_pb2.Operation:
        self._resources(spec, context)
        work = await asyncio.to_thread(intake.resolve, kind, spec, self._store, self._sources)
        known = await asyncio.to_thread(
            intake.known_result, self._store, self._service, work, force=context.force
        )
        metadata = types_pb2.OperationMetadata(
            kind=kind.name,
            result_key=work.key,
            cached=known is not None,
            run=context.run,
            stage=context.stage,
            estimate=types_pb2.Estimate(
                disk_bytes=work.resolved.disk_bytes, memory_bytes=work.resolved.memory_bytes
            ),
        )
        if known is not None:
            fill_result(metadata, result_of(known.artifacts, known.gates))
        operation = operations_pb2.Operation()
        operation.metadata.Pack(metadata)
        return operation

    async def _accept(
        self,
        record: OperationRecord,
        kind: WorkKind,
        spec: Message,
        *,
        force: bool,
        profile: str,
        nodes: int,
    ) -> OperationRecord:
        work = await asyncio.to_thread(intake.resolve, kind, spec, self._store, self._sources)
        record.result_key = work.key
        record.inputs = work.inputs
        record.disk_bytes = work.resolved.disk_bytes
        record.memory_bytes = work.resolved.memory_bytes
        async with self._lock(f"result {work.key}"):
            if not await self._answer(record, work, force=force):
                await asyncio.to_thread(self._store.preflight, work.resolved.disk_bytes)
                await self._execute(record, work, force=force, profile=profile, nodes=nodes)
        return record

    async def _answer(self, record: OperationRecord, work: Work, *, force: bool) -> bool:
        """Answer from the store, or join the same work in flight, where that is possible."""
        while True:
            if self._closing:
                raise Unavailable("the service is stopping; ask again", reason="DRAINING")
            running = self._joinable(work)
            known = await asyncio.to_thread(
                intake.known_result, self._store, self._service, work, force=force
            )
            if known is not None:
                record.cached, record.state, record.end_time = True, State.SUCCEEDED, now()
                record.result = result_of(known.artifacts, known.gates)
                await self._records.keep(record)
                self._operations[record.id] = record
                return True
            if running is None:
                return False  # nor has it begun meanwhile: the lock is held
            if running is self._joinable(work):
                await self._join(record, running)
                return True

    def _joinable(self, work: Work) -> Execution | None:
        """The same work, in flight."""
        for execution in self._executions.values():
            other = execution.record
            joinable = not other.state.ended and not other.cancelled and other.cacheable
            if joinable and work.resolved.cacheable and other.result_key == work.key:
                return execution
        return None

    async def _execute(
        self, record: OperationRecord, work: Work, *, force: bool, profile: str, nodes: int
    ) -> None:
        execution = Execution(
            ExecutionRecord(
                id=secrets.token_hex(10),
                kind=work.kind.name,
                result_key=work.key,
                spec=to_json(work.resolved.spec),
                inputs=work.inputs,
                profile=profile,
                nodes=nodes,
                run=record.run,
                stage=record.stage,
                owner=record.owner,
                labels=record.labels,
                cacheable=work.resolved.cacheable,
                disk_bytes=work.resolved.disk_bytes,
                memory_bytes=work.resolved.memory_bytes,
                create_time=now(),
            )
        )
        if not force and work.resolved.cacheable:
            execution.heir_of = self._ended_before(execution.record)
        await self._records.keep(execution.record)
        self._wait_for(record, execution.record)
        await self._records.keep(record)
        self._operations[record.id] = record
        self._executions[execution.record.id] = execution
        if not self._closing:
            self._launch(execution)

    async def _join(self, record: OperationRecord, execution: Execution) -> None:
        self._wait_for(record, execution.record)
        # At once: the work must not be cancelled by others, who leave meanwhile.
        self._operations[record.id] = record
        try:
            self._hold(execution)
            await self._records.keep(record)
        except BaseException:
            del self._operations[record.id]
            if self._waiting(execution.record.id):
                self._hold(execution)
            elif not execution.record.state.ended:  # the others left
                execution.record.cancelled = True
                execution.stop.set()
            raise

    def _wait_for(self, record: OperationRecord, execution: ExecutionRecord) -> None:
        record.execution = execution.id
        record.staging = f"staging/{self._service}/{execution.id}"

    def _ended_before(self, record: ExecutionRecord) -> tuple[str, ...]:
        """Executions of the same work that ended, newest first."""
        return tuple(
            other.record.id
            for other in reversed(self._executions.values())
            if other.record.result_key == record.result_key and other.record.state.ended
        )

    def _launch(self, execution: Execution) -> None:
        execution.task = asyncio.create_task(self._attempts.run(execution))

    # Ending

    def _on_end(self, execution: Execution) -> None:
        for operation in self._operations.values():
            if operation.execution == execution.record.id and not operation.state.ended:
                self._adopt_end(operation, execution.record)
        self.reports.forget(execution.record.id)

    def _adopt_end(self, operation: OperationRecord, record: ExecutionRecord) -> None:
        if operation.cancel_requested and record.state is not State.CANCELLED:
            self._finish_cancelled(operation)
        else:
            self._finish(operation, record.state, record.result)

    def _finish_cancelled(self, operation: OperationRecord) -> None:
        error = Cancelled("cancelled")
        self._finish(operation, State.CANCELLED, Result(error=to_json(to_status(error))))

    def _finish(self, operation: OperationRecord, state: State, result: Result) -> None:
        operation.state, operation.result, operation.end_time = state, result, now()
        try:
            # A store elsewhere is not waited for: a restart adopts the end again.
            self._records.save(operation, durable=not self._store.remote)
        except ArrieroError:  # a full disk: memory knows, and a restart adopts it again
            _log.exception("the end of %s could not be recorded", operation.name)
        event = self._done.pop(operation.id, None)
        if event is not None:
            event.set()

    async def cancel(self, name: str) -> None:
        """Detach whoever started an operation; the last one's leaving stops the work.

        The operation is CANCELLED when nothing of its work runs any more. Does
        nothing to an operation that has ended, or whose results are being
        published already.

        Raises:
            NotFound: no such operation.
        """
        operation = self._find(name)
        if operation.state.ended:
            return
        execution = self._executions[operation.execution]
        if execution.publishing:
            return
        operation.cancel_requested = True
        await self._records.keep(operation)
        if operation.state.ended:
            return
        if self._waiting(execution.record.id):
            self._finish_cancelled(operation)
            self._hold(execution)
            return
        execution.record.cancelled = True
        await self._records.keep(execution.record)
        execution.stop.set()

    async def pause(self, name: str, *, paused: bool) -> None:
        """Hold an operation's work, or let it go on; nothing happens to one that ended.

        Work that several wait for is held when all of them have paused it.

        Raises:
            NotFound: no such operation. Unavailable: the store is away; ask again.
        """
        operation = self._find(name)
        async with self._lock(f"request {operation.id}"):
            if operation.state.ended or operation.paused == paused:
                return
            operation.paused = paused
            try:
                await self._records.keep(operation)
            except BaseException:
                operation.paused = not paused
                raise
            self._hold(self._executions[operation.execution])

    def _hold(self, execution: Execution) -> None:
        """Make an execution as paused as those who wait for it."""
        record = execution.record
        paused = self._paused(record.id)
        if paused != record.paused and not record.state.ended:
            record.paused = paused
            # A store elsewhere is not waited for: a restart asks those who wait again.
            self._records.save(record, durable=not self._store.remote)
            execution.turned.set()

    def _paused(self, execution: str) -> bool:
        waiting = self._waiting(execution)
        return bool(waiting) and all(operation.paused for operation in waiting)

    def _waiting(self, execution: str) -> list[OperationRecord]:
        return [
            operation
            for operation in self._operations.values()
            if operation.execution == execution
            and not operation.state.ended
            and not operation.cancel_requested
        ]

    # Looking

    def get(self, name: str) -> operations_pb2.Operation:
        """An operation as it is now.

        Raises:
            NotFound: no such operation.
        """
        return self._view(self._find(name))

    async def wait(self, name: str, timeout: float | None = None) -> operations_pb2.Operation:
        """An operation when it has ended, or as it is after `timeout` seconds.

        Raises:
            NotFound: no such operation.
        """
        operation = self._find(name)
        if not operation.state.ended:
            event = self._done.setdefault(operation.id, asyncio.Event())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), timeout)
        return self._view(operation)

    def list(
        self, page_size: int = 0, page_token: str = ""
    ) -> tuple[list[operations_pb2.Operation], str]:
        """A page of operations, newest first, and the token of the next (empty: none).

        Raises:
            InvalidArgument: a token that no page gave.
        """
        records: list[OperationRecord] = list(reversed(self._operations.values()))
        first = 0
        if page_token:
            ids = [record.id for record in records]
            if page_token not in ids:
                raise InvalidArgument.field("page_token", "was not given by an earlier page")
            first = ids.index(page_token) + 1
        size = min(page_size, 1000) if page_size > 0 else 100
        page = records[first : first + size]
        more = page[-1].id if len(records) > first + size else ""
        return [self._view(record) for record in page], more

    async def log_path(self, name: str) -> Path | None:
        """The kept log of an operation; None when the store had its result.

        Raises:
            NotFound: no such operation. Unavailable: the store is away.
        """
        execution = self._find(name).execution
        if not execution:
            return None
        await self._records.bring_log(execution)
        return self._records.log_path(execution)

    def _find(self, name: str) -> OperationRecord:
        record = self._operations.get(name.removeprefix("operations/"))
        if record is None or not name.startswith("operations/"):
            raise NotFound(f"no operation {name!r} at the {self._service} service")
        return record

    def _view(self, record: OperationRecord) -> operations_pb2.Operation:
        execution = self._executions.get(record.execution)
        if execution is None:
            return operation_message(record, None)
        return operation_message(record, execution.record, execution.waits_for)
