"""The loop of an engine process: commands in, events out, one message per step.

Responsibility: the pipe, and that an idle engine sleeps. Does not know what the
commands mean.
"""

from __future__ import annotations

import queue
import socket
import threading
from abc import ABC, abstractmethod
from typing import Any

from arriero.errors import ArrieroError
from arriero.inference import frames
from arriero.inference.stream import refusal


class Loop(ABC):
    """Works until its front end closes the pipe.

    Args:
        connection: the pipe.

    Attributes:
        events: to send after this step.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._commands: queue.SimpleQueue[frames.Frame | None] = queue.SimpleQueue()
        self._told_load: list[float] = []
        self._open = True
        self.events: list[dict[str, Any]] = []

    @abstractmethod
    def idle(self) -> bool:
        """Whether there is nothing to do."""

    @abstractmethod
    def obey(self, frame: frames.Frame) -> None:
        """Take one command.

        Raises:
            ArrieroError: it is refused.
        """

    @abstractmethod
    def work(self) -> None:
        """One step."""

    @abstractmethod
    def load(self) -> list[float]:
        """In the order of `arriero.metrics.EngineLoad`."""

    def run(self) -> None:
        """Work until the pipe closes."""
        threading.Thread(target=self._listen, daemon=True).start()
        while self._open:
            self._take_commands()
            self.work()
            self._flush()

    def answer(self, frame: frames.Frame, **fields: Any) -> None:
        """The one answer to a command."""
        self.events.append({"id": frame["id"], "done": True, **fields})

    def refuse(self, request: int, error: ArrieroError) -> None:
        """The end of a request."""
        self.events.append(refusal(request, error))

    def _listen(self) -> None:
        while True:
            try:
                frame = frames.receive(self._connection)
            except OSError:
                frame = None
            self._commands.put(frame)
            if frame is None:
                return

    def _take_commands(self) -> None:
        idle = self.idle()
        while True:
            try:
                # An idle engine sleeps here and uses no CPU.
                frame = self._commands.get(block=idle)
            except queue.Empty:
                return
            idle = False
            if frame is None:
                self._open = False
                return
            try:
                self.obey(frame)
            except ArrieroError as error:
                self.refuse(frame["id"], error)

    def _flush(self) -> None:
        load = self.load()
        if self.events or load != self._told_load:
            try:
                frames.send(self._connection, {"events": self.events, "load": load})
            except OSError:
                self._open = False
            self.events.clear()
            self._told_load = load
