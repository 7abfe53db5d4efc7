"""A room as small as can be: its spec's `source` is JSON that says how to behave.

Keys: steps, seconds (per step), hold and go (after `hold` steps each attempt waits for a
file `go`), trace (file that gets a line per step), save (checkpoint each step), fail (error
class), message, bug (raises KeyError), gate ("pass" | "fail"), proof (bytes that the
gate's proof holds), kill_at and kill_attempt (SIGKILL itself at that step of that
attempt), reasons (file that gets how the attempt before ended), stubborn (ignores
SIGTERM), deaf (never looks whether it is to leave), child (starts a process in a session
of its own), text (content).
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from arriero import errors
from arriero.gates import KNOWN_GATES
from arriero.operations.job import Job, Output, main

GATE = next(iter(KNOWN_GATES))


def work(job: Job) -> list[Output]:
    order = json.loads(job.spec.source)
    saved = job.checkpoints / "step"
    first = int(saved.read_text()) if saved.exists() else 0
    job.log.info("starts at step %d", first)
    print("a raw line")
    if order.get("reasons"):
        Path(order["reasons"]).write_text(job.last_failure)
    if order.get("child"):
        subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
        )
    if order.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    steps = order.get("steps", 0)
    for step in range(first + 1, steps + 1):
        while step - first == order.get("hold", steps) + 1 and not Path(order["go"]).exists():
            if not order.get("deaf") and job.preempted.is_set():
                break
            time.sleep(0.01)
        if not order.get("deaf") and job.preempted.is_set():
            raise errors.Preempted("saved, leaving")
        if order.get("kill_at") == step and order.get("kill_attempt", 1) == job.attempt:
            os.kill(os.getpid(), signal.SIGKILL)
        _trace(order, f"{os.getpid()} {job.attempt} {step}")
        time.sleep(order.get("seconds", 0.0))
        if order.get("save"):
            temporary = saved.with_suffix(".new")
            temporary.write_text(str(step))
            temporary.replace(saved)
        job.progress(
            phase="toying",
            step=step,
            total=steps,
            unit="steps",
            loss=1.0 / step,
            checkpoint_time=time.time() if order.get("save") else None,
        )
    if name := order.get("fail"):
        raise getattr(errors, name)(order.get("message", "as ordered"))
    if order.get("bug"):
        raise KeyError("bug")
    if size := order.get("proof"):
        with job.gates.timed():
            held = b"\1" * size  # every page is touched
            time.sleep(0.3)  # what it costs in time, at least
            deadline = time.monotonic() + 300
            while job.gates._cost.memory_bytes < size and time.monotonic() < deadline:
                time.sleep(0.01)  # until the meter has looked
            assert len(held) == size
            del held
    if gate := order.get("gate"):
        job.gates.judge(
            GATE,
            gate == "pass",
            figure=2.0,
            threshold=1.0,
            unit="rows",
            detail="found 2 rows, expected 1",
        )
    main_dir, report_dir = job.output_dir("main"), job.output_dir("report")
    (main_dir / "data.txt").write_text(order.get("text", "x" * 10))
    (report_dir / "report.json").write_text("{}")
    job.progress(phase="done", step=steps, total=steps, force=True)
    return [
        Output(
            "main",
            "model",
            main_dir,
            artifact_name="toy",
            golden="output:report",
            metrics={"steps": steps},
            labels={"toy": "yes"},
            licenses=["MIT"],
        ),
        Output("report", "report", report_dir),
    ]


def join(job: Job) -> list[Output]:
    model = job.input("model")
    made = job.output_dir("main")
    (made / "data.txt").write_text(model.file("data.txt").read_text() * 2)
    return [Output("main", "model", made), Output("same", "model", existing=model.digest)]


def _trace(order: dict[str, object], line: str) -> None:
    if path := order.get("trace"):
        with Path(str(path)).open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main({"import": work, "merge": join})
