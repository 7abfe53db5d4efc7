"""What comes from models, files and people is shown as it is, never taken for markup."""

from __future__ import annotations

import pytest

from arriero.cli import render, watch
from arriero.cli.artifacts import _details
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import types_pb2

MESSAGE = "row 3: '[/INST] [bold]x[/tmp/y]' is no answer"


def test_an_error_message_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    run = pb.Run(id="r-1", state=pb.RUN_STATE_FAILED)
    stage = run.stages.add(name="rows", state=pb.STAGE_STATE_FAILED)
    stage.error.message = MESSAGE
    watch.follow([run])
    render.console.print(render.run_view(run), width=160)
    shown = capsys.readouterr().out
    assert shown.count(MESSAGE) == 2


def test_labels_and_what_a_gate_found_are_shown_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    artifact = pb.Artifact(digest="sha256:0", kind="dataset", labels={"note": "[/x]"})
    artifact.gates.add(gate="dataset.schema", verdict=types_pb2.GATE_VERDICT_FAILED, detail=MESSAGE)
    render.console.print(_details(artifact), width=160)
    shown = capsys.readouterr().out
    assert "[/x]" in shown
    assert MESSAGE in shown


def test_how_far_a_stage_is_is_told_in_units_that_people_read() -> None:
    assert render.count(12, 60, "steps") == "12/60 steps"
    assert render.count(1_500_000, 134_515_008, "weights") == "1,500,000/134,515,008 weights"
    assert render.count(20_971_520, 98_362_432, "bytes") == "21.0 MB of 98.4 MB"
