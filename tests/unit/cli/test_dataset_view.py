"""What stands out of a row that is previewed, and the schema for editors."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from arriero.cli import dataset, render
from arriero.cli.app import app
from arriero.client import pipeline_schema
from arriero.v1 import dataset_pb2

TOKENS = [
    dataset_pb2.PreviewToken(text="<s>", id=1, special=True),
    dataset_pb2.PreviewToken(text="Name a river.", id=5),
    dataset_pb2.PreviewToken(text=" Urubamba", id=6, trained=True),
    dataset_pb2.PreviewToken(text="</s>", id=2, trained=True, special=True),
]


@pytest.mark.parametrize("colour", [True, False])
def test_what_is_trained_on_stands_out(monkeypatch: pytest.MonkeyPatch, colour: bool) -> None:
    shown = io.StringIO()
    console = Console(
        file=shown, force_terminal=colour, color_system="standard" if colour else None, width=100
    )
    monkeypatch.setattr(render, "console", console)
    console.print(dataset.sample_text(TOKENS))
    if colour:
        assert "\x1b[1;32m Urubamba\x1b[0m" in shown.getvalue(), "bold and green"
        assert "\x1b[2mName a river.\x1b[0m" in shown.getvalue(), "dim"
        assert "⟦" not in shown.getvalue()
    else:
        assert shown.getvalue() == "<s>Name a river.⟦ Urubamba</s>⟧\n"


def test_the_schema_is_printed_for_editors() -> None:
    done = CliRunner().invoke(app, ["schema"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == pipeline_schema()
