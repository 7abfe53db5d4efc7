"""How work is taken in: found, joined, answered from the store, or begun.

Responsibility: of one service, that a request makes one operation, equal work is
done once, and what is answered is written down. Does not know how work is done,
nor how operations end.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from google.longrunning import operations_pb2
from google.protobuf.message import Message

from arriero.errors import AlreadyExists, InvalidArgument, Unavailable
from arriero.operations import intake
from arriero.operations.attempts import Execution
from arriero.operations.handoff import to_json
from arriero.operations.intake import Work
from arriero.operations.kinds import WorkKind
from arriero.operations.queue import JobQueue
from arriero.operations.records import ExecutionRecord, OperationRecord, Records, State, now
from arriero.operations.runner import Runner
from arriero.operations.views import fill_result, result_of
from arriero.rpc.auth import caller
from arriero.settings import SourceSettings
from arriero.store import Store
from arriero.v1 import types_pb2


@dataclass
class Admission:
    """Takes requests in.

    Attributes:
        service: name, for the store's directories.
        operations: by id; what is taken in is added once it is written down.
        executions: by id; as `operations`.
        launch: called with an execution to be begun.
        hold: called when others wait for an execution than before.
        waiting: who waits for an execution.
        closing: nothing is taken in any more, nor begun.
        starting: what is being taken in, whole when it is done.
    """

    service: str
    store: Store
    records: Records
    kinds: Mapping[str, WorkKind]
    sources: SourceSettings
    runner: Runner
    queue: JobQueue
    operations: dict[str, OperationRecord]
    executions: dict[str, Execution]
    launch: Callable[[Execution], None]
    hold: Callable[[Execution], None]
    waiting: Callable[[str], list[OperationRecord]]
    closing: bool = False
    starting: set[asyncio.Task[OperationRecord]] = field(default_factory=set)

    def __post_init__(self) -> None:
        # By request and by result: one at a time is looked up and written down.
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def writing(self, operation_id: str) -> asyncio.Lock:
        """Held while an operation is changed by who asked for it."""
        return self._lock(f"request {operation_id}")

    async def start(
        self, kind: str, spec: Message, context: types_pb2.StageContext
    ) -> OperationRecord:
        """Start work, or find the operation of the same request; see `Engine.start`."""
        intake.check_context(context)
        known_kind = self._known(kind)
        profile, nodes = self._resources(spec, context)
        starting = asyncio.create_task(self._start(known_kind, spec, context, profile, nodes))
        self.starting.add(starting)
        starting.add_done_callback(self.starting.discard)
        # Whoever asked may leave: what was begun is whole when the request comes again.
        return await asyncio.shield(starting)

    async def _start(
        self,
        kind: WorkKind,
        spec: Message,
        context: types_pb2.StageContext,
        profile: str,
        nodes: int,
    ) -> OperationRecord:
        request_id = context.request_id or str(uuid.uuid4())
        operation_id = intake.operation_id(self.service, request_id)
        digest = intake.request_digest(kind.name, spec, context)
        async with self.writing(operation_id):
            record = self.operations.get(operation_id)
            if record is None:
                template = OperationRecord(
                    id=operation_id,
                    service=self.service,
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
                lease = await asyncio.to_thread(self.store.lease, "operations", named)
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

    def _known(self, kind: str) -> WorkKind:
        found = self.kinds.get(kind)
        if found is None:
            raise InvalidArgument.field("kind", f"{kind!r} is none of {', '.join(self.kinds)}")
        return found

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
        self.queue.check(self.runner.demand(profile, int(nodes)))
        return profile, int(nodes)

    async def validate(
        self, kind: str, spec: Message, context: types_pb2.StageContext
    ) -> operations_pb2.Operation:
        """What `start` would do, without doing it; raises what it would."""
        intake.check_context(context)
        known_kind = self._known(kind)
        self._resources(spec, context)
        work = await asyncio.to_thread(intake.resolve, known_kind, spec, self.store, self.sources)
        known = await asyncio.to_thread(
            intake.known_result, self.store, self.service, work, force=context.force
        )
        metadata = types_pb2.OperationMetadata(
            kind=known_kind.name,
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
        work = await asyncio.to_thread(intake.resolve, kind, spec, self.store, self.sources)
        record.result_key = work.key
        record.inputs = work.inputs
        record.disk_bytes = work.resolved.disk_bytes
        record.memory_bytes = work.resolved.memory_bytes
        async with self._lock(f"result {work.key}"):
            if not await self._answer(record, work, force=force):
                await asyncio.to_thread(self.store.preflight, work.resolved.disk_bytes)
                await self._execute(record, work, force=force, profile=profile, nodes=nodes)
        return record

    async def _answer(self, record: OperationRecord, work: Work, *, force: bool) -> bool:
        """Answer from the store, or join the same work in flight, where that is possible."""
        while True:
            if self.closing:
                raise Unavailable("the service is stopping; ask again", reason="DRAINING")
            running = self._joinable(work)
            known = await asyncio.to_thread(
                intake.known_result, self.store, self.service, work, force=force
            )
            if known is not None:
                record.cached, record.state, record.end_time = True, State.SUCCEEDED, now()
                record.result = result_of(known.artifacts, known.gates)
                await self.records.keep(record)
                self.operations[record.id] = record
                return True
            if running is None:
                return False  # nor has it begun meanwhile: the lock is held
            if running is self._joinable(work):
                await self._join(record, running)
                return True

    def _joinable(self, work: Work) -> Execution | None:
        """The same work, in flight."""
        for execution in self.executions.values():
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
        await self.records.keep(execution.record)
        self._wait_for(record, execution.record)
        await self.records.keep(record)
        self.operations[record.id] = record
        self.executions[execution.record.id] = execution
        if not self.closing:
            self.launch(execution)

    async def _join(self, record: OperationRecord, execution: Execution) -> None:
        self._wait_for(record, execution.record)
        # At once: the work must not be cancelled by others, who leave meanwhile.
        self.operations[record.id] = record
        try:
            self.hold(execution)
            await self.records.keep(record)
        except BaseException:
            del self.operations[record.id]
            if self.waiting(execution.record.id):
                self.hold(execution)
            elif not execution.record.state.ended:  # the others left
                execution.record.cancelled = True
                execution.stop.set()
            raise

    def _wait_for(self, record: OperationRecord, execution: ExecutionRecord) -> None:
        record.execution = execution.id
        record.staging = f"staging/{self.service}/{execution.id}"

    def _ended_before(self, record: ExecutionRecord) -> tuple[str, ...]:
        """Executions of the same work that ended, newest first."""
        return tuple(
            other.record.id
            for other in reversed(self.executions.values())
            if other.record.result_key == record.result_key and other.record.state.ended
        )
