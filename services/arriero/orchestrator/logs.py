"""Log lines of a run, from the services that keep them.

Responsibility: which operations to read, and going on after a service was away.
Does not know how lines are kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from arriero.errors import NotFound, Unavailable
from arriero.orchestrator.clients import Rooms
from arriero.orchestrator.live import LiveRun
from arriero.orchestrator.records import ENDED_STAGE
from arriero.v1 import job_pb2

_PAUSE_SECONDS = 1.0
# Lines that wait for a slow reader; then the services wait too.
_QUEUE = 1000


async def read_logs(
    rooms: Rooms, live: LiveRun, stages: Sequence[str], *, follow: bool
) -> AsyncIterator[tuple[str, job_pb2.LogLine]]:
    """Lines with their stage: stage after stage, or all at once with `follow`.

    A stage that was never started has none.
    """
    if not follow:
        for stage in stages:
            status = live.record.stage(stage)
            if status.operation:
                async for line in _lines(rooms, status.kind, status.operation, follow=False):
                    yield stage, line
        return
    queue: asyncio.Queue[tuple[str, job_pb2.LogLine] | None] = asyncio.Queue(_QUEUE)

    async def tail(stage: str) -> None:
        try:
            kind, operation = await _operation(live, stage)
            if operation:
                async for line in _lines(rooms, kind, operation, follow=True):
                    await queue.put((stage, line))
        finally:
            await queue.put(None)

    tasks = [asyncio.create_task(tail(stage)) for stage in stages]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            else:
                yield item
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _operation(live: LiveRun, stage: str) -> tuple[str, str]:
    """The stage's operation, once it has one; empty when it ends without."""
    while True:
        status = live.record.stage(stage)
        if status.operation or status.state in ENDED_STAGE or live.record.ended:
            return status.kind, status.operation
        await live.changed()


async def _lines(
    rooms: Rooms, kind: str, operation: str, *, follow: bool
) -> AsyncIterator[job_pb2.LogLine]:
    after = 0
    while True:
        try:
            async for line in rooms.read_logs(kind, operation, after, follow=follow):
                after = line.number
                yield line
            return
        except NotFound:
            return
        except Unavailable:
            if not follow:
                raise
            await asyncio.sleep(_PAUSE_SECONDS)
