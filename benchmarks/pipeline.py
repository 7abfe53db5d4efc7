"""How long the stages of the demo take, and what the platform adds to its jobs.

    make bench BENCH=pipeline

Runs examples/faq/pipeline.yaml in a new, empty home, `REPEATS` times (default
1), and prints seconds per stage. `overhead_s` is the run's wall time less the
union of its jobs' exec-to-exit intervals and of the time in which deploy stages
wait for replicas: what orchestrator, services and store add. A peer that runs
the same stages as a plain script would have an overhead of zero by definition.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
from datetime import UTC
from pathlib import Path
from typing import Any

from rich.table import Table

from arriero.cli import local, render, watch
from arriero.cli.supervisor import Home
from arriero.client import Client, load_pipeline
from arriero.v1 import orchestrator_pb2 as pb

PIPELINE = Path(__file__).resolve().parents[1] / "examples" / "faq" / "pipeline.yaml"


def main() -> None:
    """Run, print the table, print the JSON line."""
    runs = [once() for _ in range(int(os.environ.get("REPEATS", "1")))]
    names = list(runs[0]["stages"])
    stages = {name: statistics.median(r["stages"][name] for r in runs) for name in names}
    overhead = statistics.median(r["overhead_s"] for r in runs)
    wall = statistics.median(r["wall_s"] for r in runs)
    table = Table("stage", "seconds", title="The demo's stages")
    for name, value in stages.items():
        table.add_row(name, f"{value:.1f}")
    table.add_row("run, wall time", f"{wall:.1f}")
    table.add_row("overhead", f"{overhead:.2f}")
    render.console.print(table)
    print(
        json.dumps(
            {
                "bench": "pipeline",
                "ratios": {},
                "figures": {"overhead_s": overhead, "wall_s": wall, "stages_s": stages},
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, {sys.platform}",
            }
        )
    )


def once() -> dict[str, Any]:
    """One run in a home of its own."""
    with tempfile.TemporaryDirectory(prefix="arriero-bench-") as directory:
        os.environ["ARRIERO_HOME"] = directory
        home = Home.default()
        local.start_detached(home, tied=True)
        try:
            with Client() as client:
                started = client.create_run(load_pipeline(PIPELINE))
                run = watch.follow(client.watch_run(started.id))
        finally:
            local.stop(home)
    assert run is not None, "a watch yields at least once"
    if run.state != pb.RUN_STATE_SUCCEEDED:
        sys.exit(f"the run failed: {run.error.message}")
    return figures(run)


def figures(run: pb.Run) -> dict[str, Any]:
    """Seconds per stage, of the run, and outside of any job."""

    def at(stamp: object) -> float:
        return stamp.ToDatetime(tzinfo=UTC).timestamp()  # type: ignore[attr-defined, no-any-return]

    spans = []
    for stage in run.stages:
        if stage.kind == "deploy":
            spans.append((at(stage.start_time), at(stage.end_time)))
        spans += [(at(job.start_time), at(job.end_time)) for job in stage.metadata.jobs]
    busy, reached = 0.0, 0.0
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    wall = at(run.end_time) - at(run.create_time)
    return {
        "stages": {s.name: at(s.end_time) - at(s.start_time) for s in run.stages},
        "wall_s": wall,
        "overhead_s": wall - busy,
    }


if __name__ == "__main__":
    main()
