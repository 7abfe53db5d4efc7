"""Follow a run in the terminal.

Responsibility: show a run until it ends, live on a terminal (with the loss curves of
its trainings) and as lines elsewhere. Does not know how runs work.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from arriero.cli import render
from arriero.cli.curve import Curve
from arriero.v1 import orchestrator_pb2 as pb

ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
_WIDEST = 100


def follow(updates: Iterable[pb.Run]) -> pb.Run | None:
    """Show each update; return the last one."""
    if not render.console.is_terminal:
        return _lines(updates)
    last: pb.Run | None = None
    curves: dict[str, Curve] = {}
    with Live(console=render.console, refresh_per_second=4, transient=False) as live:
        for last in updates:
            live.update(view(last, curves))
    return last


def view(run: pb.Run, curves: dict[str, Curve]) -> RenderableType:
    """A run as it stands, with a curve below it for each training that was seen to run.

    Args:
        run: the newest update.
        curves: by stage; takes in what the update says.
    """
    parts: list[RenderableType] = [render.run_view(run)]
    for stage in run.stages:
        progress = stage.metadata.progress
        if progress.HasField("raw_loss") and progress.HasField("training_step"):
            curve = curves.setdefault(stage.name, Curve())
            curve.add(progress.training_step, progress.raw_loss, progress.loss)
        if len(curves.get(stage.name, ())) > 1:
            head = Text.assemble("\n", (stage.name, "bold"), "  loss, nats per token")
            parts += [head, curves[stage.name].draw(min(render.console.width, _WIDEST))]
    return Group(*parts)


def _lines(updates: Iterable[pb.Run]) -> pb.Run | None:
    """One line per change of a stage's state, and per tenth of its progress."""
    seen: dict[str, tuple[str, int, str]] = {}
    last: pb.Run | None = None
    for last in updates:
        for stage in last.stages:
            state = render.stage_state(stage.state)
            progress = stage.metadata.progress
            tenth = 10 * progress.step // progress.total_steps if progress.total_steps else 0
            running = state == "RUNNING"
            mark = (state, tenth if running else 0, stage.error.message if running else "")
            if seen.get(stage.name) == mark:
                continue
            seen[stage.name] = mark
            if state == "PENDING":
                continue
            note = ""
            if state == "RUNNING":
                note = render.progress_text(stage).plain
            elif state == "SUCCEEDED":
                took = render.elapsed(stage.start_time, stage.end_time) or 0.0
                usage = render.usage_text(stage.metadata.usage)
                note = "reused" if stage.metadata.cached else render.seconds(took)
                note += f" ({usage})" if usage else ""
            elif state == "FAILED":
                note = stage.error.message
            line = f"{stage.name:<12} {state.lower():<10} {note}".rstrip()
            render.console.print(line, highlight=False, soft_wrap=True)
    return last
