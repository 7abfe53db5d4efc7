"""`python -m arriero.dataset.worker`: does batches that come through a pipe.

Responsibility: read a batch from standard input, answer on standard output,
until the input ends, as it does when whoever started this is gone. Does not
know files, jobs or services: it imports little, so that it starts soon.
"""

from __future__ import annotations

import marshal
import os
import signal
import struct
import sys
from typing import IO, Any

from arriero.dataset.batches import Batches, Settings, as_format, read

_SIZE = struct.Struct("<Q")


def send(stream: IO[bytes], value: Any) -> None:
    """Write a value of plain types."""
    data = marshal.dumps(value)
    stream.write(_SIZE.pack(len(data)) + data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """The next value.

    Raises:
        EOFError: there is none.
    """
    header = stream.read(_SIZE.size)
    if len(header) < _SIZE.size:
        raise EOFError
    (size,) = _SIZE.unpack(header)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return marshal.loads(data)


def main() -> None:
    """Serve until the input ends."""
    # The job says when it is over, by closing the pipe.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    batches: Batches | None = None
    while True:
        try:
            task, form, values, argument = receive(sys.stdin.buffer)
            if task == "settings":
                batches = Batches(Settings(**argument))
                continue
            if task == "read":
                answer = read(as_format(form), values, *argument)
            else:
                assert batches is not None, "settings come before rows"
                answer = batches.encode(as_format(form), values, argument)
            send(answers, answer)
        except (EOFError, BrokenPipeError):
            os._exit(0)


if __name__ == "__main__":
    main()
