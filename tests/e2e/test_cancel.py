"""A run can be cancelled at each of its stages, and leaves nothing half-done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from arriero.v1 import orchestrator_pb2 as pb

STAGES = ("base", "rows", "sft", "tuned", "quants", "best", "live")


@pytest.mark.parametrize("stage", STAGES)
def test_cancel_stops_the_stage(
    stage: str,
    platform: Any,
    tiny_pipeline: Callable[..., Path],
    tmp_path: Path,
    wait_until: Callable[..., Any],
) -> None:
    path = tiny_pipeline(tmp_path, name="cancelled")
    body = yaml.safe_load(path.read_text())
    for item in body["stages"]:
        # Everything before comes from the store; the stage itself must not.
        item["force"] = item["name"] == stage
        if item["name"] == "sft" and stage == "sft":
            item["train"]["max_steps"] = 100_000
        if item["name"] == "live":
            item["deploy"]["replicas"] = 3
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    with platform.client() as client:
        before = {a.digest for a in client.artifacts.list()}
        run = client.create_run(path)

        def state() -> pb.StageStatus:
            return next(s for s in client.get_run(run.id).stages if s.name == stage)

        def begun() -> int | None:
            now = state().state
            return now if now != pb.STAGE_STATE_PENDING else None

        assert wait_until(begun, what=f"{stage} starts") == pb.STAGE_STATE_RUNNING
        known = {
            o.digest for s in client.get_run(run.id).stages if s.name != stage for o in s.outputs
        }
        client.cancel_run(run.id)
        ended = client.wait(run.id, timeout=400)
        assert ended.state == pb.RUN_STATE_CANCELLED
        found = next(s for s in ended.stages if s.name == stage)
        assert found.state == pb.STAGE_STATE_CANCELLED
        wait_until(lambda: not jobs(platform), 300, "the job's end")
        made = {a.digest for a in client.artifacts.list()} - before - known
        assert made == set()
        after = STAGES[STAGES.index(stage) + 1 :]
        states = {s.name: s.state for s in ended.stages}
        assert all(
            states[name] in (pb.STAGE_STATE_CANCELLED, pb.STAGE_STATE_SKIPPED) for name in after
        )


def jobs(platform: Any) -> list[Any]:
    found: list[Any] = platform.processes(".job")
    return found


def test_a_cancelled_run_can_be_taken_up_again(
    platform: Any, tiny_pipeline: Callable[..., Path], tmp_path: Path, wait_until: Any
) -> None:
    path = tiny_pipeline(tmp_path, name="again", live=None)
    with platform.client() as client:
        run = client.create_run(path)
        client.cancel_run(run.id)
        assert client.wait(run.id, timeout=400).state == pb.RUN_STATE_CANCELLED
        client.retry_run(run.id)
        assert client.wait(run.id, timeout=400).state == pb.RUN_STATE_SUCCEEDED
