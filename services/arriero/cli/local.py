"""Start and stop the services of this machine from another process.

Responsibility: spawn a supervisor, wait until it serves, end it. Does not know
what it supervises.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from arriero.cli.supervisor import STOP_SECONDS, Home
from arriero.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from arriero.rpc import parent
from arriero.rpc.parent import process_start

READY_SECONDS = 150.0


def start_detached(
    home: Home, arguments: Sequence[str] = (), *, tied: bool = False
) -> dict[str, Any]:
    """Start a supervisor in a session of its own and wait until it serves.

    Args:
        home: where.
        arguments: of `arriero up`.
        tied: it ends with the process that calls this, however that ends.

    Returns:
        Its state file.

    Raises:
        FailedPrecondition: one runs in this home already, or there can be no home.
        Unavailable: it ended before it served; its log's end is quoted.
        DeadlineExceeded: it did not serve in time.
    """
    running = home.running()
    if running is not None:
        raise FailedPrecondition(
            f"Arriero already runs in {home.root} (pid {running['pid']}); "
            "`arriero status` shows it, `arriero down` stops it"
        )
    home.make()
    env = {**os.environ, "ARRIERO_HOME": str(home.root)}
    env.pop(parent.PID, None)
    if tied:
        env.update(parent.environment())
    log = home.logs / "supervisor.log"
    with log.open("ab") as sink:
        position = sink.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "arriero.cli", "up", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            env=env,
        )
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        state = home.running()
        if state is not None and state["pid"] == process.pid:
            return state
        if process.poll() is not None:
            said = log.read_bytes()[position:].decode(errors="replace").strip()
            raise Unavailable(f"Arriero did not start: {said or f'see {log}'}")
        time.sleep(0.05)
    process.terminate()
    raise DeadlineExceeded(f"Arriero did not serve within {READY_SECONDS:.0f} s; see {log}")


def stop(home: Home) -> bool:
    """End the supervisor of a home and all that it started; False when none runs."""
    state = home.running()
    if state is None:
        return False
    pid, started = int(state["pid"]), state["start"]
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS + 10
    while process_start(pid) == started:
        if time.monotonic() > deadline:
            # What it supervises watches it and leaves within seconds.
            os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 10
        time.sleep(0.05)
    home.state.unlink(missing_ok=True)
    return True
