"""A caller that leaves costs one decode step at most."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arriero.inference import frames
from arriero.inference.engine import Engine
from arriero.llama import Batch, Context, Model


class Counted(Context):
    """A context in whose fifth decode the only caller leaves."""

    count = 0
    leave: Any = None

    def decode(self, batch: Batch) -> None:
        self.count += 1
        if self.count == 5:
            self.leave()
        super().decode(batch)


@pytest.fixture
def engine(tiny_gguf: Path) -> Iterator[tuple[socket.socket, Counted]]:
    ours, theirs = socket.socketpair()
    with Model(tiny_gguf) as model, Counted(model, n_ctx=256, n_seq=2, n_threads=1) as context:
        made = Engine(theirs, model, [context], 4)
        thread = threading.Thread(target=made.run)
        thread.start()

        def leave() -> None:
            frames.send(ours, {"op": "cancel", "id": 1})
            while made._commands.empty():
                time.sleep(0.001)

        context.leave = leave
        yield ours, context
        ours.close()
        thread.join(120)
        theirs.close()
        assert not thread.is_alive()


def test_a_cancelled_stream_is_in_no_further_decode(
    engine: tuple[socket.socket, Counted],
) -> None:
    pipe, context = engine
    sampling = {"temperature": 0, "ignore_eos": True, "max_tokens": 200}
    frames.send(
        pipe,
        {"op": "generate", "id": 1, "prompt": "Go on", "add_special": True, "sampling": sampling},
    )
    # The next command waits for nothing but this one's end.
    asked = {"op": "tokenize", "id": 2, "text": "x", "add_special": False, "parse_special": False}
    load: list[float] = []
    while not load or load[0] or not load[3]:
        frame = frames.receive(pipe)
        assert frame is not None
        load = frame["load"]
    assert context.count == 5
    frames.send(pipe, asked)
    while not any(event["id"] == 2 for event in (frames.receive(pipe) or {})["events"]):
        pass
    assert context.count == 5
