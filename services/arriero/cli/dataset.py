"""`arriero dataset`: rows before they are paid for, and reports after.

Responsibility: previews and reports of the dataset room in the terminal. Does
not know how rows become tokens.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from arriero.cli import render
from arriero.cli.session import Format, Output, client, command, show
from arriero.client import load_pipeline
from arriero.errors import InvalidArgument
from arriero.v1 import dataset_pb2
from arriero.v1 import orchestrator_pb2 as pb

app = typer.Typer(no_args_is_help=True, help="Datasets: preview rows, show reports.")

_TRAINED, _PROMPT, _SPECIAL = "bold green", "dim", "magenta"
# Around what is trained on, where there is no colour.
_OPEN, _CLOSE = "⟦", "⟧"
_BAR = 40


@app.command()
@command
def preview(
    pipeline: Annotated[
        Path, typer.Argument(help="Pipeline file (YAML).", metavar="PIPELINE.yaml")
    ],
    stage: Annotated[
        str, typer.Option(help="Which dataset stage; may be left out where there is one.")
    ] = "",
    samples: Annotated[int, typer.Option(help="Rows to show.", min=1, max=20)] = 3,
    rows: Annotated[int, typer.Option(help="Rows to count over.", min=1, max=10_000)] = 1000,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one value: stages.rows.cutoff_len=256"),
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Show what a dataset stage would make of its first rows; nothing is stored.

    What is trained on stands out: in green, or between ⟦ and ⟧ without colour.
    """
    file = load_pipeline(pipeline, overrides=assign or [])
    with client() as api:
        found = api.preview_stage(file, stage=stage, samples=samples, rows=rows)
    show(found, lambda: preview_view(found))


@app.command()
@command
def report(
    ref: Annotated[
        str, typer.Argument(help="The report: its digest, a prefix of it, or report/name:tag.")
    ],
    output: Output = Format.TABLE,
) -> None:
    """Show the report of a dataset, transform or extend_tokenizer stage."""
    with client() as api:
        artifact = api.artifacts.get(ref)
        if artifact.kind != "report":
            raise InvalidArgument.field(
                "ref", f"{ref!r} is a {artifact.kind}; expected the report of the stage"
            )
        with tempfile.TemporaryDirectory() as place:
            api.artifacts.pull(artifact.digest, Path(place) / "report")
            path = Path(place) / "report" / "report.json"
            if not path.is_file():
                raise InvalidArgument.field("ref", f"{ref!r} holds no report.json")
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    show(found, lambda: report_view(found))


def preview_view(found: pb.PreviewStageResponse) -> RenderableType:
    """A preview: samples, figures, lengths, rows that cannot be used."""
    data = found.dataset
    parts: list[RenderableType] = []
    for sample in data.samples:
        cut = "  cut at cutoff_len" if sample.truncated else ""
        head = f"{sample.file} row {sample.row}  {len(sample.tokens)} tokens{cut}"
        parts += [Text(head, style="bold"), sample_text(sample.tokens), ""]
    figures = render.table("", "", title=f"{found.stage}: {data.format}, {_template(data)}")
    of_all = "all rows" if data.all_rows else "the first rows"
    for name, value in (
        ("rows", f"{data.rows} ({of_all})"),
        ("tokens", f"{data.tokens}"),
        ("trained on", _share(data.trained_tokens, data.tokens)),
        ("truncated rows", _share(data.truncated_rows, data.rows)),
        ("duplicate rows", _share(data.duplicate_rows, data.rows)),
        ("unusable rows", _share(data.bad_row_count, data.rows)),
    ):
        figures.add_row(name, value)
    parts += [figures, "", _histogram((bucket.up_to, bucket.rows) for bucket in data.lengths)]
    parts += _bad(list(data.bad_rows), data.bad_row_count)
    return Group(*parts)


def sample_text(tokens: Sequence[dataset_pb2.PreviewToken]) -> Text:
    """A row with what is trained on in colour, or between marks where there is none."""
    colour = render.console.is_terminal and not render.console.no_color
    text = Text()
    trained = False
    for token in tokens:
        if not colour and token.trained != trained:
            text.append(_CLOSE if trained else _OPEN)
        trained = token.trained
        style = _TRAINED if token.trained else _PROMPT
        text.append(token.text, style=f"{style} {_SPECIAL}" if token.special else style)
    if trained and not colour:
        text.append(_CLOSE)
    return text


def report_view(found: Mapping[str, Any]) -> RenderableType:
    """A report's figures by its kind; as JSON where the kind is another."""
    views = {"dataset": _dataset, "transform": _transform, "extend_tokenizer": _extension}
    made = views.get(str(found.get("kind")))
    return made(found) if made else Text(json.dumps(found, indent=2, ensure_ascii=False))


def _dataset(found: Mapping[str, Any]) -> RenderableType:
    encoded, rows = found["encoded"], found["rows"]
    figures = _figures(
        {f"rows {name}": value for name, value in rows.items()}
        | {"tokens": encoded["tokens"]}
        | {"trained on": _share(encoded["trained_tokens"], encoded["tokens"])}
        | {"truncated rows": f"{encoded['truncated_rows']} ({encoded['truncated_share']:.1%})"}
        | {f"{name} duplicates": count for name, count in found.get("duplicates", {}).items()}
        | {"template": found["template"]}
    )
    parts: list[RenderableType] = []
    for sample in encoded["samples"]:
        parts += [Text(f"{sample['file']} row {sample['row']}", style="bold"), sample["text"], ""]
    parts += [figures, "", _histogram((b["up_to"], b["rows"]) for b in encoded["lengths"])]
    return Group(*parts, *_named(found["bad_rows"]))


def _transform(found: Mapping[str, Any]) -> RenderableType:
    figures = _figures(
        {f"rows {name}": value for name, value in found["rows"].items()}
        | {f"{name} tokens": value for name, value in found["tokens"].items()}
    )
    parts: list[RenderableType] = [figures]
    for sample in found["samples"]:
        parts += ["", Text(json.dumps(sample["before"], ensure_ascii=False), style=_PROMPT)]
        parts.append(Text(json.dumps(sample["after"], ensure_ascii=False), style=_TRAINED))
    return Group(*parts, *_named(found["failed_rows"]))


def _extension(found: Mapping[str, Any]) -> RenderableType:
    tokens, gained = found["tokens"], found["compression"]
    figures: dict[str, Any] = {
        "tokens before": tokens["before"],
        "tokens after": tokens["after"],
        "embedding rows": tokens["rows"],
    }
    parts: list[RenderableType] = []
    if gained:
        where = "held-out text" if gained["held_out"] else "the corpus itself"
        figures |= {
            f"tokens of {where}": f"{gained['tokens_before']} → {gained['tokens_after']}",
            "bytes per token": f"{gained['bytes_per_token_before']:.2f} → "
            f"{gained['bytes_per_token_after']:.2f}",
            "compression gained": f"{gained['gain']:.2f}×",
            "new tokens used": gained["new_tokens_used"],
        }
        for sample in gained["samples"]:
            parts += ["", Text(" ".join(sample["before"]), style=_PROMPT)]
            parts.append(Text(" ".join(sample["after"]), style=_TRAINED))
    new = [*tokens["added"], *tokens["pieces"]]
    return Group(_figures(figures), *parts, "", Text("new: " + " ".join(new[:100])))


def _figures(values: Mapping[str, Any]) -> Table:
    made = render.table("", "")
    for name, value in values.items():
        made.add_row(name, str(value))
    return made


def _histogram(buckets: Iterable[tuple[int, int]]) -> Table:
    found = list(buckets)
    most = max((rows for _, rows in found), default=1)
    made = render.table("tokens", "rows", "")
    for up_to, rows in found:
        made.add_row(f"≤ {up_to}", str(rows), Text("█" * -(-_BAR * rows // most), style="cyan"))
    return made


def _bad(named: Sequence[str], count: int) -> list[RenderableType]:
    if not count:
        return []
    more = f"; and {count - len(named)} more" if count > len(named) else ""
    lines = "\n".join(named) + more
    return ["", Text(f"rows that cannot be used\n{lines}", style="yellow")]


def _named(findings: Mapping[str, Any]) -> list[RenderableType]:
    named = [
        f"{item['file']} row {item['row']} (line {item['line']}): {item['problem']}"
        for item in findings["named"][:20]
    ]
    return _bad(named, findings["count"])


def _template(data: dataset_pb2.PreviewDatasetResponse) -> str:
    return f"template {data.template}" if data.template else "no template"


def _share(count: int, total: int) -> str:
    return f"{count} ({count / total:.1%})" if total else str(count)
