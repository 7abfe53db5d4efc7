"""The two durable workflows behind a run: the run itself, and one child per stage and try.

Responsibility: from a round that begins to its last state, through crashes. Does
not know what a stage does inside, nor how DBOS keeps its promises.

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
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

from google.rpc import status_pb2

from arriero.errors import ArrieroError
from arriero.orchestrator import graph as graphs
from arriero.orchestrator.cancelling import Cancellations
from arriero.orchestrator.clients import Rooms
from arriero.orchestrator.durable import Workflows
from arriero.orchestrator.endpoints import Endpoints
from arriero.orchestrator.inputs import Published
from arriero.orchestrator.ledger import Ledger
from arriero.orchestrator.live import LiveRun, attempt_of
from arriero.orchestrator.pausing import Pauses
from arriero.orchestrator.records import ENDED_STAGE
from arriero.orchestrator.stages import News, Outcome, failed, follow_operation, patiently
from arriero.rpc.status import to_status
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import pipeline_pb2, types_pb2

__all__ = ["Driver"]

RUN_WORKFLOW = "arriero.run"
STAGE_WORKFLOW = "arriero.stage"
_log = logging.getLogger(__name__)


class Driver:
    """Moves the runs of one orchestrator on; used from its event loop alone.

    Args:
        ledger: where every change of state goes.
        database_url: DBOS's database.
        rooms: who does the stages.
        endpoints: where deploy stages deploy to.

    Attributes:
        cancellations: runs on their way to an early end.
        pauses: runs that are held.
    """

    def __init__(
        self, ledger: Ledger, database_url: str, rooms: Rooms, endpoints: Endpoints
    ) -> None:
        self._ledger = ledger
        self._rooms = rooms
        self._endpoints = endpoints
        self._workflows = Workflows(
            database_url, {RUN_WORKFLOW: self._run_workflow, STAGE_WORKFLOW: self._stage_workflow}
        )
        self.cancellations = Cancellations(ledger, rooms, self._workflows)
        self.pauses = Pauses(ledger, rooms)

    async def open(self) -> None:
        """Recover: every active run goes on where it was.

        Raises:
            FailedPrecondition: the database cannot be used.
        """
        active = self._ledger.load()
        await self._workflows.launch()
        for live in active:
            if not live.record.ended:
                await self.start(live)
            if live.record.cancel_requested:
                self.cancellations.begin(live)

    async def close(self) -> None:
        """Stop waiting; operations go on, and `open` attaches to them again."""
        await self.cancellations.close()
        await self.pauses.close()
        await self._workflows.close()

    async def start(self, live: LiveRun) -> None:
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
                ended = partial(self._ledger.end_stage, live, stage, number, Outcome(state))
                await self._ledger.surely(live, ended)
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

        async def work() -> None:
            if attempt_of(status) != number or status.state in ENDED_STAGE:
                return
            self._ledger.begin_stage(live, status)
            try:
                outcome = await self._do(live, stage, number, outputs, cancelled)
            except ArrieroError as error:
                outcome = failed(error)
            except Exception as error:
                _log.exception("stage %s of run %s failed by a defect", stage, run)
                outcome = Outcome(pb.STAGE_STATE_FAILED, error=to_status(error))
            await self._ledger.end_stage(live, stage, number, outcome)

        await self._ledger.surely(live, work)
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

        await self.pauses.over(live)
        if node.kind != "deploy":
            context = types_pb2.StageContext(
                request_id=request_id,
                run=live.id,
                stage=stage,
                owner=owner,
                force=node.stage.force,
                resources=node.stage.resources,
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
        await self._ledger.surely(live, partial(self._end, live, number))

    async def _end(self, live: LiveRun, number: int) -> None:
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

    def _report(self, live: LiveRun, stage: str, number: int, news: News) -> None:
        status = live.record.stage(stage)
        current = attempt_of(status) == number and status.state not in ENDED_STAGE
        if current:
            self._ledger.report(live, status, news)
            if news.metadata is not None:
                self.pauses.heard(live, status)
        if news.operation and live.record.cancel_requested and attempt_of(status) == number:
            self.cancellations.owe(live, stage, news.operation)


def _plain(outputs: Sequence[types_pb2.StageOutput]) -> list[list[str]]:
    """Outputs as DBOS records them: name, digest, kind."""
    return [[o.name, o.digest, o.kind] for o in outputs]
