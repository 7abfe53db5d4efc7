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
