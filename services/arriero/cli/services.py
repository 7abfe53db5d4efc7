"""`arriero up`, `down` and `status`: the services of this machine.

Responsibility: start, stop and show them. Does not know what they do.
"""

from __future__ import annotations

import logging
import signal
import socket
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from arriero.cli import local, render
from arriero.cli.session import Format, Output, as_json, command, show
from arriero.cli.supervisor import Home, Supervisor
from arriero.errors import FailedPrecondition
from arriero.rpc import parent
from arriero.rpc.channel import check_health

_STARTING = "starting the services"


@command
def up(
    detach: Annotated[
        bool, typer.Option("--detach", help="Go to the background once everything serves.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(help="The orchestrator's; default: a free one.", min=1, max=65535),
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="The Prometheus page's.", min=1, max=65535)
    ] = None,
    gateway_port: Annotated[
        int | None, typer.Option(help="The HTTP gateway's.", min=1, max=65535)
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Start all services on this machine; Ctrl-C stops them."""
    home = Home.default()
    ports = {"--port": port, "--metrics-port": metrics_port, "--gateway-port": gateway_port}
    arguments = [
        word for name, value in ports.items() if value is not None for word in (name, str(value))
    ]
    if detach:
        if as_json():
            render.print_json(local.start_detached(home, arguments))
            return
        with render.console.status(_STARTING):
            state = local.start_detached(home, arguments)
        render.console.print(view(home, state))
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    supervisor = Supervisor(home, port=port, metrics_port=metrics_port, gateway_port=gateway_port)
    signal.signal(signal.SIGTERM, supervisor.stop)
    signal.signal(signal.SIGINT, supervisor.stop)

    if (starter := parent.from_env()) is not None:
        parent.watch(starter, supervisor.stop)

    # On standard error: the services' addresses are for whoever reads standard output.
    with render.errors.status(_STARTING) as starting:

        def on_ready(state: dict[str, Any]) -> None:
            starting.stop()
            show(state, lambda: view(home, state))

        def on_stop() -> None:
            starting.update("stopping; runs go on at the next `arriero up`")
            starting.start()

        supervisor.run(on_ready, on_stop)


@command
def replicas() -> None:
    """Run the replicas of endpoints alone, beside services that run in containers."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    supervisor = Supervisor(Home.default())
    signal.signal(signal.SIGTERM, supervisor.stop)
    signal.signal(signal.SIGINT, supervisor.stop)
    supervisor.run_replicas()


@command
def down(output: Output = Format.TABLE) -> None:
    """Stop everything that `arriero up` started; runs go on at the next `up`."""
    home = Home.default()
    if as_json():
        stopped = local.stop(home)
    else:
        with render.console.status("stopping"):
            stopped = local.stop(home)
    show(
        {"stopped": stopped},
        lambda: "stopped" if stopped else f"nothing runs in {home.root}",
    )


@command
def status(output: Output = Format.TABLE) -> None:
    """What runs here; exit 1 when nothing does."""
    home = Home.default()
    state = home.running()
    if state is None:
        raise FailedPrecondition(f"nothing runs in {home.root}; start it: arriero up --detach")
    for name, service in state["services"].items():
        check = _listens if name == "gateway" else check_health
        service["ready"] = check(service["address"])
    show(state, lambda: view(home, state))


def _listens(address: str) -> bool:
    """Whether somebody accepts connections: HTTP has no health that TLS does not hide."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=2):
            return True
    except OSError:
        return False


def view(home: Home, state: dict[str, Any]) -> RenderableType:
    """The services with their addresses."""
    made = render.table("service", "address", "pid", "")
    for name, service in state["services"].items():
        ready = service.get("ready", True)
        made.add_row(
            name,
            service["address"],
            str(service["pid"]),
            Text("ready", "green") if ready else Text("not ready", "red"),
        )
    return Group(
        made,
        f"gateway  {state['gateway']}",
        f"metrics  {state['metrics']}",
        f"store    {state['store']}",
        f"logs     {home.logs}",
    )
