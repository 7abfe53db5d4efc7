"""One try of one stage: start its operation, and wait for the end.

Responsibility: attach to the operation that belongs to a `request_id`, follow
it through absences of its service, and stop waiting when told. Does not know
the graph, DBOS, or how a run is recorded.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from google.longrunning import operations_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2

from arriero.errors import ArrieroError, Cancelled, DeadlineExceeded, NotFound
from arriero.rpc.status import to_status
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import types_pb2

# Progress comes with every answer of a long poll; its end comes at once.
POLL_SECONDS = 1.0
FIRST_BACKOFF = 0.2
LONGEST_BACKOFF = 5.0
# A service that lost its records answers NOT_FOUND for an operation that it started.
_RESTARTS = 3
_log = logging.getLogger(__name__)


class OperationCalls(Protocol):
    """What is needed of `clients.Rooms`."""

    async def start(
        self, kind: str, spec: Message, context: types_pb2.StageContext
    ) -> operations_pb2.Operation:
        """Start, or find by `request_id`."""
        ...

    async def wait(self, kind: str, name: str, seconds: float) -> operations_pb2.Operation:
        """The operation when done, or as it is after `seconds`."""
        ...


@dataclass
class Outcome:
    """How a try ended."""

    state: pb.StageState.ValueType
    outputs: list[types_pb2.StageOutput] = field(default_factory=list)
    metadata: types_pb2.OperationMetadata | None = None
    error: status_pb2.Status | None = None


@dataclass(frozen=True, slots=True)
class News:
    """What happened to a try: `waits_for` says what is away; None when nothing is."""

    operation: str = ""
    metadata: types_pb2.OperationMetadata | None = None
    waits_for: status_pb2.Status | None = None


Report = Callable[[News], None]


def failed(error: ArrieroError) -> Outcome:
    """The outcome of a try that ended with an error."""
    return Outcome(pb.STAGE_STATE_FAILED, error=to_status(error))


async def follow_operation(
    calls: OperationCalls,
    kind: str,
    spec: Message,
    context: types_pb2.StageContext,
    *,
    report: Report,
    cancelled: asyncio.Event,
) -> Outcome:
    """Start the work, or attach to it, and wait until it is done.

    A service that is away is waited for without end. When `cancelled` is set the
    wait ends; stopping the operation is the caller's business.
    """
    name = ""
    restarts = 0

    async def once() -> Outcome | None:
        nonlocal name, restarts
        if not name:
            operation = await calls.start(kind, spec, context)
        else:
            try:
                operation = await calls.wait(kind, name, POLL_SECONDS)
            except NotFound:
                restarts += 1
                if restarts > _RESTARTS:
                    raise
                _log.warning("%s: %s is gone; starting it again", context.request_id, name)
                name = ""
                return None
        name = operation.name
        metadata = unpack(operation.metadata, types_pb2.OperationMetadata())
        report(News(name, metadata))
        return outcome_of(operation, metadata) if operation.done else None

    return await patiently(once, report=report, cancelled=cancelled)


async def patiently(
    once: Callable[[], Awaitable[Outcome | None]],
    *,
    report: Report,
    cancelled: asyncio.Event,
) -> Outcome:
    """Call `once` until it has an outcome; what may be tried again is, with backoff."""
    pause = FIRST_BACKOFF
    while not cancelled.is_set():
        try:
            outcome = await once()
        except ArrieroError as error:
            if cancelled.is_set():
                break
            # CANCELLED without our wish: a service that leaves cuts its calls off so.
            if not (error.retryable or isinstance(error, (Cancelled, DeadlineExceeded))):
                return failed(error)
            report(News(waits_for=to_status(error)))
            await pause_or(cancelled, pause)
            pause = min(2 * pause, LONGEST_BACKOFF)
            continue
        pause = FIRST_BACKOFF
        if outcome is not None:
            return outcome
    return Outcome(pb.STAGE_STATE_CANCELLED)


async def pause_or(event: asyncio.Event, seconds: float) -> None:
    """Sleep, but wake when the event is set."""
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return


def outcome_of(
    operation: operations_pb2.Operation, metadata: types_pb2.OperationMetadata
) -> Outcome:
    """What a finished operation says."""
    if operation.HasField("error"):
        cancelled = operation.error.code == code_pb2.CANCELLED
        state = pb.STAGE_STATE_CANCELLED if cancelled else pb.STAGE_STATE_FAILED
        return Outcome(state, list(metadata.outputs), metadata, operation.error)
    result = unpack(operation.response, types_pb2.OperationResult())
    return Outcome(pb.STAGE_STATE_SUCCEEDED, list(result.outputs), metadata)


def unpack(packed: Any, into: Any) -> Any:
    """An Any's content; an empty message where it holds something else."""
    if packed.Is(into.DESCRIPTOR):
        packed.Unpack(into)
    return into
