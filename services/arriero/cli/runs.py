"""`arriero run` and `arriero runs`.

Responsibility: start, follow and steer runs from a terminal. Does not know how
a run is carried out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from arriero.cli import evaluation, render, watch
from arriero.cli.session import Format, Output, as_json, client, command, show
from arriero.client import load_pipeline, pipeline_schema
from arriero.errors import InvalidArgument
from arriero.v1 import orchestrator_pb2 as pb

app = typer.Typer(no_args_is_help=True, help="Runs: list, follow, pause, cancel, retry.")

RunId = Annotated[str, typer.Argument(help="The run's ID, as `arriero runs list` shows it.")]


@command
def run(
    pipeline: Annotated[
        Path, typer.Argument(help="Pipeline file (YAML).", metavar="PIPELINE.yaml")
    ],
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change one value: stages.sft.lora.r=16", metavar="KEY=VALUE"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan; start nothing.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Start it and print its ID; do not wait.")
    ] = False,
    request_id: Annotated[
        str | None,
        typer.Option(help="A second start with the same ID returns the first run."),
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Run a pipeline, and follow it until it ends.

    Ctrl-C leaves the run going: `arriero runs watch` follows it again,
    `arriero runs cancel` stops it.
    """
    file = load_pipeline(pipeline, overrides=assign or [])
    with client() as api:
        started = api.create_run(file, request_id=request_id, validate_only=dry_run)
        if dry_run:
            show(started, lambda: plan(started))
            return
        if detach:
            show(started, lambda: started.id)
            return
        follow(started.id)


@command
def schema() -> None:
    """Print the JSON Schema of pipeline files, for editors."""
    render.print_json(pipeline_schema())


def follow(run_id: str) -> None:
    """Show a run until it ends; exit 1 when it does not succeed."""
    with client() as api:
        if as_json():
            ended = api.wait(run_id)
            render.print_json(ended)
        else:
            try:
                last = watch.follow(api.watch_run(run_id))
            except KeyboardInterrupt:
                render.console.print(
                    f"\nThe run goes on.\n"
                    f"  follow it  arriero runs watch {run_id}\n"
                    f"  stop it    arriero runs cancel {run_id}",
                    highlight=False,
                    soft_wrap=True,
                )
                raise
            assert last is not None, "a watch yields at least once"
            ended = last
            _closing(ended)
    if ended.state != pb.RUN_STATE_SUCCEEDED:
        raise typer.Exit(1)


def _closing(run: pb.Run) -> None:
    state = render.run_state(run.state)
    if state == "SUCCEEDED":
        render.console.print()
        render.console.print(render.summary(run))
        if (found := evaluation.of_run(run)) is not None:
            render.console.print("", found)
        endpoints = [
            stage.deploy.endpoint
            for stage in run.pipeline.stages
            if stage.WhichOneof("work") == "deploy"
        ]
        for name in endpoints:
            render.console.print(f'\nNext: arriero chat {name} "..."', highlight=False)
    elif state == "FAILED":
        failed = [s for s in run.stages if render.stage_state(s.state) == "FAILED"]
        for stage in failed:
            render.console.print(
                Text.assemble("\n", (f"{stage.name} failed:", "red"), f" {stage.error.message}")
            )
            render.console.print(
                f"  arriero runs logs {run.id} --stage {stage.name}", highlight=False
            )
        render.console.print(f"  arriero runs retry {run.id}", highlight=False)
        for stage in failed:
            refused = [
                g.gate for g in stage.metadata.gates if render.verdict(g.verdict) == "FAILED"
            ]
            if refused and stage.outputs:
                waived = " ".join(f"--waive {gate}" for gate in refused)
                render.console.print(
                    f"  arriero runs retry {run.id} {waived} --stage {stage.name} --reason TEXT",
                    highlight=False,
                    soft_wrap=True,
                )


def plan(run: pb.Run) -> Table:
    """What a run would do: the graph, what the store has, what it needs."""
    made = render.table(
        "stage", "work", "after", "store", "disk", "memory", title=run.pipeline.name
    )
    for stage in run.stages:
        meta = stage.metadata
        known = "reuse" if meta.cached else ("to do" if meta.result_key else "inputs not known yet")
        if stage.kind == "deploy":
            known = "always"
        made.add_row(
            stage.name,
            stage.kind,
            ", ".join(stage.depends_on),
            known,
            render.size(meta.estimate.disk_bytes) if meta.estimate.disk_bytes else "",
            render.size(meta.estimate.memory_bytes) if meta.estimate.memory_bytes else "",
        )
    return made


@app.command("list")
@command
def list_(
    limit: Annotated[int, typer.Option(help="At most so many, newest first.", min=1)] = 30,
    output: Output = Format.TABLE,
) -> None:
    """The newest runs."""
    with client() as api:
        runs = api.list_runs(limit)

    def view() -> RenderableType:
        if not runs:
            return "no runs yet; start one: arriero run PIPELINE.yaml"
        made = render.table("run", "state", "started", "took", "stages")
        for item in runs:
            took = render.elapsed(item.create_time, item.end_time)
            done = sum(render.stage_state(s.state) == "SUCCEEDED" for s in item.stages)
            made.add_row(
                item.id,
                render.run_state(item.state),
                render.local(item.create_time),
                render.seconds(took) if took is not None else "",
                f"{done}/{len(item.stages)}",
            )
        return made

    show(runs, view)


@app.command()
@command
def get(run_id: RunId, output: Output = Format.TABLE) -> None:
    """One run: stages, figures, gates, artifacts."""
    with client() as api:
        found = api.get_run(run_id)

    def view() -> RenderableType:
        from rich.console import Group

        parts: list[RenderableType] = [render.run_view(found), "", render.summary(found)]
        for stage in found.stages:
            for gate in stage.metadata.gates:
                if render.verdict(gate.verdict) == "WAIVED":
                    parts.append(f"\n{stage.name}: {gate.gate} was {gate.detail}")
        if (figures := evaluation.of_run(found)) is not None:
            parts += ["", figures]
        if found.error.message:
            parts.append(f"\nerror: {found.error.message}")
        return Group(*parts)

    show(found, view)


@app.command("watch")
@command
def watch_(run_id: RunId, output: Output = Format.TABLE) -> None:
    """Follow a run until it ends; exit 1 when it does not succeed."""
    follow(run_id)


@app.command()
@command
def logs(
    run_id: RunId,
    stage: Annotated[str, typer.Option(help="Only this stage.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it ends.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """What the run's jobs logged."""
    with client() as api:
        for line in api.logs(run_id, stage=stage, follow=follow):
            if as_json():
                import json

                from google.protobuf.json_format import MessageToDict

                print(json.dumps(MessageToDict(line, preserving_proto_field_name=True)), flush=True)
            else:
                head = f"{render.local(line.time)[11:]} {line.stage:<10} {line.level:<7} "
                render.console.print(head, style="dim", end="", highlight=False)
                render.console.print(line.message, highlight=False, soft_wrap=True)


@app.command()
@command
def cancel(run_id: RunId, output: Output = Format.TABLE) -> None:
    """Stop a run; what it finished stays in the store."""
    with client() as api:
        api.cancel_run(run_id)
        ended = api.wait(run_id, timeout=30)
    show(ended, lambda: f"{ended.id} {render.run_state(ended.state)}")


@app.command()
@command
def pause(run_id: RunId, output: Output = Format.TABLE) -> None:
    """Hold a run: jobs save and give their resources back, no more start."""
    with client() as api:
        held = api.pause_run(run_id)
    show(held, lambda: f"{held.id} is paused; go on: arriero runs resume {held.id}")


@app.command()
@command
def resume(run_id: RunId, output: Output = Format.TABLE) -> None:
    """Let a paused run go on from where it was held."""
    with client() as api:
        going = api.resume_run(run_id)
    show(going, lambda: f"{going.id} goes on")


@app.command()
@command
def retry(
    run_id: RunId,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait.")] = False,
    waive: Annotated[
        list[str] | None,
        typer.Option(help="Let this failed gate pass, such as merge.logits.", metavar="GATE"),
    ] = None,
    reason: Annotated[
        str, typer.Option(help="Why it may pass; kept with the artifact.", metavar="TEXT")
    ] = "",
    stage: Annotated[
        str, typer.Option(help="Whose gate it is, where several stages failed by it.")
    ] = "",
    output: Output = Format.TABLE,
) -> None:
    """Start a run again from what failed or was cancelled.

    With --waive the work of a stage that a gate refused is not repeated: its
    artifact is let through as it is, and the waiver stays with it.
    """
    if (reason or stage) and not waive:
        raise InvalidArgument.field("--waive", "is missing: --reason and --stage go with it")
    if waive and not reason.strip():
        raise InvalidArgument.field("--reason", "is missing: a waiver says why")
    waivers = [pb.GateWaiver(gate=gate, reason=reason, stage=stage) for gate in waive or ()]
    with client() as api:
        again = api.retry_run(run_id, waivers=waivers)
    if detach:
        show(again, lambda: again.id)
    else:
        follow(again.id)
