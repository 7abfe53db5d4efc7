"""Replicas on this machine: start, watch, replace and drain `arriero.inference` processes.

Responsibility: make what runs equal what the orchestrator's files ask for, and
say in files what runs. Does not know what a run or a pipeline is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from arriero.replica import ADAPTERS_VARIABLE
from arriero.rpc.channel import check_health
from arriero.store import write_atomic

logger = logging.getLogger(__name__)

# Quick deaths after which a replica is given up until its spec changes.
MAX_DEATHS = 4
# Clients learn of DRAINING within this time; then the process is told to leave.
DRAIN_NOTICE_SECONDS = 3.0


class Process(Protocol):
    """What replicas need of a supervised process."""

    process: Any
    started: float
    env: dict[str, str]

    @property
    def alive(self) -> bool:
        """Whether it runs now."""

    def start(self) -> None:
        """Exec it."""

    def terminate(self) -> None:
        """Ask it to drain and leave."""

    def kill(self) -> None:
        """End it and its group."""

    def tail(self, lines: int = 8) -> str:
        """The end of its log."""


@dataclass
class Replica:
    """One process that serves one artifact."""

    name: str
    address: str
    shape: tuple[Any, ...]
    digest: str
    child: Process
    # Holds the address of its Prometheus page, once it listens.
    metrics_file: Path
    state: str = "STARTING"
    detail: str = ""
    deaths: int = 0
    drain_from: float = 0.0
    not_before: float = 0.0
    probe_at: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As the actual file has it."""
        pid = self.child.process.pid if self.child.process is not None else 0
        metrics = ""
        if self.state in ("READY", "DRAINING"):
            with contextlib.suppress(OSError):
                metrics = self.metrics_file.read_text().strip()
        return {
            "name": self.name,
            "address": self.address,
            "state": self.state,
            "digest": self.digest,
            "pid": pid,
            "detail": self.detail,
            "metrics": metrics,
        }


@dataclass
class Replicas:
    """All replicas of one machine.

    Args:
        directory: holds `desired/` (read) and `actual/` (written).
        base_env: environment of every replica process.
        logs: where their logs go.
        spawn: makes a process from name, command, env and log.
        pick_port: a port that is free now.
        healthy: whether an address answers that it is ready.
    """

    directory: Path
    base_env: dict[str, str]
    logs: Path
    spawn: Callable[..., Process]
    pick_port: Callable[[], int]
    healthy: Callable[[str], bool] = check_health
    _endpoints: dict[str, list[Replica]] = field(default_factory=dict)
    _written: dict[str, str] = field(default_factory=dict)
    _count: int = 0

    def processes(self) -> Iterable[Process]:
        """Every replica process, to be ended with the supervisor."""
        return [replica.child for group in self._endpoints.values() for replica in group]

    def forget(self) -> None:
        """Say that nothing runs any more."""
        for name in self._endpoints:
            (self.directory / "actual" / f"{name}.json").unlink(missing_ok=True)

    def reconcile(self) -> None:
        """One step towards what is desired; never blocks longer than a health probe."""
        desired = self._desired()
        for name in [*desired, *(n for n in self._endpoints if n not in desired)]:
            want = desired.get(name)
            group = self._endpoints.setdefault(name, [])
            self._observe(group)
            if want is None:
                for replica in group:
                    self._drain(replica)
            else:
                self._converge(name, group, want)
            group[:] = [r for r in group if not (r.state == "DRAINING" and not r.child.alive)]
            if want is None and not group:
                del self._endpoints[name]
                self._written.pop(name, None)
                (self.directory / "actual" / f"{name}.json").unlink(missing_ok=True)
            else:
                self._write(name, want, group)

    def _desired(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for path in sorted((self.directory / "desired").glob("*.json")):
            with contextlib.suppress(OSError, ValueError):
                found[path.stem] = json.loads(path.read_text())
        return found

    def _observe(self, group: list[Replica]) -> None:
        now = time.monotonic()
        for replica in group:
            if replica.state == "DRAINING":
                if replica.drain_from and now >= replica.drain_from:
                    replica.child.terminate()
                    replica.drain_from = 0.0
                continue
            if not replica.child.alive:
                self._mourn(replica, now)
            elif now >= replica.probe_at:
                replica.probe_at = now + (0.25 if replica.state == "STARTING" else 2.0)
                ready = self.healthy(replica.address)
                if ready and replica.state != "READY":
                    replica.state, replica.detail, replica.deaths = "READY", "", 0
                elif not ready and replica.state == "READY":
                    replica.state, replica.detail = "STARTING", "does not answer that it is ready"

    def _mourn(self, replica: Replica, now: float) -> None:
        if replica.state == "FAILED":
            return
        if replica.not_before == 0.0:
            replica.deaths += 1
            replica.state = "STARTING"
            replica.detail = f"ended; its log ends with: {replica.child.tail(3)}"
            if replica.deaths >= MAX_DEATHS:
                replica.state = "FAILED"
                logger.error("replica %s gave up: %s", replica.name, replica.detail)
                return
            replica.not_before = now + min(0.5 * 2**replica.deaths, 10.0)
        elif now >= replica.not_before:
            replica.not_before = 0.0
            replica.child.start()

    def _converge(self, name: str, group: list[Replica], want: dict[str, Any]) -> None:
        environment = want["environment"]
        told = {ADAPTERS_VARIABLE}  # while it runs, by whoever wants another set
        shape = (want["digest"], *sorted((k, v) for k, v in environment.items() if k not in told))
        right = [r for r in group if r.shape == shape and r.state != "DRAINING"]
        wrong = [r for r in group if r.shape != shape and r.state != "DRAINING"]
        for replica in right:
            # Should it be started again, then with what is wanted now.
            replica.child.env.update({name: environment.get(name, "") for name in told})
        count = int(want["replicas"])
        while len(right) < count:
            right.append(self._launch(name, group, want, shape))
        for replica in right[count:]:
            self._drain(replica)
        # An old replica leaves only when a new one has taken its place.
        ready = sum(r.state == "READY" for r in right[:count])
        keep = max(0, count - ready)
        serving = [r for r in wrong if r.state == "READY"]
        for replica in [r for r in wrong if r.state != "READY"] + serving[keep:]:
            self._drain(replica)

    def _launch(
        self, name: str, group: list[Replica], want: dict[str, Any], shape: tuple[Any, ...]
    ) -> Replica:
        self._count += 1
        replica_name = f"{name}-{self._count}"
        address = f"127.0.0.1:{self.pick_port()}"
        metrics_file = self.directory / "metrics" / replica_name
        metrics_file.parent.mkdir(parents=True, exist_ok=True)
        env = {
            **self.base_env,
            "ARRIERO_LISTEN": address,
            # Any free port: nobody needs to know it before it is bound.
            "ARRIERO_METRICS_LISTEN": "127.0.0.1:0",
            "ARRIERO_METRICS_ADDRESS_FILE": str(metrics_file),
            **want["environment"],
        }
        child = self.spawn(
            name=replica_name,
            command=[sys.executable, "-m", "arriero.inference"],
            env=env,
            log=self.logs / f"{replica_name}.log",
        )
        child.start()
        replica = Replica(replica_name, address, shape, want["digest"], child, metrics_file)
        group.append(replica)
        return replica

    def _drain(self, replica: Replica) -> None:
        if replica.state == "DRAINING":
            return
        notice = DRAIN_NOTICE_SECONDS if replica.state == "READY" else 0.0
        replica.state, replica.detail = "DRAINING", ""
        replica.drain_from = time.monotonic() + notice

    def _write(self, name: str, want: dict[str, Any] | None, group: list[Replica]) -> None:
        body = json.dumps(
            {
                "name": name,
                "generation": (want or {}).get("generation", 0),
                "replicas": [replica.to_dict() for replica in group],
            },
            sort_keys=True,
        )
        if self._written.get(name) != body:
            actual = self.directory / "actual"
            actual.mkdir(parents=True, exist_ok=True)
            write_atomic(actual / f"{name}.json", body.encode())
            self._written[name] = body
