"""Processes die in the middle of a training, and the run finishes all the same."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from arriero.errors import Unavailable
from arriero.store import Store
from arriero.v1 import orchestrator_pb2 as pb

STEPS = 300
Wait = Callable[..., Any]


def training_jobs(platform: Any) -> list[psutil.Process]:
    found: list[psutil.Process] = platform.processes("arriero.training.job")
    return found


@pytest.mark.parametrize("victim", ["orchestrator", "training service", "training job"])
def test_a_run_survives_a_kill_in_the_middle_of_training(
    victim: str,
    own_platform: Any,
    tiny_pipeline: Callable[..., Path],
    tmp_path: Path,
    wait_until: Wait,
) -> None:
    train = {
        "model": "base",
        "dataset": "rows",
        "lora": {"r": 4, "lora_dropout": 0.1},
        "max_steps": STEPS,
        "batch_size": 4,
        "save_steps": 5,
        "dtype": "float32",
    }
    # Two branches in flight, and each must get its own result back.
    path = tiny_pipeline(
        tmp_path,
        sft={"train": train},
        raw={"quantize": {"model": "base", "types": ["F16"]}},
        quants={"quantize": {"model": "tuned", "types": ["Q8_0"]}},
        best=None,
        live=None,
    )
    platform = own_platform
    with platform.client() as client:
        run = client.create_run(path)

        def step() -> int:
            stages = {s.name: s for s in client.get_run(run.id).stages}
            return int(stages["sft"].metadata.progress.step)

        wait_until(lambda: 20 <= step() < STEPS, 300, "training")
        if victim == "training job":
            (target,) = training_jobs(platform)
        else:
            target = platform.service(victim.split()[0])
        (job,) = training_jobs(platform)
        job.suspend()  # it does not end by itself before
        target.send_signal(signal.SIGKILL)
        with contextlib.suppress(psutil.NoSuchProcess):
            job.resume()
        if victim == "training service":
            # Without its service the job leaves, within two seconds where nothing else is done.
            wait_until(lambda: not job.is_running(), 300, "the job's end")

    most_jobs = 0

    def ended() -> pb.Run | None:
        nonlocal most_jobs
        most_jobs = max(most_jobs, len(training_jobs(platform)))
        with platform.client() as again, contextlib.suppress(Unavailable):
            found = again.get_run(run.id)
            return found if found.state > pb.RUN_STATE_RUNNING else None
        return None  # the orchestrator is being started again

    found = wait_until(ended, 400, "the run's end")
    assert found.state == pb.RUN_STATE_SUCCEEDED, found.error
    assert most_jobs <= 1
    stages = {stage.name: stage for stage in found.stages}
    attempts = stages["sft"].metadata.attempt
    assert attempts == (1 if victim == "orchestrator" else 2)
    store = Store.open(platform.home.store)
    kinds = {}
    for stage in found.stages:
        for output in stage.outputs:
            store.verify(output.digest)
            kinds[stage.name, output.name] = store.manifest(output.digest).kind
    assert kinds["sft", "adapter"] == "adapter"
    assert kinds["sft", "golden"] == "report"
    assert kinds["raw", "F16"] == "gguf"
    assert kinds["tuned", "model"] == "model"
    assert kinds["quants", "Q8_0"] == "gguf"
    raw = store.manifest(stages["raw"].outputs[0].digest)
    tuned = store.manifest(stages["quants"].outputs[0].digest)
    assert stages["base"].outputs[0].digest in raw.parents
    assert stages["tuned"].outputs[0].digest in tuned.parents
    if attempts == 2:
        log = platform.cli("runs", "logs", run.id, "--stage", "sft").stdout
        assert "resum" in log.lower()


def test_a_killed_supervisor_leaves_no_process_behind(own_platform: Any, wait_until: Wait) -> None:
    state = own_platform.home.running()
    assert len(own_platform.processes()) >= 6
    psutil.Process(state["pid"]).send_signal(signal.SIGKILL)
    wait_until(lambda: own_platform.processes() == [], 300, "the services' end")
    # And the next one starts as if nothing had been.
    own_platform.up()


def test_a_run_goes_on_after_everything_was_stopped(
    own_platform: Any, tiny_pipeline: Callable[..., Path], tmp_path: Path, wait_until: Wait
) -> None:
    path = tiny_pipeline(
        tmp_path,
        sft={
            "train": {
                "model": "base",
                "dataset": "rows",
                "max_steps": STEPS,
                "batch_size": 4,
                "save_steps": 5,
                "dtype": "float32",
            }
        },
        quants=None,
        best=None,
        live=None,
    )
    with own_platform.client() as client:
        run = client.create_run(path)
        wait_until(lambda: training_jobs(own_platform), 300, "a training")
    own_platform.down()
    assert own_platform.processes() == []
    own_platform.up()
    with own_platform.client() as client:
        assert client.wait(run.id, timeout=400).state == pb.RUN_STATE_SUCCEEDED


def test_a_second_supervisor_in_the_same_home_is_refused(own_platform: Any) -> None:
    done = own_platform.cli("up", check=False)
    assert done.returncode == 1
    assert "already runs" in done.stderr
