"""The loss curve of a run that is watched."""

import pytest
from rich.console import Console

from arriero.cli import watch
from arriero.cli.curve import Curve
from arriero.v1 import orchestrator_pb2 as pb


def lines_of(curve: Curve, **size: int) -> list[str]:
    return curve.draw(**size).plain.splitlines()


def dots(line: str) -> list[int]:
    """Columns of a line that hold dots."""
    return [i for i, sign in enumerate(line[8:]) if "\u2801" <= sign <= "\u28ff"]


def test_a_falling_loss_is_drawn_from_the_upper_left_to_the_lower_right():
    curve = Curve()
    for step in range(1, 41):
        curve.add(step, 4.0 - step / 20, 4.0 - step / 20)
    lines = lines_of(curve, width=48, height=7)
    assert len(lines) == 7
    assert lines[0].startswith(" 3.950 ┤")
    assert lines[5].startswith(" 2.000 ┤")
    assert lines[6].split() == ["step", "1", "40"]
    firsts = [min(dots(line)) for line in lines[:6]]
    assert firsts == sorted(firsts)
    assert (firsts[0], max(dots(lines[5]))) == (0, 39)


@pytest.mark.parametrize("losses", [[2.0], [2.0, 2.0, 2.0], [0.0, 0.0]])
def test_a_level_loss_can_be_drawn(losses):
    curve = Curve()
    for step, loss in enumerate(losses):
        curve.add(step, loss, loss)
    assert any(dots(line) for line in lines_of(curve))


def test_steps_that_a_resume_took_back_are_drawn_once():
    curve = Curve()
    for step in (1, 2, 3, 4, 3, 4, 5):
        curve.add(step, 1.0, 1.0)
    assert len(curve) == 5


def test_what_is_not_finite_is_left_out():
    curve = Curve()
    curve.add(1, float("nan"), 1.0)
    curve.add(2, float("inf"), 1.0)
    assert len(curve) == 0
    assert curve.draw().plain == ""


def test_each_training_of_a_run_gets_its_curve():
    run = pb.Run(id="run", state=pb.RUN_STATE_RUNNING)
    run.stages.add(name="base", kind="import", state=pb.STAGE_STATE_SUCCEEDED)
    sft = run.stages.add(name="sft", kind="train", state=pb.STAGE_STATE_RUNNING)
    curves: dict[str, Curve] = {}
    console = Console(width=80)
    for step in range(1, 9):
        progress = sft.metadata.progress
        progress.training_step, progress.raw_loss, progress.loss = step, 3 - step / 4, 3 - step / 8
        shown = watch.view(run, curves)
    with console.capture() as captured:
        console.print(shown)
    assert list(curves) == ["sft"]
    assert "sft  loss, nats per token" in captured.get()
    assert "step 1" in captured.get()
