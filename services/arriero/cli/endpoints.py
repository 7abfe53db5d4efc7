"""`arriero endpoints`, `arriero chat` and `arriero generate`.

Responsibility: serve artifacts and talk to them from a terminal. Does not know
where replicas run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from arriero.cli import render
from arriero.cli.session import Format, Output, as_json, client, command, show
from arriero.client import Client, Endpoint, Sampling
from arriero.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound
from arriero.v1 import orchestrator_pb2 as pb

app = typer.Typer(no_args_is_help=True, help="Endpoints: list, look, create, scale, delete.")

Name = Annotated[str, typer.Argument(help="The endpoint's name.")]
# How long somebody who talks to an endpoint waits for its first replica.
_START_SECONDS = 120.0
Wait = Annotated[float, typer.Option(help="Seconds to wait until ready; 0 does not wait.", min=0)]


def _settled(api: Client, name: str, seconds: float) -> pb.Endpoint:
    """The endpoint once as many replicas are ready as are desired, and no more run."""
    deadline = time.monotonic() + seconds
    while True:
        found = api.endpoints.get(name)
        live = [r for r in found.replicas if r.state != pb.REPLICA_STATE_FAILED]
        if found.ready_replicas == found.desired_replicas == len(live) or seconds == 0:
            return found
        failed = [r for r in found.replicas if r.state == pb.REPLICA_STATE_FAILED]
        if failed:
            raise FailedPrecondition(f"replica {failed[0].name} cannot serve: {failed[0].detail}")
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"{name} has {found.ready_replicas} of {found.desired_replicas} replicas ready "
                f"after {seconds:.0f} s; `arriero endpoints get {name}` shows why"
            )
        time.sleep(0.2)


def _served(api: Client, name: str) -> Endpoint:
    """The endpoint to talk to; while it starts (after `up`, say), it is waited for."""
    deadline = time.monotonic() + _START_SECONDS
    told = False
    while time.monotonic() < deadline:
        found = api.endpoints.get(name)
        failed = any(r.state == pb.REPLICA_STATE_FAILED for r in found.replicas)
        if found.ready_replicas or not found.desired_replicas or failed:
            break
        if not told:
            render.errors.print(f"{name} is starting …", style="dim")
            told = True
        time.sleep(0.2)
    return api.endpoint(name)


@app.command("list")
@command
def list_(output: Output = Format.TABLE) -> None:
    """What is served."""
    with client() as api:
        found = api.endpoints.list()

    def view() -> RenderableType:
        if not found:
            return (
                "nothing is served; deploy in a pipeline, or: arriero endpoints create NAME MODEL"
            )
        made = render.table("endpoint", "ready", "model", "context", "run")
        for item in found:
            made.add_row(
                item.name,
                f"{item.ready_replicas}/{item.desired_replicas}",
                render.digest(item.spec.model),
                str(item.spec.context or "model's own"),
                item.run,
            )
        return made

    show(found, view)


@app.command()
@command
def get(
    name: Name,
    score: Annotated[
        bool | None,
        typer.Option(
            help="Compare each live replica with the golden logits now; default: where it has any."
        ),
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """An endpoint: replicas, their KL divergence to the trained model, gates, lineage."""
    with client() as api:
        found = api.endpoints.get(name, score=bool(score))
        if score is None and found.spec.golden:
            found = api.endpoints.get(name, score=True)
        try:
            ancestors = api.artifacts.lineage(found.spec.model)
        except NotFound:
            ancestors = []
    if as_json():
        body = json.loads(render.to_json(found))
        body["lineage"] = json.loads(render.to_json(ancestors))
        render.print_json(body)
        return
    render.console.print(_details(found, ancestors))


def _details(item: pb.Endpoint, ancestors: list[pb.Artifact]) -> RenderableType:
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    facts.add_row("endpoint", Text(item.name, "bold"))
    facts.add_row("ready", f"{item.ready_replicas} of {item.desired_replicas}")
    facts.add_row("model", item.spec.model)
    for adapter in item.spec.adapters:
        facts.add_row(f"adapter {adapter.name}", adapter.adapter)
    if item.run:
        facts.add_row("run", item.run)
    if not item.spec.golden:
        facts.add_row(
            "golden", Text("none: replicas cannot be compared with a trained model", "dim")
        )
    if item.rollout_error:
        facts.add_row("last roll-out", Text(item.rollout_error, "red"))
    if item.gates:
        facts.add_row("gates", render.gates_text(item.gates))
    for gate in item.gates:
        if render.verdict(gate.verdict) == "WAIVED":
            facts.add_row(gate.gate, Text(gate.detail, "yellow"))
    replicas = render.table("replica", "state", "address", "metrics", "KL to trained", "top-1", "")
    for replica in item.replicas:
        state = pb.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_")
        replicas.add_row(
            replica.name,
            state,
            replica.address,
            replica.metrics_address or "–",
            f"{replica.kl_divergence:.2g} nats" if replica.HasField("kl_divergence") else "–",
            f"{replica.top1_agreement:.1%}" if replica.HasField("top1_agreement") else "–",
            replica.detail,
        )
    lineage = render.table("made from", "name", "digest", "gates")
    for artifact in ancestors:
        lineage.add_row(
            artifact.kind,
            artifact.name,
            render.digest(artifact.digest),
            render.gates_text(artifact.gates),
        )
    return Group(facts, "", replicas, "", lineage)


@app.command()
@command
def create(
    name: Name,
    model: Annotated[str, typer.Argument(help="gguf artifact: gguf/name:tag or a digest.")],
    replicas: Annotated[int, typer.Option(help="How many.", min=0)] = 1,
    context: Annotated[int, typer.Option(help="Tokens; 0: the model's own.", min=0)] = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the deploy stage: slots=8, rope=ntk."),
    ] = None,
    wait: Wait = 120,
    output: Output = Format.TABLE,
) -> None:
    """Serve a gguf artifact under a new name."""
    settings = _settings({"context": context}, set_ or [])
    with client() as api:
        api.endpoints.create(name, model, replicas=replicas, **settings)
        found = _settled(api, name, wait)
    show(found, lambda: f"{name}: {found.ready_replicas} of {found.desired_replicas} ready")


def _settings(settings: dict[str, Any], given: Iterable[str]) -> dict[str, Any]:
    """With `a.b=value` put in, values as JSON or else as text."""
    for text in given:
        path, equals, value = text.partition("=")
        *parents, last = path.split(".")
        if not equals or not last:
            raise InvalidArgument.field("--set", f"{text!r} is not field=value")
        place = settings
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise InvalidArgument.field("--set", f"{parent!r} in {text!r} is a value already")
        try:
            place[last] = json.loads(value)
        except ValueError:
            place[last] = value
    return settings


@app.command()
@command
def scale(
    name: Name,
    replicas: Annotated[int, typer.Option(help="How many.", min=0)],
    wait: Wait = 120,
    output: Output = Format.TABLE,
) -> None:
    """Set the number of replicas, and wait until it is so."""
    with client() as api:
        api.endpoints.scale(name, replicas)
        found = _settled(api, name, wait)
    show(found, lambda: f"{name}: {found.ready_replicas} of {found.desired_replicas} ready")


@app.command()
@command
def load(
    name: Name,
    adapter: Annotated[str, typer.Argument(help="adapter artifact, by adapter_only.")],
    called: Annotated[str, typer.Option("--as", help="Name that requests choose it by.")] = "",
    scale: Annotated[float, typer.Option(help="Multiplies its change of the model.")] = 1.0,
    output: Output = Format.TABLE,
) -> None:
    """Load a LoRA adapter into every replica, while it serves."""
    with client() as api:
        found = api.endpoints.add_adapter(name, adapter, called=called, scale=scale)
    show(found, lambda: _adapters(found))


@app.command()
@command
def unload(
    name: Name,
    called: Annotated[str, typer.Argument(help="The adapter's name.")],
    output: Output = Format.TABLE,
) -> None:
    """Take a LoRA adapter away from every replica."""
    with client() as api:
        found = api.endpoints.remove_adapter(name, called)
    show(found, lambda: _adapters(found))


def _adapters(item: pb.Endpoint) -> str:
    names = ", ".join(adapter.name for adapter in item.spec.adapters)
    return f"{item.name}: adapters {names or 'none'}"


@app.command()
@command
def delete(name: Name, output: Output = Format.TABLE) -> None:
    """Drain and remove an endpoint; its model stays in the store."""
    with client() as api:
        api.endpoints.delete(name)
    show({"deleted": name}, lambda: f"{name} deleted")


MaxTokens = Annotated[int | None, typer.Option(help="At most so many tokens.", min=0)]
Adapter = Annotated[str, typer.Option(help="Name of a LoRA adapter of the endpoint.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy.", min=0)]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.", min=0)]


def _sampling(max_tokens: int | None, temperature: float | None, seed: int | None) -> Sampling:
    given = Sampling()
    if max_tokens is not None:
        given["max_tokens"] = max_tokens
    if temperature is not None:
        given["temperature"] = temperature
    if seed is not None:
        given["seed"] = seed
    return given


def _say(deltas: Iterable[str]) -> str:
    """Write text as it comes; return all of it."""
    parts: list[str] = []
    for delta in deltas:
        parts.append(delta)
        if not as_json():
            sys.stdout.write(delta)
            sys.stdout.flush()
    if not as_json():
        sys.stdout.write("\n")
    return "".join(parts)


@command
def chat(
    endpoint: Name,
    prompt: Annotated[
        str | None, typer.Argument(help="One question; none: a conversation.")
    ] = None,
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = None,
    seed: Seed = None,
    adapter: Adapter = "",
    output: Output = Format.TABLE,
) -> None:
    """Talk to an endpoint, with the template that its model was trained with."""
    sampling = _sampling(max_tokens, temperature, seed)
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    with client() as api:
        served = _served(api, endpoint)
        if prompt is not None:
            messages.append({"role": "user", "content": prompt})
            answer = _say(served.chat(messages, adapter=adapter, **sampling))
            if as_json():
                render.print_json({"role": "assistant", "content": answer})
            return
        render.console.print("An empty line or Ctrl-D ends the conversation.", style="dim")
        while True:
            try:
                said = input("> ").strip()
            except EOFError:
                return
            if not said:
                return
            messages.append({"role": "user", "content": said})
            answer = _say(served.chat(messages, adapter=adapter, **sampling))
            messages.append({"role": "assistant", "content": answer})


@command
def generate(
    endpoint: Name,
    prompt: Annotated[str, typer.Argument(help="Text to continue; `-` reads standard input.")],
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    seed: Seed = None,
    adapter: Adapter = "",
    output: Output = Format.TABLE,
) -> None:
    """Continue a text as it is, without a template."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with client() as api:
        answer = _say(
            _served(api, endpoint).generate(
                text, adapter=adapter, **_sampling(max_tokens, temperature, seed)
            )
        )
    if as_json():
        render.print_json({"text": answer})
