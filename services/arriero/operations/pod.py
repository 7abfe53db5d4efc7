"""The first process of a job's pod: `python -m arriero.operations.pod MODULE ASSIGNMENT`.

Responsibility: start the job, pass SIGTERM on to it, carry what it writes to its
service, and leave with its exit code. Does not know what the job does.

A process of its own, so that a job's last words arrive although it crashed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from typing import IO, NoReturn

from arriero.errors import ArrieroError
from arriero.operations.handoff import TOKEN_KEY, Assignment

# What a service that is away may miss at most; the pod's own log has everything.
_KEPT_LINES = 20_000
_BATCH_LINES, _BATCH_BYTES = 500, 1 << 20
_LONGEST = 64 * 1024
_INTERVAL = 0.5
_DEADLINE = 5.0
# How long the last lines are offered to a service that does not answer.
_LAST_SECONDS = 10.0


class Carrier:
    """Sends lines to the service, in order and each once, from a thread."""

    def __init__(self, assignment: Assignment, node: int) -> None:
        self._assignment = assignment
        self._node = node
        self._lock = threading.Lock()
        self._lines: deque[bytes] = deque()
        self._first = 1
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="carrier", daemon=True)

    def start(self) -> None:
        """Begin; without an address to report to this does nothing."""
        if self._assignment.report_address:
            self._thread.start()

    def add(self, line: bytes) -> None:
        """Take a line, without its end."""
        with self._lock:
            self._lines.append(line[:_LONGEST])
            if len(self._lines) > _KEPT_LINES:
                self._lines.popleft()
                self._first += 1

    def close(self) -> None:
        """Send what is left; takes seconds when the service is away."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_LAST_SECONDS + _DEADLINE)

    def _run(self) -> None:
        # Imported here, beside the job's own start.
        import grpc

        from arriero.rpc.channel import connect_sync
        from arriero.settings import ClientSettings
        from arriero.v1 import job_pb2_grpc

        address = self._assignment.report_address
        give_up = 0.0
        with connect_sync(address, ClientSettings.from_env()) as channel:
            stub = job_pb2_grpc.JobServiceStub(channel)
            while True:
                closing = self._closing.wait(_INTERVAL)
                if closing and not give_up:
                    give_up = time.monotonic() + _LAST_SECONDS
                try:
                    left = self._send(stub)
                except grpc.RpcError as error:
                    if error.code() in (  # type: ignore[attr-defined]
                        grpc.StatusCode.FAILED_PRECONDITION,
                        grpc.StatusCode.UNAUTHENTICATED,
                    ):
                        return  # another attempt is the current one
                    left = True
                if closing and (not left or time.monotonic() > give_up):
                    return
                if closing:
                    time.sleep(_INTERVAL)

    def _send(self, stub: object) -> bool:
        """Send one batch; whether there is more."""
        from arriero.v1 import job_pb2

        with self._lock:
            first, size = self._first, 0
            batch: list[bytes] = []
            for line in self._lines:
                if len(batch) >= _BATCH_LINES or size > _BATCH_BYTES:
                    break
                batch.append(line)
                size += len(line)
        if not batch:
            return False
        request = job_pb2.AppendLogsRequest(
            execution=self._assignment.execution,
            attempt=self._assignment.attempt,
            node=self._node,
            first=first,
            lines=batch,
        )
        metadata = ((TOKEN_KEY, self._assignment.report_token),)
        stub.AppendLogs(request, timeout=_DEADLINE, metadata=metadata)  # type: ignore[attr-defined]
        with self._lock:
            for _ in range(first + len(batch) - self._first):
                self._lines.popleft()
            self._first = max(self._first, first + len(batch))
            return bool(self._lines)


def main() -> NoReturn:
    """Run the job of an assignment; never returns."""
    if len(sys.argv) != 3:
        print("usage: python -m arriero.operations.pod MODULE ASSIGNMENT", file=sys.stderr)
        sys.exit(os.EX_USAGE)
    module, path = sys.argv[1:]
    try:
        assignment = Assignment.find(path)
    except (OSError, ArrieroError) as error:
        print(f"the assignment cannot be read: {error}; is the store mounted?", file=sys.stderr)
        sys.exit(os.EX_NOINPUT)
    child = subprocess.Popen(
        [sys.executable, "-m", module, path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={
            "OMP_WAIT_POLICY": "PASSIVE",
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
        },
    )
    signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
    carrier = Carrier(assignment, int(os.environ.get("JOB_COMPLETION_INDEX") or 0))
    carrier.start()
    assert child.stdout is not None
    reader = threading.Thread(target=_read, args=(child.stdout, carrier), daemon=True)
    reader.start()
    code = child.wait()
    reader.join(5)  # what the job started may hold the pipe open
    carrier.close()
    sys.stdout.flush()
    # As shells say it: 128 and the signal.
    os._exit(128 - code if code < 0 else code)


def _read(pipe: IO[bytes], carrier: Carrier) -> None:
    for line in pipe:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        carrier.add(line.rstrip(b"\n"))


if __name__ == "__main__":
    main()
