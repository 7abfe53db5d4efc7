"""Runs: from a pipeline to its last stage, through crashes, cancels and retries.

Responsibility: a run's states and the two durable workflows behind them (the
run, and one child per stage and try). Does not know what a stage does inside,
nor how DBOS keeps its promises.

A stage's workflow has the ID `<run>/<stage>/<try>`, which is its operation's
`request_id` too. It first awaits, by ID and one after the other, the stages that
it depends on; then it does its one step: start or re-attach, and wait. DBOS
tells the steps of a workflow apart by their order alone, so parallel branches
inside one workflow would get each other's results after a crash; separate
workflows do not. What people see (state, progress) is kept in `records`, written
when a state changes and always before DBOS learns of it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, cast

from google.rpc import status_pb2

from arriero.errors import (
    AlreadyExists,
    ArrieroError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
)
from arriero.metrics import Metrics
from arriero.orchestrator import graph as graphs
from arriero.orchestrator import previews, waiving
from arriero.orchestrator.clients import Rooms, room_of
from arriero.orchestrator.durable import Workflows
from arriero.orchestrator.endpoints import Endpoints
from arriero.orchestrator.inputs import Published
from arriero.orchestrator.ledger import Ledger, new_record
from arriero.orchestrator.live import LiveRun, attempt_of, operation_name
from arriero.orchestrator.logs import read_logs
from arriero.orchestrator.planning import Planner
from arriero.orchestrator.records import ENDED_STAGE, Records
from arriero.orchestrator.stages import (
    LONGEST_BACKOFF,
    News,
    Outcome,
    failed,
    follow_operation,
    patiently,
)
from arriero.rpc.status import to_status
from arriero.store import Store
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import pipeline_pb2, types_pb2

RUN_WORKFLOW = "arriero.run"
STAGE_WORKFLOW = "arriero.stage"
RETENTION_SECONDS = 7 * 24 * 3600.0
# A cancelled run is shown as CANCELLED after this, whoever still has to be told.
_CANCEL_SECONDS = 2.5
_DEFAULT_PAGE, _MAX_PAGE = 50, 500
_log = logging.getLogger(__name__)


class Runs:
    """The runs of one orchestrator; used from its event loop alone.

    Args:
        records: where runs are remembered.
        database_url: DBOS's database.
        store: for references, tags and pins.
        rooms: who does the stages.
        endpoints: where deploy stages deploy to.
        metrics: what is counted.
        retention: seconds after its end for which a run's artifacts are kept.
    """

    def __init__(
        self,
        records: Records,
        database_url: str,
        store: Store,
        rooms: Rooms,
        endpoints: Endpoints,
        metrics: Metrics,
        *,
        retention: float = RETENTION_SECONDS,
    ) -> None:
        self._ledger = Ledger(records, store, metrics, retention)
        self._store = store
        self._rooms = rooms
        self._endpoints = endpoints
        self._planner = Planner(rooms, endpoints.check)
        self._tasks: set[asyncio.Task[None]] = set()
        self._workflows = Workflows(
            database_url, {RUN_WORKFLOW: self._run_workflow, STAGE_WORKFLOW: self._stage_workflow}
        )

    async def open(self) -> None:
        """Recover: every active run goes on where it was.

        Raises:
            FailedPrecondition: the database cannot be used.
        """
        active = self._ledger.load()
        await self._workflows.launch()
        for live in active:
            if not live.record.ended:
                await self._start(live)
            if live.record.cancel_requested:
                self._spawn(self._finish_cancel(live))

    async def close(self) -> None:
        """Stop waiting; operations go on, and `open` attaches to them again."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._workflows.close()

    # The API

    async def plan(self, pipeline: pipeline_pb2.Pipeline, *, owner: str) -> pb.Run:
        """What `create` would start: no id, and each stage as far as it is known.

        Raises:
            InvalidArgument, NotFound, FailedPrecondition: as `create`.
            Unavailable: a service is away, so that its stages are not known.
        """
        graph, references = await self._ledger.check(pipeline)
        stages = await self._planner.plan(graph, references, owner=owner, strict=True)
        return pb.Run(pipeline=pipeline, stages=stages, owner=owner)

    async def preview(
        self, request: pb.PreviewStageRequest, *, owner: str
    ) -> pb.PreviewStageResponse:
        """What a dataset stage would make of its first rows; see `previews.preview`."""
        graph, references = await self._ledger.check(request.pipeline)
        return await previews.preview(
            request, graph, references, self._planner, self._rooms, owner=owner
        )

    async def create(
        self, pipeline: pipeline_pb2.Pipeline, *, request_id: str, owner: str
    ) -> pb.Run:
        """Check a pipeline and start it; the same `request_id` gives the same run.

        Raises:
            InvalidArgument: everything that is wrong, by field path.
            NotFound: a reference to no artifact.
            FailedPrecondition: a quarantined artifact.
            AlreadyExists: `request_id` was used for another pipeline.
        """
        digest = hashlib.sha256(pipeline.SerializeToString(deterministic=True)).hexdigest()
        known = self._by_request(request_id, digest)
        if known is not None:
            return known
        graph, references = await self._ledger.check(pipeline)
        # What a room would refuse is refused now; one that is away is asked later.
        await self._planner.plan(graph, references, owner=owner, strict=False)
        record = new_record(pipeline, graph, references, request_id, digest, owner)
        try:
            live = await self._ledger.create(record)
        except AlreadyExists:
            known = self._by_request(request_id, digest)
            if known is None:
                raise
            return known
        await self._start(live)
        return live.record.seen()

    def _by_request(self, request_id: str, digest: str) -> pb.Run | None:
        known = self._ledger.records.run_by_request(request_id) if request_id else None
        if known is None:
            return None
        if known.request_digest != digest:
            raise AlreadyExists(
                f"request_id {request_id!r} started run {known.run.id} of another pipeline; "
                "take a new request_id"
            )
        return self.get(known.run.id)

    def get(self, run_id: str) -> pb.Run:
        """A run as it is now.

        Raises:
            NotFound: no such run.
        """
        return self._ledger.of(run_id).record.seen()

    def list(self, size: int, token: str) -> tuple[list[pb.Run], str]:
        """A page of runs, newest first, and the next page's token (empty: none).

        Raises:
            InvalidArgument: not a token of ours, or a negative size.
        """
        if size < 0:
            raise InvalidArgument.field("page_size", f"{size} is below 0")
        if token and not token.isdigit():
            raise InvalidArgument.field("page_token", f"{token!r} is not a page token")
        found, following = self._ledger.list(
            min(size or _DEFAULT_PAGE, _MAX_PAGE), int(token) if token else None
        )
        return found, str(following) if following is not None else ""

    def live(self, run_id: str) -> LiveRun:
        """A run to be watched.

        Raises:
            NotFound: no such run.
        """
        return self._ledger.of(run_id)

    async def cancel(self, run_id: str) -> pb.Run:
        """Stop what runs, start no more; CANCELLED within seconds.

        Raises:
            NotFound: no such run.
        """
        live = self._ledger.of(run_id)
        record = live.record
        if not record.ended and not record.cancel_requested:
            record.cancel_requested = True
            record.owed = [
                (s.name, s.operation or operation_name(live.id, s))
                for s in record.run.stages
                if s.state == pb.STAGE_STATE_RUNNING and room_of(s.kind)
            ]
            self._ledger.save(live)
            live.cancelled.set()
            self._spawn(self._finish_cancel(live))
        return record.seen()

    async def retry(
        self,
        run_id: str,
        *,
        request_id: str,
        waivers: Sequence[pb.GateWaiver] = (),
        who: str = "local",
    ) -> pb.Run:
        """Start again what did not succeed; of waived stages the verdict alone is repeated.

        Raises:
            NotFound: no such run.
            FailedPrecondition: it is active, or nothing is left to do, or a gate
                that is waived did not fail.
            InvalidArgument: a waiver without a reason, of no such gate or stage.
        """
        live = self._ledger.of(run_id)
        record = live.record
        if request_id and request_id in record.rounds[1:]:
            return record.seen()
        if not record.ended:
            raise FailedPrecondition(
                f"run {run_id} is active; cancel it first, or wait for its end"
            )
        if record.run.state == pb.RUN_STATE_SUCCEEDED:
            raise FailedPrecondition(f"run {run_id} succeeded; there is nothing to retry")
        waived = waiving.check(record.run, waivers)
        if waived:
            await asyncio.to_thread(waiving.waive, self._store, record.run, waived, who)
            if not record.ended:  # somebody else was faster
                raise FailedPrecondition(f"run {run_id} was started again meanwhile; watch it")
        live = await self._ledger.begin_round(live, request_id, waived, who)
        await self._start(live)
        return record.seen()

    async def logs(
        self, run_id: str, stage: str, *, follow: bool
    ) -> AsyncIterator[tuple[str, Any]]:
        """Log lines of a run's stages, each with its stage's name.

        Raises:
            NotFound: no such run, or no such stage in it.
        """
        live = self._ledger.of(run_id)
        names = [s.name for s in live.record.run.stages]
        if stage and stage not in names:
            raise NotFound(f"run {run_id} has no stage {stage!r}; stages: {', '.join(names)}")
        async for name, line in read_logs(
            self._rooms, live, [stage] if stage else names, follow=follow
        ):
            yield name, line

    # The workflows

    async def _run_workflow(self, argument: dict[str, Any]) -> dict[str, Any]:
        """All stages at once, each in a workflow of its own; then the end."""
        run, stages = argument["run"], argument["stages"]
        live = self._ledger.of(run)
        tries = dict(stages)
        for name, number in stages:
            deps = live.graph.nodes[name].depends_on
            await self._workflows.start(
                STAGE_WORKFLOW,
                f"{run}/{name}/{number}",
                {
                    "run": run,
                    "stage": name,
                    "try": number,
                    "waits": [[dep, tries[dep]] for dep in deps if dep in tries],
                    "known": {
                        dep: _plain(live.record.stage(dep).outputs)
                        for dep in deps
                        if dep not in tries
                    },
                },
            )
        for name, number in stages:
            await live.settled(name, number)
            await self._workflows.result(f"{run}/{name}/{number}")
        await self._workflows.step("finish", self._finish, run, argument["round"])
        return {}

    async def _stage_workflow(self, argument: dict[str, Any]) -> dict[str, Any]:
        run, stage, number = argument["run"], argument["stage"], argument["try"]
        live = self._ledger.of(run)
        outputs: dict[str, Any] = dict(argument["known"])
        for dep, dep_try in argument["waits"]:
            await live.settled(dep, dep_try)
            outcome = await self._workflows.result(f"{run}/{dep}/{dep_try}")
            if outcome["state"] != pb.STAGE_STATE_SUCCEEDED:
                cancelled = live.record.cancel_requested
                state = pb.STAGE_STATE_CANCELLED if cancelled else pb.STAGE_STATE_SKIPPED
                await self._ledger.end_stage(live, stage, number, Outcome(state))
                return {"state": state, "outputs": []}
            outputs[dep] = outcome["outputs"]
        result: dict[str, Any] = await self._workflows.step(
            "work", self._work, run, stage, number, outputs
        )
        return result

    async def _work(
        self, run: str, stage: str, number: int, outputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The one step of a stage; done again after a crash, so it attaches."""
        live = self._ledger.of(run)
        cancelled = live.cancelled
        status = live.record.stage(stage)
        if attempt_of(status) == number and status.state not in ENDED_STAGE:
            self._ledger.begin_stage(live, status)
            try:
                outcome = await self._do(live, stage, number, outputs, cancelled)
            except ArrieroError as error:
                outcome = failed(error)
            except Exception as error:
                _log.exception("stage %s of run %s failed by a defect", stage, run)
                outcome = Outcome(pb.STAGE_STATE_FAILED, error=to_status(error))
            await self._ledger.end_stage(live, stage, number, outcome)
        return {"state": status.state, "outputs": _plain(status.outputs)}

    async def _do(
        self,
        live: LiveRun,
        stage: str,
        number: int,
        outputs: Mapping[str, Any],
        cancelled: asyncio.Event,
    ) -> Outcome:
        node = live.graph.nodes[stage]
        handed_on = {dep: [Published(*item) for item in items] for dep, items in outputs.items()}
        work = graphs.substitute(node, live.record.references, handed_on)
        request_id = f"{live.id}/{stage}/{number}"
        owner = live.record.run.owner

        def report(news: News) -> None:
            self._report(live, stage, number, news)

        if node.kind != "deploy":
            context = types_pb2.StageContext(
                request_id=request_id,
                run=live.id,
                stage=stage,
                owner=owner,
                force=node.stage.force,
                labels=live.record.run.pipeline.labels,
            )
            return await follow_operation(
                self._rooms, node.kind, work, context, report=report, cancelled=cancelled
            )

        async def deploy() -> Outcome:
            gates = await self._endpoints.deploy(
                request_id,
                cast(pipeline_pb2.DeploySpec, work),
                run=live.id,
                owner=owner,
                cancelled=cancelled,
            )
            return Outcome(
                pb.STAGE_STATE_SUCCEEDED,
                metadata=types_pb2.OperationMetadata(kind="deploy", gates=gates),
            )

        return await patiently(deploy, report=report, cancelled=cancelled)

    async def _finish(self, run: str, number: int) -> None:
        """Tags when all is well, then the run's last state. Done again after a crash."""
        live = self._ledger.of(run)
        record = live.record
        if record.ended or record.cancel_requested or len(record.rounds) != number:
            return
        stages = live.record.run.stages
        broken = sorted(
            (s for s in stages if s.state == pb.STAGE_STATE_FAILED),
            key=lambda s: s.end_time.ToNanoseconds(),
        )
        state, error = pb.RUN_STATE_SUCCEEDED, None
        if broken:
            state, error = pb.RUN_STATE_FAILED, status_pb2.Status()
            error.CopyFrom(broken[0].error)
            error.message = f"stage {broken[0].name!r}: {error.message}"
        elif any(s.state == pb.STAGE_STATE_CANCELLED for s in stages):
            state = pb.RUN_STATE_CANCELLED
        else:
            try:
                await asyncio.to_thread(self._ledger.tag, live.record)
            except ArrieroError as problem:
                state, error = pb.RUN_STATE_FAILED, to_status(problem)
        await self._ledger.end_run(live, state, error)

    async def _start(self, live: LiveRun) -> None:
        """Start the round's workflow, unless it exists."""
        record = live.record
        stages = [
            [name, attempt_of(record.stage(name))]
            for name in live.graph.order
            if record.stage(name).state != pb.STAGE_STATE_SUCCEEDED
        ]
        await self._workflows.start(
            RUN_WORKFLOW,
            f"{live.id}/{len(record.rounds)}",
            {"run": live.id, "round": len(record.rounds), "stages": stages},
        )

    def _report(self, live: LiveRun, stage: str, number: int, news: News) -> None:
        status = live.record.stage(stage)
        current = attempt_of(status) == number and status.state not in ENDED_STAGE
        if current:
            self._ledger.report(live, status, news)
        if news.operation and live.record.cancel_requested and attempt_of(status) == number:
            self._owe(live, stage, news.operation)

    # Cancelling

    def _owe(self, live: LiveRun, stage: str, operation: str) -> None:
        """An operation that became known after the cancellation has to be told too."""
        if (stage, operation) not in live.record.owed:
            live.record.owed.append((stage, operation))
            self._ledger.save(live)
            self._spawn(self._deliver(live))

    async def _finish_cancel(self, live: LiveRun) -> None:
        """Operations first, then the workflows, then what people see."""
        record = live.record
        live.cancelled.set()
        deadline = time.monotonic() + _CANCEL_SECONDS
        delivery = self._spawn(self._deliver(live))
        await asyncio.wait({delivery}, timeout=_CANCEL_SECONDS)
        running = [
            asyncio.create_task(live.settled(s.name, attempt_of(s)))
            for s in record.run.stages
            if s.state == pb.STAGE_STATE_RUNNING
        ]
        if running:
            await asyncio.wait(running, timeout=max(0.1, deadline - time.monotonic()))
            for task in running:
                task.cancel()
        if record.ended:
            return
        await self._workflows.cancel(
            [
                f"{live.id}/{len(record.rounds)}",
                *(
                    f"{live.id}/{s.name}/{attempt_of(s)}"
                    for s in record.run.stages
                    if s.state not in ENDED_STAGE
                ),
            ]
        )
        for status in record.run.stages:
            await self._ledger.end_stage(
                live, status.name, attempt_of(status), Outcome(pb.STAGE_STATE_CANCELLED)
            )
        await self._ledger.end_run(live, pb.RUN_STATE_CANCELLED, None)

    async def _deliver(self, live: LiveRun) -> None:
        """Tell every owed operation; a service that is away is told when it is back."""
        pause = 0.2
        while live.record.owed:
            for stage, operation in list(live.record.owed):
                kind = live.record.stage(stage).kind
                try:
                    await self._rooms.cancel(kind, operation)
                except NotFound:
                    pass  # it never was, or is forgotten: nothing runs
                except ArrieroError as error:
                    _log.info("cancelling %s waits: %s", operation, error.message)
                    continue
                if (stage, operation) in live.record.owed:
                    live.record.owed.remove((stage, operation))
                    self._ledger.save(live)
            if live.record.owed:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_BACKOFF)
        self._ledger.forget(live)

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("a background task failed", exc_info=task.exception())


def _plain(outputs: Sequence[types_pb2.StageOutput]) -> list[list[str]]:
    """Outputs as DBOS records them: name, digest, kind."""
    return [[o.name, o.digest, o.kind] for o in outputs]
