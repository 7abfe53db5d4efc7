"""A run in memory: its record, its graph, and who waits for news of it.

Responsibility: let coroutines wait for a change, a stage's end, or the wish to
cancel. Does not know what changes a run, and writes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import cached_property

from arriero.operations.intake import operation_id
from arriero.orchestrator import graph as graphs
from arriero.orchestrator.clients import room_of
from arriero.orchestrator.records import ENDED_STAGE, RunRecord
from arriero.v1 import orchestrator_pb2 as pb

# Watchers hear at most twice a second.
WATCH_SECONDS = 0.5


def attempt_of(status: pb.StageStatus) -> int:
    """The stage's `try`, which Python takes for a keyword."""
    return int(getattr(status, "try"))


def operation_name(run: str, status: pb.StageStatus) -> str:
    """What the operation is called, had its start arrived without our hearing of it."""
    request_id = f"{run}/{status.name}/{attempt_of(status)}"
    return f"operations/{operation_id(room_of(status.kind), request_id)}"


class LiveRun:
    """One run; all methods belong to the event loop."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.cancelled = asyncio.Event()
        if record.cancel_requested:
            self.cancelled.set()
        self._changed = asyncio.Event()

    @property
    def id(self) -> str:
        """The run's id."""
        return self.record.run.id

    @cached_property
    def graph(self) -> graphs.Graph:
        """The pipeline's graph."""
        return graphs.build(self.record.run.pipeline)

    def tell(self) -> None:
        """Wake everybody who waits for a change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def changed(self) -> None:
        """The next change."""
        await self._changed.wait()

    async def settled(self, stage: str, number: int) -> None:
        """Until this try of the stage ended (or a later one began)."""
        while True:
            status = self.record.stage(stage)
            if attempt_of(status) != number or status.state in ENDED_STAGE:
                return
            await self._changed.wait()

    async def watch(self) -> AsyncIterator[pb.Run]:
        """The run as it is, then whenever it changed, until its end."""
        last = ""
        while True:
            changed = self._changed
            run = self.record.seen()
            if run.etag != last:
                last = run.etag
                yield run
            if self.record.ended:
                return
            await changed.wait()
            if not self.record.ended:
                await asyncio.sleep(WATCH_SECONDS)
