"""What people see: tables, run trees, progress, errors; and the same as JSON.

Responsibility: turn messages into Rich renderables or JSON. Does not call any
service.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from arriero.errors import ArrieroError, InvalidArgument
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import types_pb2

# What goes to a pipe or a file is read by line: wide enough that lines stay whole.
_PIPED_WIDTH = 200
_PIPED = not sys.stdout.isatty() and "COLUMNS" not in os.environ
# Names, paths and messages may hold `[/x]`: what looks like Rich's markup is text.
console = Console(markup=False, width=_PIPED_WIDTH if _PIPED else None)
errors = Console(stderr=True, markup=False)

_STAGE_STYLE = {
    "PENDING": ("·", "dim"),
    "RUNNING": ("▸", "cyan"),
    "SUCCEEDED": ("✓", "green"),
    "FAILED": ("✗", "red"),
    "CANCELLED": ("■", "yellow"),
    "SKIPPED": ("–", "dim"),
}
_BAR_WIDTH = 20
# Columns of a terminal below which a bar would take the room of what it says.
_BAR_FROM = 100
_VERDICT_STYLE = {
    "PASSED": "green",
    "WARNED": "yellow",
    "FAILED": "red",
    "SKIPPED": "dim",
    "WAIVED": "yellow",
}


def short(enum_name: str, prefix: str) -> str:
    """`RUN_STATE_RUNNING` -> `RUNNING`."""
    return enum_name.removeprefix(prefix)


def run_state(value: pb.RunState.ValueType) -> str:
    """A run state's short name."""
    return short(pb.RunState.Name(value), "RUN_STATE_")


def stage_state(value: pb.StageState.ValueType) -> str:
    """A stage state's short name."""
    return short(pb.StageState.Name(value), "STAGE_STATE_")


def verdict(value: types_pb2.GateVerdict.ValueType) -> str:
    """A verdict's short name."""
    return short(types_pb2.GateVerdict.Name(value), "GATE_VERDICT_")


def to_json(value: Message | Iterable[Message] | dict[str, Any] | list[Any]) -> str:
    """Messages by their proto field names, with defaults left out."""

    def plain(item: Any) -> Any:
        if isinstance(item, Message):
            return MessageToDict(item, preserving_proto_field_name=True)
        return item

    if isinstance(value, (Message, dict)):
        return json.dumps(plain(value), indent=2, ensure_ascii=False)
    return json.dumps([plain(item) for item in value], indent=2, ensure_ascii=False)


def print_json(value: Message | Iterable[Message] | dict[str, Any] | list[Any]) -> None:
    """To standard output, unwrapped and uncoloured."""
    sys.stdout.write(to_json(value) + "\n")
    sys.stdout.flush()


def size(count: float) -> str:
    """Bytes for people: `91.2 MB` (decimal)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def count(done: int, total: int, unit: str) -> str:
    """How many of how many: `12/60 steps`, `20.9 MB of 98.4 MB`."""
    if unit == "bytes":
        return f"{size(done)} of {size(total)}"
    return f"{done:,}/{total:,} {unit}".rstrip()


def seconds(value: float) -> str:
    """A duration for people: `0.4 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if value < 10:
        return f"{value:.1f} s"
    if value < 60:
        return f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def moment(stamp: Timestamp) -> datetime | None:
    """A timestamp, or None when it is not set."""
    if stamp.seconds == 0 and stamp.nanos == 0:
        return None
    return stamp.ToDatetime(tzinfo=UTC)


def elapsed(start: Timestamp, end: Timestamp) -> float | None:
    """Seconds between two timestamps; until now when the second is not set."""
    begin = moment(start)
    if begin is None:
        return None
    return ((moment(end) or datetime.now(UTC)) - begin).total_seconds()


def local(stamp: Timestamp) -> str:
    """Local date and time."""
    when = moment(stamp)
    return when.astimezone().strftime("%Y-%m-%d %H:%M:%S") if when else ""


def digest(text: str) -> str:
    """The first twelve digits."""
    return text.removeprefix("sha256:")[:12]


def output_text(item: types_pb2.StageOutput) -> str:
    """`Q8_0 daa74e01985f 144.8 MB`."""
    return f"{item.name} {digest(item.digest)} {size(item.size_bytes)}"


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, header_style="bold dim", overflow="fold")
    return made


def gate_text(gate: types_pb2.GateResult) -> Text:
    """`merge.logits ✓ 2.1e-05 nats`."""
    word = verdict(gate.verdict)
    sign = {"PASSED": "✓", "WARNED": "!", "FAILED": "✗", "SKIPPED": "–", "WAIVED": "~"}.get(
        word, "?"
    )
    text = Text(f"{gate.gate} {sign}", style=_VERDICT_STYLE.get(word, ""))
    if gate.HasField("figure"):
        text.append(f" {_figure(gate.figure)} {gate.unit}".rstrip())
    return text


def _figure(value: float) -> str:
    """Counts in full, measures with three digits."""
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e9 else f"{value:.3g}"


def gates_text(gates: Sequence[types_pb2.GateResult]) -> Text:
    """All gates, one line each."""
    return Text("\n").join(gate_text(gate) for gate in gates)


def progress_text(stage: pb.StageStatus) -> Text:
    """What a running stage says of itself in one line."""
    progress = stage.metadata.progress
    parts: list[str] = ["paused"] if stage.metadata.paused else []
    if stage.error.message:  # what it waits out
        return Text("  ".join([*parts, stage.error.message]), style="yellow")
    if progress.phase:
        parts.append(progress.phase)
    if progress.total_steps:
        parts.append(count(progress.step, progress.total_steps, progress.unit))
    if progress.HasField("loss") and progress.unit == "steps":
        parts.append(f"loss {progress.loss:.3f}")
        if progress.HasField("learning_rate"):
            parts.append(f"lr {progress.learning_rate:.1e}")
    if progress.HasField("tokens_per_second"):
        parts.append(f"{progress.tokens_per_second:.0f} tok/s")
    if progress.HasField("mfu"):
        parts.append(f"MFU {progress.mfu:.0%}")
    for gpu in progress.gpus:
        parts.append(f"GPU {gpu.utilization_ratio:.0%}")
    if progress.HasField("eta_seconds"):
        parts.append(f"{seconds(progress.eta_seconds)} left")
    if progress.HasField("checkpoint_time") and progress.unit == "steps":
        age = elapsed(progress.checkpoint_time, Timestamp())
        parts.append(f"saved {seconds(age or 0.0)} ago")
    if stage.metadata.attempt > 1:
        parts.append(f"attempt {stage.metadata.attempt}")
    return Text("  ".join(parts))


def run_view(run: pb.Run) -> RenderableType:
    """A run as it stands: one line per stage, a bar where one runs and there is room."""
    bars = console.width >= _BAR_FROM
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_column()
    rows.add_column(no_wrap=True)
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(justify="right", no_wrap=True)
    if bars:
        rows.add_column(width=_BAR_WIDTH)
    rows.add_column(overflow="fold")
    for stage in run.stages:
        state = stage_state(stage.state)
        sign, style = _STAGE_STYLE.get(state, ("?", ""))
        took = elapsed(stage.start_time, stage.end_time)
        progress = stage.metadata.progress
        bar: RenderableType = ""
        note: RenderableType = ""
        if state == "RUNNING":
            total = progress.total_steps
            bar = ProgressBar(
                total=total or None, completed=progress.step, width=_BAR_WIDTH, pulse=not total
            )
            note = progress_text(stage)
        elif state == "FAILED":
            note = Text(stage.error.message, style="red")
        elif state == "SUCCEEDED":
            note = _outcome(stage)
        elif state == "PENDING" and stage.depends_on:
            note = Text("after " + ", ".join(stage.depends_on), style="dim")
        rows.add_row(
            Text(sign, style=style),
            Text(stage.name, style=style),
            stage.kind,
            seconds(took) if took is not None and state != "PENDING" else "",
            *([bar] if bars else []),
            note,
        )
    state = "PAUSED" if run.paused else run_state(run.state)
    took = elapsed(run.create_time, run.end_time)
    head = Text.assemble(
        (run.id, "bold"),
        "  ",
        (state, _STAGE_STYLE.get(state, ("", ""))[1]),
        f"  {seconds(took)}" if took is not None else "",
    )
    return Group(head, rows)


def _outcome(stage: pb.StageStatus) -> Text:
    text = Text()
    if stage.metadata.cached:
        text.append("reused  ", style="cyan")
    figures = [output_text(o) for o in stage.outputs]
    text.append("  ".join(figures), style="dim")
    warned = [
        g for g in stage.metadata.gates if verdict(g.verdict) in ("WARNED", "FAILED", "WAIVED")
    ]
    for gate in warned:
        text.append("  ")
        text.append_text(gate_text(gate))
    return text


def usage_text(usage: types_pb2.JobUsage) -> str:
    """`work 3.1 s, 170.2 MB; gates 11.4 s, 696.0 MB`; empty where nothing is known."""
    parts = []
    for what, took, memory in (
        ("work", usage.work_seconds, usage.work_memory_bytes),
        ("gates", usage.gate_seconds, usage.gate_memory_bytes),
    ):
        if took or memory:
            parts.append(f"{what} {seconds(took)}" + (f", {size(memory)}" if memory else ""))
    return "; ".join(parts)


def summary(run: pb.Run) -> Table:
    """The closing table of a run: stages, times, gates, artifacts."""
    made = table("stage", "time", "figures", "gates", "artifacts")
    made.columns[0].no_wrap = True
    for stage in run.stages:
        took = elapsed(stage.start_time, stage.end_time)
        figures = ""
        merged: dict[str, float] = {}
        for output in stage.outputs:
            merged.update(output.metrics)
        if "loss_first" in merged and "loss_last" in merged:
            figures = f"loss {merged['loss_first']:.2f} → {merged['loss_last']:.2f}"
        elif "rows" in merged:
            figures = f"{merged['rows']:.0f} rows"
        made.add_row(
            stage.name,
            "reused" if stage.metadata.cached else _times(took, stage.metadata.usage),
            figures,
            gates_text(stage.metadata.gates),
            "\n".join(output_text(o) for o in stage.outputs),
        )
    return made


def _times(took: float | None, usage: types_pb2.JobUsage) -> str:
    """What a stage took, and below it its job's work and gates; nothing before it began."""
    if took is None:
        return ""
    return "\n".join([seconds(took), *filter(None, usage_text(usage).split("; "))])


def fail(error: ArrieroError, *, as_json: bool = False) -> NoReturn:
    """Say what went wrong and leave: 2 for the caller's mistakes, 1 otherwise."""
    violations = list(error.violations) if isinstance(error, InvalidArgument) else []
    if as_json:
        body: dict[str, Any] = {
            "error": {"code": error.code, "message": error.message, "reason": error.reason}
        }
        if error.metadata:
            body["error"]["metadata"] = error.metadata
        if violations:
            body["error"]["violations"] = [
                {"field": v.field, "description": v.description} for v in violations
            ]
        sys.stderr.write(json.dumps(body, ensure_ascii=False) + "\n")
    elif violations:
        for violation in violations:
            text = f"{violation.field}: {violation.description}"
            errors.print(Text.assemble(("error ", "bold red"), text), soft_wrap=True)
    else:
        errors.print(Text.assemble(("error ", "bold red"), error.message), soft_wrap=True)
    raise SystemExit(2 if error.code in ("INVALID_ARGUMENT", "NOT_FOUND", "UNAUTHENTICATED") else 1)
