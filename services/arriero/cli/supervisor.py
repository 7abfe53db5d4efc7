"""`arriero up`: every service of this machine, and the replicas of its endpoints.

Responsibility: start processes, restart what dies, drain what is no longer
wanted, and leave none behind. Does not know what any service does; it learns
which replicas are wanted from files that the orchestrator writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from arriero import settings
from arriero.cli.replicas import Process, Replicas
from arriero.errors import FailedPrecondition, Unavailable
from arriero.rpc import parent
from arriero.rpc.parent import process_start
from arriero.rpc.ports import free_port, is_free
from arriero.store import write_atomic

logger = logging.getLogger(__name__)

ROOMS = ("dataset", "training", "merging", "quantization")
# Restart delays after consecutive quick deaths, in seconds; the last repeats.
BACKOFF = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
# A process that lived this long starts over at the first delay.
STEADY_SECONDS = 30.0
STOP_SECONDS = 25.0
# How often ports are chosen again that somebody else took first.
START_TRIES = 4


@dataclass
class Child:
    """One supervised process: how to start it, and what became of it."""

    name: str
    command: list[str]
    env: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    deaths: int = 0
    not_before: float = 0.0

    def start(self) -> None:
        """Exec the process in a group of its own; its output goes to its log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                self.command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        self.started = time.monotonic()

    @property
    def alive(self) -> bool:
        """Whether the process runs now."""
        return self.process is not None and self.process.poll() is None

    def terminate(self) -> None:
        """Ask it to drain and leave."""
        if self.alive and self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()

    def kill(self) -> None:
        """End it and its whole group."""
        if self.alive and self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def tail(self, lines: int = 8) -> str:
        """The end of its log."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


@dataclass
class Home:
    """What lies under `ARRIERO_HOME`."""

    root: Path

    @classmethod
    def default(cls) -> Home:
        """`$ARRIERO_HOME`, or `~/.arriero`."""
        return cls(settings.home())

    @property
    def state(self) -> Path:
        """Who runs here now: addresses and pids; gone when nothing runs."""
        return self.root / "state.json"

    @property
    def logs(self) -> Path:
        """One log per process."""
        return self.root / "logs"

    @property
    def store(self) -> str:
        """The model store's URL; `ARRIERO_STORE` overrides."""
        return os.environ.get("ARRIERO_STORE") or (self.root / "store").as_uri()

    @property
    def platform(self) -> Path:
        """Desired and actual replicas, as files."""
        return self.root / "platform"

    def running(self) -> dict[str, Any] | None:
        """The state file of a supervisor that is alive, or None."""
        try:
            state: dict[str, Any] = json.loads(self.state.read_text())
        except (OSError, ValueError):
            return None
        pid, started = int(state.get("pid", 0)), state.get("start")
        return state if pid and process_start(pid) == started else None

    def make(self) -> None:
        """Make its directories, readable by their owner alone.

        Raises:
            FailedPrecondition: they cannot be made or written there.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            os.chmod(self.root, 0o700)
        except OSError as error:
            raise FailedPrecondition(
                f"{self.root} cannot be Arriero's home: {error.strerror}; set ARRIERO_HOME to a "
                "directory that you may write"
            ) from error

    @contextlib.contextmanager
    def lock(self) -> Iterator[IO[str]]:
        """Only one supervisor per home.

        Raises:
            FailedPrecondition: another one runs, named by its pid; or no home can be
                made there.
        """
        self.make()
        with (self.root / "up.lock").open("a+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.seek(0)
                pid = handle.read().strip() or "unknown"
                raise FailedPrecondition(
                    f"Arriero already runs in {self.root} (pid {pid}); "
                    "`arriero status` shows it, `arriero down` stops it"
                ) from None
            handle.seek(0)
            handle.truncate()
            handle.write(str(os.getpid()))
            handle.flush()
            yield handle


@dataclass
class Supervisor:
    """Runs everything of one home until told to stop.

    Args:
        home: where state, logs, store and database lie.
        port: the orchestrator's; default: the one of last time, else a free one.
        metrics_port: of the Prometheus page, likewise.
        gateway_port: of the HTTP gateway, likewise.
    """

    home: Home
    port: int | None = None
    metrics_port: int | None = None
    gateway_port: int | None = None
    children: dict[str, Child] = field(default_factory=dict)
    stopping: threading.Event = field(default_factory=threading.Event)

    def run(
        self,
        on_ready: Callable[[dict[str, Any]], None] = lambda state: None,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """Start, supervise, and on SIGTERM or SIGINT stop everything.

        Args:
            on_ready: called with the state file when everything serves.
            on_stop: called before what runs is stopped.

        Raises:
            FailedPrecondition: another supervisor holds the home.
            Unavailable: a service did not become ready; its log's end is quoted.
        """
        with self.home.lock():
            replicas = self._replicas()
            try:
                ports = self._start()
                state = self._publish_state(ports)
                on_ready(state)
                while not self.stopping.wait(0.2):
                    self._restart_dead()
                    replicas.reconcile()
            finally:
                on_stop()
                self.home.state.unlink(missing_ok=True)
                self._stop(replicas)

    def run_replicas(self) -> None:
        """Run the replicas alone: the services run elsewhere on this machine.

        Raises:
            FailedPrecondition: another supervisor holds the home.
        """
        with self.home.lock():
            replicas = self._replicas()
            try:
                while not self.stopping.wait(0.2):
                    replicas.reconcile()
            finally:
                self._stop(replicas)

    def _replicas(self) -> Replicas:
        # What an earlier supervisor ran ended with it.
        for stale in (self.home.platform / "actual").glob("*.json"):
            stale.unlink()
        return Replicas(
            directory=self.home.platform,
            base_env=self._env(),
            logs=self.home.logs,
            spawn=Child,
            pick_port=free_port,
        )

    def stop(self, *_: object) -> None:
        """Ask `run` to end (also a signal handler)."""
        self.stopping.set()

    def _ports(self) -> dict[str, int]:
        remembered: dict[str, int] = {}
        path = self.home.root / "ports.json"
        with contextlib.suppress(OSError, ValueError):
            remembered = json.loads(path.read_text())
        wanted = {
            "orchestrator": self.port,
            "metrics": self.metrics_port,
            "gateway": self.gateway_port,
        }
        ports: dict[str, int] = {}
        for name in (*wanted, *ROOMS):
            asked = wanted.get(name)
            port = free_port(asked or remembered.get(name))
            if asked and port != asked:
                raise FailedPrecondition(
                    f"port {asked} for {name} is taken on 127.0.0.1; choose another"
                )
            ports[name] = port
        write_atomic(path, json.dumps(ports).encode())
        return ports

    def _env(self) -> dict[str, str]:
        env = {
            **os.environ,
            "ARRIERO_STORE": self.home.store,
            **parent.environment(),
            "PYTHONUNBUFFERED": "1",
        }
        env.setdefault("ARRIERO_ALLOWED_PATHS", _default_paths())
        if not (env.get("ARRIERO_TOKEN") or env.get("ARRIERO_TOKEN_FILE")):
            # Services call each other: what they accept of callers lets them in as well.
            env["ARRIERO_TOKEN_FILE"] = env.get("ARRIERO_SERVER_TOKEN_FILE", "")
        return env

    def _start(self) -> dict[str, int]:
        """Start every service; the ports that they listen on."""
        for left in reversed(range(START_TRIES)):
            ports = self._ports()
            try:
                self._start_at(ports)
                return ports
            except Unavailable:
                # Somebody may have come first to a port that was free a moment ago.
                dead = [name for name, child in self.children.items() if not child.alive]
                taken = [port for name, port in ports.items() if name in dead]
                taken += [ports["metrics"]] if "orchestrator" in dead else []
                if not left or all(is_free(port) for port in taken):
                    raise
                logger.warning("somebody took a port first; choosing others")
                self._end(self.children.values())
                self.children.clear()
        raise AssertionError

    def _start_at(self, ports: dict[str, int]) -> None:
        for room in ROOMS:
            self._add(room, {"ARRIERO_LISTEN": f"127.0.0.1:{ports[room]}"})
        addresses = {
            f"ARRIERO_{room.upper()}_ADDRESS": f"127.0.0.1:{ports[room]}" for room in ROOMS
        }
        self._add(
            "orchestrator",
            {
                **addresses,
                "ARRIERO_LISTEN": f"127.0.0.1:{ports['orchestrator']}",
                "ARRIERO_METRICS_LISTEN": f"127.0.0.1:{ports['metrics']}",
                "ARRIERO_DATABASE_URL": os.environ.get("ARRIERO_DATABASE_URL")
                or f"sqlite:///{self.home.root / 'orchestrator.sqlite'}",
                "ARRIERO_PLATFORM": "local",
                "ARRIERO_PLATFORM_DIR": str(self.home.platform),
            },
        )
        self._add(
            "gateway",
            {
                "ARRIERO_ADDRESS": f"127.0.0.1:{ports['orchestrator']}",
                "ARRIERO_LISTEN": f"127.0.0.1:{ports['gateway']}",
            },
        )
        deadline = time.monotonic() + 120
        for name, child in self.children.items():
            address = self.home.root / "run" / f"{name}.address"
            while not address.exists() and not self.stopping.is_set():
                if not child.alive:
                    raise Unavailable(
                        f"the {name} service ended before it was ready; "
                        f"its log {child.log} ends with:\n{child.tail()}"
                    )
                if time.monotonic() > deadline:
                    raise Unavailable(
                        f"the {name} service is not ready after 120 s; see {child.log}"
                    )
                time.sleep(0.05)

    def _add(self, name: str, extra: dict[str, str]) -> None:
        run = self.home.root / "run"
        run.mkdir(parents=True, exist_ok=True)
        address = run / f"{name}.address"
        address.unlink(missing_ok=True)
        child = Child(
            name=name,
            command=[sys.executable, "-m", f"arriero.{name}"],
            env={**self._env(), **extra, "ARRIERO_ADDRESS_FILE": str(address)},
            log=self.home.logs / f"{name}.log",
        )
        child.start()
        self.children[name] = child

    def _publish_state(self, ports: dict[str, int]) -> dict[str, Any]:
        scheme = "https" if os.environ.get("ARRIERO_SERVER_TLS_CERT") else "http"
        state = {
            "address": f"127.0.0.1:{ports['orchestrator']}",
            "metrics": f"http://127.0.0.1:{ports['metrics']}/metrics",
            "gateway": f"{scheme}://127.0.0.1:{ports['gateway']}/v1",
            "pid": os.getpid(),
            "start": process_start(os.getpid()),
            "store": self.home.store,
            "services": {
                name: {"pid": child.process.pid, "address": f"127.0.0.1:{ports[name]}"}
                for name, child in self.children.items()
                if child.process is not None
            },
        }
        write_atomic(self.home.state, json.dumps(state, indent=1).encode())
        return state

    def _restart_dead(self) -> None:
        now = time.monotonic()
        changed = False
        for child in self.children.values():
            if child.alive or now < child.not_before:
                continue
            if child.not_before == 0.0 or child.not_before < child.started:
                code = child.process.returncode if child.process else None
                child.deaths = 0 if now - child.started > STEADY_SECONDS else child.deaths + 1
                delay = BACKOFF[min(child.deaths, len(BACKOFF) - 1)]
                child.not_before = now + delay
                logger.warning(
                    "%s ended (%s); starting it again in %.1f s", child.name, code, delay
                )
                if delay:
                    continue
            child.start()
            changed = True
        if changed:
            state = json.loads(self.home.state.read_text())
            for name, child in self.children.items():
                if child.process is not None:
                    state["services"][name]["pid"] = child.process.pid
            write_atomic(self.home.state, json.dumps(state, indent=1).encode())

    def _stop(self, replicas: Replicas) -> None:
        # The orchestrator first: it must not see its rooms leave as failures.
        order = sorted(self.children.values(), key=lambda child: child.name != "orchestrator")
        self._end([*order, *replicas.processes()])
        replicas.forget()

    @staticmethod
    def _end(everyone: Collection[Process]) -> None:
        for child in everyone:
            child.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        while any(child.alive for child in everyone) and time.monotonic() < deadline:
            time.sleep(0.05)
        for child in everyone:
            child.kill()


def _default_paths() -> str:
    """What the services of a laptop may read: the user's home, here, and temporary files."""
    import tempfile

    paths = [str(Path.home()), str(Path.cwd()), tempfile.gettempdir()]
    return ":".join(dict.fromkeys(os.path.realpath(path) for path in paths))
