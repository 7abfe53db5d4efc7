"""What an evaluation found, as a table in the terminal.

Responsibility: from the metrics of an evaluation report to a table. Does not know
how they were measured.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from arriero.cli import render
from arriero.v1 import orchestrator_pb2 as pb

# In the metrics, the reference file's figures stand beside those of types.
_REFERENCE = "reference"
# Headings short enough for eighty columns with everything measured; `report.txt` has more.
_COLUMNS = (
    ("size", "size_bytes", render.size),
    ("bits", "bits_per_weight", "{:.2f}".format),
    ("KL", "kl_divergence", "{:.5f}".format),
    ("top-1", "top1_agreement", "{:.1%}".format),
    ("KL ref", "reference_kl", "{:.5f}".format),
    ("ppl", "perplexity", "{:.5g}".format),
    ("prompt/s", "prompt_tokens_per_second", "{:.4g}".format),
    ("gen/s", "generation_tokens_per_second", "{:.4g}".format),
)


def view(metrics: Mapping[str, float], title: str | None = None) -> Table | None:
    """One line per file, smallest first, the reference last; None without such figures.

    Args:
        metrics: as an evaluation report has them: `<type>.<figure>`.
        title: above the table.
    """
    files: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        kind, dot, figure = key.rpartition(".")
        if dot:
            files.setdefault(kind, {})[figure] = value
    if not files:
        return None
    order = sorted(files, key=lambda kind: (kind == _REFERENCE, files[kind].get("size_bytes", 0)))
    used = [column for column in _COLUMNS if any(column[1] in files[kind] for kind in order)]
    made = render.table("type", *(heading for heading, _, _ in used), "", title=title)
    made.padding = (0, 1, 0, 0)
    for column in made.columns:
        column.no_wrap = True
    for column in made.columns[1:-1]:
        column.justify = "right"
    for kind in order:
        figures = files[kind]
        cells = [show(figures[name]) if name in figures else "" for _, name, show in used]
        mark = Text("chosen", "green") if figures.get("chosen") else Text()
        made.add_row(kind, *cells, mark)
    return made


def of_run(run: pb.Run) -> RenderableType | None:
    """The tables of a run's evaluations; None when it has none."""
    tables = [
        made
        for stage in run.stages
        if stage.kind == "evaluate"
        for output in stage.outputs
        if (made := view(output.metrics, title=stage.name)) is not None
    ]
    return Group(*tables) if tables else None
