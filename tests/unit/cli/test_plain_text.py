"""What comes from models, files and people is shown as it is, never taken for markup."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

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


def test_what_gates_found_is_a_count_or_a_measure() -> None:
    gate = types_pb2.GateResult(gate="tokenizer.match", figure=49152, unit="tokens")
    assert render.gate_text(gate).plain.endswith(" 49,152 tokens")
    gate = types_pb2.GateResult(gate="quant.kld", figure=0.0060431, unit="nats")
    assert render.gate_text(gate).plain.endswith(" 0.00604 nats")


def test_a_run_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(render, "console", Console(width=60, file=shown, markup=False))
    run = pb.Run(id="r-1", state=pb.RUN_STATE_RUNNING)
    stage = run.stages.add(name="training", kind="train", state=pb.STAGE_STATE_RUNNING)
    stage.metadata.progress.phase = "training"
    stage.metadata.progress.step, stage.metadata.progress.total_steps = 3, 60
    run.stages.add(name="merged", kind="merge", state=pb.STAGE_STATE_PENDING)
    render.console.print(render.run_view(run), render.summary(run))
    lines = shown.getvalue().splitlines()
    assert any("training  3/60" in line for line in lines)
    assert lines[-1].split() == ["merged"]  # what has not begun took no time


def test_a_terminal_without_all_characters_is_no_defect(home: Path) -> None:
    latin = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(
        [sys.executable, "-m", "arriero.cli", "run", "駱馬.yaml"], capture_output=True, env=latin
    )
    assert done.stderr.decode("latin-1").strip() == "error pipeline file ??.yaml does not exist"


def test_lines_are_whole_where_programs_read_them() -> None:
    # A console takes its width once, when the process starts.
    code = "from arriero.cli import render; render.console.print('word ' * 30)"
    # readline, which pytest loads, sets COLUMNS for children, behind os.environ's back.
    plain = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    piped = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=plain
    )
    assert piped.stdout.count("\n") == 1
