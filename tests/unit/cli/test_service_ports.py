"""Ports for services that are about to start."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from arriero.cli import supervisor
from arriero.errors import Unavailable
from arriero.rpc import ports


def test_the_preferred_port_is_taken_if_free() -> None:
    port = ports.free_port()
    assert ports.is_free(port)
    assert ports.free_port(port) == port
    with socket.create_server(("127.0.0.1", port)):
        assert not ports.is_free(port)
        assert ports.free_port(port) != port


def test_ports_lie_below_those_that_the_kernel_gives_away(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as given:
        lowest = min(given.getsockname()[1], ports._ephemeral())
    assert all(ports.free_port() < lowest for _ in range(50))


@pytest.fixture
def one_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """A supervisor of nothing but a listening process in each service's place."""
    monkeypatch.setattr(supervisor, "ROOMS", ())
    serve = (
        "import os, socket, time;"
        "host, port = os.environ['ARRIERO_LISTEN'].rsplit(':', 1);"
        "s = socket.create_server((host, int(port)));"
        "open(os.environ['ARRIERO_ADDRESS_FILE'], 'w').write('x');"
        "time.sleep(60)"
    )
    start = supervisor.Child.start

    def stand_in(child: supervisor.Child) -> None:
        child.command = [child.command[0], "-S", "-c", serve]
        start(child)

    monkeypatch.setattr(supervisor.Child, "start", stand_in)


@pytest.mark.usefixtures("one_service")
@pytest.mark.parametrize("times", [1, 9])
def test_a_port_that_somebody_takes_first_is_chosen_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = [other.getsockname()[1]] * times

        def free_port(preferred: int | None = None) -> int:
            return taken.pop() if taken else ports.free_port()

        monkeypatch.setattr(supervisor, "free_port", free_port)
        made = supervisor.Supervisor(supervisor.Home(tmp_path / "home"))
        ready: list[dict[str, object]] = []

        def on_ready(state: dict[str, object]) -> None:
            ready.append(state)
            made.stop()

        if times == 1:
            made.run(on_ready)
            assert str(ready[0]["address"]) != f"127.0.0.1:{other.getsockname()[1]}"
        else:
            monkeypatch.setattr(supervisor, "START_TRIES", 2)
            with pytest.raises(Unavailable, match="ended before it was ready"):
                made.run(on_ready)
        assert not any(child.alive for child in made.children.values())
