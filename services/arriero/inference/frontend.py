"""The replica's side of the engine process: start it, talk to it, start it again.

Responsibility: requests of many callers over one pipe, and what they are told
when the engine dies. Does not know llama.cpp, gRPC or templates.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from arriero import errors
from arriero.inference import frames
from arriero.inference.adapters import AdapterFile
from arriero.metrics import EngineLoad
from arriero.replica import ReplicaSettings

logger = logging.getLogger(__name__)

# Delays before the engine is started again after it died, in seconds; the last repeats.
BACKOFF = (0.0, 1.0, 5.0, 15.0)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the engine is started with.

    Attributes:
        path: of the GGUF file, or of a checkpoint's directory.
        settings: how to serve it.
        adapters: to have from the start.
        module: that is the engine.
    """

    path: Path
    settings: ReplicaSettings = field(default_factory=ReplicaSettings)
    adapters: tuple[AdapterFile, ...] = ()
    module: str = "arriero.inference.engine"


@dataclass
class Frontend:
    """Keeps one engine running and lets many callers use it.

    Args:
        options: what to start it with.
        on_ready: told True when the engine serves and False when it died.

    Attributes:
        adapters: that the engine has, and that the next one will have, by name.
    """

    options: EngineOptions
    on_ready: Callable[[bool], Awaitable[object]]
    model: frames.Frame = field(default_factory=dict)
    adapters: dict[str, AdapterFile] = field(default_factory=dict)
    # Of each adapter: the template that it was trained with.
    _templates: dict[str, str] = field(default_factory=dict)
    _load: EngineLoad = field(default_factory=EngineLoad)
    # Of engines that died: their totals.
    _before: EngineLoad = field(default_factory=EngineLoad)
    _pending: dict[int, asyncio.Queue[dict[str, Any]]] = field(default_factory=dict)
    _ids: Any = field(default_factory=lambda: itertools.count(1))
    _writer: asyncio.StreamWriter | None = None
    _process: asyncio.subprocess.Process | None = None
    _closing: bool = False

    def __post_init__(self) -> None:
        self.adapters = {file.name: file for file in self.options.adapters}

    async def run(self) -> None:
        """Start the engine, and again whenever it dies, until `close`.

        Raises:
            ArrieroError: the model cannot be loaded; starting again won't help.
        """
        deaths = 0
        while not self._closing:
            served = await self._serve_once()
            # Callers that are told to go elsewhere must not find this replica ready.
            await self.on_ready(False)
            self._before = replace(self.load, running=0, waiting=0, kv_usage=0.0)
            self._load = EngineLoad()
            self._fail_pending()
            if self._closing:
                return
            deaths = 0 if served else deaths + 1
            delay = BACKOFF[min(deaths, len(BACKOFF) - 1)]
            logger.error("the engine process died; starting it again in %.0f s", delay)
            await asyncio.sleep(delay)

    async def _serve_once(self) -> bool:
        """One life of the engine; whether it got as far as serving."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self.options.module,
                str(theirs.fileno()),
                self._start_with(),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
            )
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=frames.MAX_BYTES)
        served = False
        try:
            while (frame := await frames.read(reader)) is not None:
                if "failed" in frame:
                    raise _error(frame["failed"])
                if "ready" in frame:
                    served = True
                    self.model = frame["ready"]
                    self._templates = {a["name"]: a["template"] for a in self.model["adapters"]}
                    await self.on_ready(True)
                if "load" in frame:
                    self._load = EngineLoad(*frame["load"])
                now = time.monotonic()
                for event in frame.get("events", ()):
                    waiting = self._pending.get(event["id"])
                    if waiting is not None:
                        event["at"] = now
                        waiting.put_nowait(event)
        finally:
            self._writer.close()
            self._writer = None
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()
        return served

    def _start_with(self) -> str:
        """As the engine process reads it."""
        return json.dumps(
            {
                "path": str(self.options.path),
                "settings": self.options.settings.environment(),
                "adapters": [asdict(file) for file in self.adapters.values()],
            }
        )

    def _fail_pending(self) -> None:
        died = {
            "done": True,
            "error": {
                "code": "UNAVAILABLE",
                "message": "the engine of this replica died and is being started again; "
                "the request can be sent once more",
            },
        }
        for waiting in self._pending.values():
            waiting.put_nowait({**died, "at": time.monotonic()})

    async def request(self, **command: Any) -> AsyncIterator[dict[str, Any]]:
        """Send a command and yield its events; leaving early cancels it.

        `at` of an event says when it came, which may be before it was asked for.

        Raises:
            Unavailable: no engine runs now.
            ArrieroError: what the engine refused it for.
        """
        if self._writer is None or not self.model:
            raise errors.Unavailable("the model of this replica is not loaded yet; try again soon")
        request = next(self._ids)
        try:
            message = frames.encode({**command, "id": request})
        except ValueError as error:
            raise errors.InvalidArgument(f"the request is too large: {error}") from None
        events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._pending[request] = events
        done = False
        try:
            self._writer.write(message)
            await self._writer.drain()
            while not done:
                event = await events.get()
                done = bool(event.get("done"))
                if "error" in event:
                    raise _error(event["error"])
                yield event
        except ConnectionError as error:
            done = True
            raise errors.Unavailable("the engine of this replica died; send it again") from error
        finally:
            del self._pending[request]
            if not done and self._writer is not None:
                self._writer.write(frames.encode({"op": "cancel", "id": request}))

    async def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command that has one answer."""
        async for event in self.request(**command):
            return event
        raise errors.Internal("the engine gave no answer")

    async def load_adapter(self, file: AdapterFile) -> None:
        """Load an adapter, also into engines to come.

        Raises:
            AlreadyExists: the name is another adapter's.
            FailedPrecondition: it is none of this model's.
        """
        answer = await self.ask(op="load_adapter", adapter=asdict(file))
        self.adapters[file.name] = file
        self._templates[file.name] = answer["adapter"]["template"]

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter away; who is answered with it is answered to the end.

        Raises:
            NotFound: no such adapter.
        """
        await self.ask(op="unload_adapter", name=name)
        self.adapters.pop(name, None)
        self._templates.pop(name, None)

    def template_of(self, adapter: str) -> str:
        """What an adapter's rows were rendered with, as JSON; empty when nobody knows."""
        return self._templates.get(adapter, "")

    @property
    def load(self) -> EngineLoad:
        """What the engine does, and what all engines of this replica did."""
        return self._load + self._before

    @property
    def pid(self) -> int | None:
        """The engine's process, while it runs."""
        return self._process.pid if self._process is not None else None

    def close(self) -> None:
        """End the engine."""
        self._closing = True
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGKILL)


def _error(found: dict[str, Any]) -> errors.ArrieroError:
    """The exception that an engine's message stands for."""
    message = str(found["message"])
    if found["code"] == "INVALID_ARGUMENT":
        return errors.InvalidArgument(
            message,
            violations=[errors.FieldViolation(f, d) for f, d in found.get("violations", ())],
            reason=found.get("reason"),
        )
    for kind in (
        errors.AlreadyExists,
        errors.ResourceExhausted,
        errors.Unavailable,
        errors.DataLoss,
        errors.NotFound,
        errors.FailedPrecondition,
        errors.OutOfRange,
    ):
        if kind.code == found["code"]:
            return kind(message, reason=found.get("reason"))
    return errors.Internal(message)
