"""Operations of one service: started, waited for, held, cancelled, ended.

Responsibility: who waits for which execution, and what becomes of their operations.
Does not know how work is taken in (`admission`), how an execution is brought to its
end (`attempts`), nor any kind of work.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from google.longrunning import operations_pb2
from google.protobuf.message import Message

from arriero.errors import (
    ArrieroError,
    Cancelled,
    DataLoss,
    InvalidArgument,
    NotFound,
)
from arriero.operations.admission import Admission
from arriero.operations.attempts import Attempts, Execution, default_backoff
from arriero.operations.handoff import to_json
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
from arriero.operations.views import operation_message
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
        self._done: dict[str, asyncio.Event] = {}
        self._executions = {r.id: Execution(r) for r in self._records.executions()}
        self.reports = Reports(self._records, self._executions)
        self._operations = {r.id: r for r in self._records.operations()}
        self._admission = Admission(
            service=service,
            store=store,
            records=self._records,
            kinds=self._kinds,
            sources=sources,
            runner=self._runner,
            queue=self._queue,
            operations=self._operations,
            executions=self._executions,
            launch=self._launch,
            hold=self._hold,
            waiting=self._waiting,
        )
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
        self._admission.closing = True
        tasks = [e.task for e in self._executions.values() if e.task is not None]
        for execution in self._executions.values():
            execution.stop.set()
        await asyncio.gather(*tasks, *self._admission.starting, return_exceptions=True)
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
        if context.validate_only:
            return await self._admission.validate(kind, spec, context)
        return self._view(await self._admission.start(kind, spec, context))

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
        async with self._admission.writing(operation.id):
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
