"""Pausing: a run that is held, and every operation of it.

Responsibility: record the wish, and bring operations to it, those too that are
heard of later or forgot. Does not know who wished for it.
"""

from __future__ import annotations

import asyncio
import logging

from arriero.errors import ArrieroError, FailedPrecondition, Unavailable
from arriero.orchestrator.clients import Rooms, room_of
from arriero.orchestrator.ledger import Ledger
from arriero.orchestrator.live import LiveRun
from arriero.v1 import orchestrator_pb2 as pb

__all__ = ["Pauses"]

_log = logging.getLogger(__name__)


class Pauses:
    """Runs that are held or go on; used from the event loop alone.

    Args:
        ledger: where every change goes.
        rooms: whose operations are told.
    """

    def __init__(self, ledger: Ledger, rooms: Rooms) -> None:
        self._ledger = ledger
        self._rooms = rooms
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Stop; whoever was not told is told by its next word."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def request(self, live: LiveRun, *, paused: bool) -> None:
        """Record the wish, then tell what runs.

        Raises:
            FailedPrecondition: the run has ended.
            Unavailable: the database is away; the run stays as it is.
        """
        run = live.record.run
        if live.record.ended or live.record.cancel_requested:
            raise FailedPrecondition(f"run {live.id} has ended; retry it instead")
        if run.paused == paused:
            return
        run.paused = paused
        try:
            self._ledger.save(live)
        except Unavailable:
            run.paused = not paused
            raise
        for status in run.stages:
            if status.state == pb.STAGE_STATE_RUNNING and status.operation:
                self._tell(live, status)

    def heard(self, live: LiveRun, status: pb.StageStatus) -> None:
        """Tell an operation that is not as its run is; called with each word of it."""
        if status.operation and status.metadata.paused != live.record.run.paused:
            self._tell(live, status)

    @staticmethod
    async def over(live: LiveRun) -> None:
        """Until the run is not paused, or is cancelled."""
        while live.record.run.paused and not live.cancelled.is_set():
            await live.changed()

    def _tell(self, live: LiveRun, status: pb.StageStatus) -> None:
        if not room_of(status.kind):
            return  # ours: a deployment is not held
        told = self._deliver(live, status.kind, status.operation)
        task = asyncio.get_running_loop().create_task(told)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deliver(self, live: LiveRun, kind: str, operation: str) -> None:
        try:
            await self._rooms.pause(kind, operation, paused=live.record.run.paused)
        except ArrieroError as error:
            _log.info("pausing or resuming %s waits: %s", operation, error.message)
