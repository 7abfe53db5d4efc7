"""Cancelling: operations first, then the workflows, then what people see.

Responsibility: an early end that is told to everybody whom it concerns, however
late they hear of it. Does not know who wished for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import Any

from arriero.errors import ArrieroError, NotFound, Unavailable
from arriero.orchestrator.clients import Rooms, room_of
from arriero.orchestrator.durable import Workflows
from arriero.orchestrator.ledger import Ledger
from arriero.orchestrator.live import LiveRun, attempt_of, operation_name
from arriero.orchestrator.records import ENDED_STAGE
from arriero.orchestrator.stages import LONGEST_BACKOFF, Outcome
from arriero.v1 import orchestrator_pb2 as pb

__all__ = ["Cancellations"]

# A cancelled run is shown as CANCELLED after this, whoever still has to be told.
_CANCEL_SECONDS = 2.5
_log = logging.getLogger(__name__)


class Cancellations:
    """Runs on their way to an early end; used from the event loop alone.

    Args:
        ledger: where every change of state goes.
        rooms: whose operations are told.
        workflows: which end at their next durable call.
    """

    def __init__(self, ledger: Ledger, rooms: Rooms, workflows: Workflows) -> None:
        self._ledger = ledger
        self._rooms = rooms
        self._workflows = workflows
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Stop; what is owed is recorded, and delivered after `begin`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def request(self, live: LiveRun) -> None:
        """Record the wish, then see to it; nothing happens to a run that has ended.

        Raises:
            Unavailable: the database is away; the run goes on.
        """
        record = live.record
        if record.ended or record.cancel_requested:
            return
        record.cancel_requested = True
        record.owed = [
            (s.name, s.operation or operation_name(live.id, s))
            for s in record.run.stages
            if s.state == pb.STAGE_STATE_RUNNING and room_of(s.kind)
        ]
        try:
            self._ledger.save(live)
        except Unavailable:
            record.cancel_requested = False  # whoever wished for it is told, and asks again
            raise
        live.cancelled.set()
        self.begin(live)

    def begin(self, live: LiveRun) -> None:
        """See to a wish that is recorded."""
        self._spawn(self._ledger.surely(live, partial(self._finish, live)))

    def owe(self, live: LiveRun, stage: str, operation: str) -> None:
        """An operation that became known after the cancellation has to be told too."""
        if (stage, operation) not in live.record.owed:
            live.record.owed.append((stage, operation))
            self._delivery(live)
            self._ledger.save(live)

    async def _finish(self, live: LiveRun) -> None:
        """Operations first, then the workflows, then what people see."""
        record = live.record
        live.cancelled.set()
        deadline = time.monotonic() + _CANCEL_SECONDS
        delivery = self._delivery(live)
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

    def _delivery(self, live: LiveRun) -> asyncio.Task[None]:
        return self._spawn(self._ledger.surely(live, partial(self._deliver, live)))

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

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("a background task failed", exc_info=task.exception())
