"""What runs becomes what is desired, and serving never pauses on the way."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from arriero.cli import replicas as module
from arriero.cli.replicas import MAX_DEATHS, Replicas


@dataclass
class FakeProcess:
    pid: int


@dataclass
class FakeChild:
    name: str
    command: list[str]
    env: dict[str, str]
    log: Path
    process: FakeProcess | None = None
    started: float = 0.0
    running: bool = False
    starts: int = 0
    told: list[str] = field(default_factory=list)

    @property
    def alive(self) -> bool:
        return self.running

    def start(self) -> None:
        self.running = True
        self.starts += 1
        self.process = FakeProcess(1000 + self.starts)

    def terminate(self) -> None:
        self.told.append("terminate")
        self.running = False

    def kill(self) -> None:
        self.running = False

    def tail(self, lines: int = 8) -> str:
        return "it said why"


class World:
    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.now = 100.0
        self.healthy: set[str] = set()
        self.children: list[FakeChild] = []
        self.ports = iter(range(5000, 6000))
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)

        def spawn(**known: Any) -> FakeChild:
            self.children.append(FakeChild(**known))
            return self.children[-1]

        self.replicas = Replicas(
            directory=directory,
            base_env={"A": "b"},
            logs=directory / "logs",
            spawn=spawn,
            pick_port=lambda: next(self.ports),
            healthy=lambda address: address in self.healthy,
        )

    def want(self, digest: str = "sha256:one", replicas: int = 1, **more: Any) -> None:
        place = self.directory / "desired"
        place.mkdir(exist_ok=True)
        environment = {"ARRIERO_MODEL": digest, **more}
        body = {"name": "live", "digest": digest, "replicas": replicas, "generation": 1}
        body["environment"] = environment
        (place / "live.json").write_text(json.dumps(body))

    def step(self, seconds: float = 5.0, *, all_healthy: bool = True) -> list[dict[str, Any]]:
        self.now += seconds
        if all_healthy:
            self.healthy = {f"127.0.0.1:{port}" for port in range(5000, 6000)}
        self.replicas.reconcile()
        path = self.directory / "actual" / "live.json"
        found: list[dict[str, Any]] = (
            json.loads(path.read_text())["replicas"] if path.exists() else []
        )
        return found

    def states(self, found: list[dict[str, Any]]) -> list[tuple[str, str]]:
        return [(r["digest"], r["state"]) for r in found]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_a_replica_is_ready_only_when_it_says_so(world: World) -> None:
    world.want()
    world.step(all_healthy=False)
    assert world.states(world.step(all_healthy=False)) == [("sha256:one", "STARTING")]
    assert world.states(world.step()) == [("sha256:one", "READY")]
    assert world.children[0].env["ARRIERO_MODEL"] == "sha256:one"
    assert world.children[0].env["A"] == "b"


def test_a_new_model_serves_before_the_old_one_leaves(world: World) -> None:
    world.want(replicas=2)
    world.step()
    world.step()
    world.want("sha256:two", replicas=2)
    found = world.step(all_healthy=False)
    old = [state for digest, state in world.states(found) if digest == "sha256:one"]
    assert old == ["READY", "READY"], "new ones are not ready yet"
    for _ in range(4):
        found = world.step()
        ready = [r for r in found if r["state"] == "READY"]
        assert len(ready) >= 2
    assert world.states(found) == [("sha256:two", "READY")] * 2


def test_other_settings_are_another_replica(world: World) -> None:
    world.want(ARRIERO_SLOTS="4")
    world.step()
    world.step()
    world.want(ARRIERO_SLOTS="8")
    world.step(all_healthy=False)
    assert [child.env["ARRIERO_SLOTS"] for child in world.children] == ["4", "8"]
    for _ in range(3):
        found = world.step()
    assert [r["name"] for r in found] == ["live-2"]
    assert world.children[0].told == ["terminate"]


def test_scaling_down_drains_before_it_ends(world: World) -> None:
    world.want(replicas=3)
    world.step()
    world.step()
    world.want(replicas=1)
    found = world.step(0.1)
    assert sorted(state for _, state in world.states(found)) == ["DRAINING", "DRAINING", "READY"]
    assert not any(child.told for child in world.children), "clients are given notice first"
    world.step()
    assert world.states(world.step()) == [("sha256:one", "READY")]
    assert [child.told for child in world.children] == [[], ["terminate"], ["terminate"]]


def test_one_that_dies_is_started_again_and_given_up_at_last(world: World) -> None:
    world.want()
    world.step()
    for _ in range(MAX_DEATHS * 2):
        world.children[0].running = False
        found = world.step(20, all_healthy=False)
        world.healthy = set()
        world.step(20, all_healthy=False)
    assert found[0]["state"] == "FAILED" or world.step()[0]["state"] == "FAILED"
    assert "it said why" in world.step()[0]["detail"]
    assert world.children[0].starts == MAX_DEATHS


def test_a_deleted_endpoint_leaves_nothing(world: World) -> None:
    world.want()
    world.step()
    world.step()
    (world.directory / "desired" / "live.json").unlink()
    for _ in range(3):
        world.step()
    assert not (world.directory / "actual" / "live.json").exists()
    assert world.children[0].told == ["terminate"]
