"""Following one operation, with a room that exists only as two calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from google.longrunning import operations_pb2

from arriero.errors import (
    ArrieroError,
    Cancelled,
    DeadlineExceeded,
    DiskFull,
    GateFailed,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from arriero.orchestrator import stages
from arriero.orchestrator.stages import News, Outcome, follow_operation
from arriero.rpc import from_status, to_status
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import training_pb2, types_pb2

DIGEST = "sha256:" + "a" * 64


def operation(error: ArrieroError | None = None, *, done: bool = True) -> Any:
    made = operations_pb2.Operation(name="operations/1", done=done)
    made.metadata.Pack(types_pb2.OperationMetadata(kind="train", attempt=2))
    if error is not None:
        made.error.CopyFrom(to_status(error))
    elif done:
        output = types_pb2.StageOutput(name="adapter", digest=DIGEST, kind="adapter")
        made.response.Pack(types_pb2.OperationResult(outputs=[output]))
    return made


class Room:
    """Answers from a list; exceptions are raised. The last answer repeats."""

    def __init__(self, *answers: Any, then: Callable[[], None] = lambda: None) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []
        self.then = then

    def _next(self, what: str) -> Any:
        self.asked.append(what)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if len(self.answers) == 1:
            self.then()
        if isinstance(answer, ArrieroError):
            raise answer
        return answer

    async def start(self, kind: str, spec: Any, context: Any) -> Any:
        return self._next(f"start {context.request_id}")

    async def wait(self, kind: str, name: str, seconds: float) -> Any:
        return self._next(f"wait {name}")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "FIRST_BACKOFF", 0.001)


async def follow(
    room: Room, news: list[News] | None = None, cancelled: asyncio.Event | None = None
) -> Outcome:
    return await follow_operation(
        room,
        "train",
        training_pb2.TrainSpec(),
        types_pb2.StageContext(request_id="r/s/1"),
        report=(news if news is not None else []).append,
        cancelled=cancelled or asyncio.Event(),
    )


async def test_work_is_started_once_and_waited_for():
    room = Room(operation(done=False), operation(done=False), operation())
    news: list[News] = []
    outcome = await follow(room, news)
    assert room.asked == ["start r/s/1", "wait operations/1", "wait operations/1"]
    assert outcome.state == pb.STAGE_STATE_SUCCEEDED
    assert outcome.outputs[0].digest == DIGEST
    assert [n.operation for n in news] == ["operations/1"] * 3


@pytest.mark.parametrize(
    "error",
    [
        Unavailable("away"),
        DeadlineExceeded("late"),
        ResourceExhausted("queue is full"),
        Cancelled("the service cut its calls off"),
    ],
)
async def test_what_passes_is_waited_out_and_shown(error):
    news: list[News] = []
    room = Room(error, error, operation(done=False), error, operation())
    outcome = await follow(room, news)
    assert outcome.state == pb.STAGE_STATE_SUCCEEDED
    assert room.asked[:3] == ["start r/s/1"] * 3
    shown = [n.waits_for.message if n.waits_for else "" for n in news]
    assert shown == [error.message, error.message, "", error.message, ""]


@pytest.mark.parametrize("error", [InvalidArgument("no"), DiskFull("full", needed=2, free=1)])
async def test_what_does_not_pass_ends_the_stage(error):
    outcome = await follow(Room(error))
    assert outcome.state == pb.STAGE_STATE_FAILED
    assert outcome.error is not None
    assert type(from_status(outcome.error)) is type(error)


async def test_the_operations_own_error_is_kept_whole():
    outcome = await follow(Room(operation(GateFailed("merge.delta failed"))))
    assert outcome.state == pb.STAGE_STATE_FAILED
    assert outcome.error is not None
    assert isinstance(from_status(outcome.error), GateFailed)
    assert outcome.metadata is not None
    assert outcome.metadata.attempt == 2


async def test_a_service_that_forgot_the_operation_is_asked_again_but_not_forever():
    room = Room(operation(done=False), NotFound("gone"), operation())
    assert (await follow(room)).state == pb.STAGE_STATE_SUCCEEDED
    assert room.asked == ["start r/s/1", "wait operations/1", "start r/s/1"]
    answers = [operation(done=False), NotFound("gone")] * 5
    assert (await follow(Room(*answers))).state == pb.STAGE_STATE_FAILED


async def test_a_wish_to_cancel_ends_the_wait():
    cancelled = asyncio.Event()
    room = Room(Unavailable("away"), Unavailable("away"), then=cancelled.set)
    outcome = await asyncio.wait_for(follow(room, cancelled=cancelled), 120)
    assert outcome.state == pb.STAGE_STATE_CANCELLED
