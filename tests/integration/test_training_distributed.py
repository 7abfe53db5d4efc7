"""Several processes train what one does; a lost one ends the attempt, not the training."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest

torch = pytest.importorskip("torch")

from arriero.operations.handoff import Assignment, Outcome, to_json, type_name  # noqa: E402
from arriero.operations.kinds import ResolveContext  # noqa: E402
from arriero.rpc.ports import free_port  # noqa: E402
from arriero.settings import SourceSettings  # noqa: E402
from arriero.store import Artifact, ManifestDraft, Store  # noqa: E402
from arriero.testing.jobs import run_job  # noqa: E402
from arriero.testing.models import VOCABULARY, tiny_llama  # noqa: E402
from arriero.training.job import train  # noqa: E402
from arriero.training.spec import resolve  # noqa: E402
from arriero.v1 import training_pb2  # noqa: E402

STEPS = 60


class Bench:
    """A store with a model and rows, and jobs over them."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.store = Store.open(place / "store")
        staged = tiny_llama(self.store.staging("test", "model") / "files", hidden=32)
        self.model = self.store.publish(staged, ManifestDraft(kind="model", name="tiny"))
        self.dataset = self._rows("rows", 22)  # a batch of 4 is not full at the end of an epoch
        self.held_out = self._rows("held-out", 3)

    def _rows(self, name: str, count: int) -> Artifact:
        staged = self.store.staging("test", name) / "files"
        staged.mkdir(parents=True)
        random = np.random.default_rng(count)
        rows = [
            random.integers(3, VOCABULARY, int(random.integers(4, 16))).tolist()
            for _ in range(count)
        ]
        kind = pa.list_(pa.int32())
        labels = [[-100] * 2 + row[2:] for row in rows]
        batch = pa.record_batch(
            [pa.array(rows, kind), pa.array(labels, kind)], names=["input_ids", "labels"]
        )
        sink = pa.OSFile(str(staged / "data.arrow"), "wb")
        with sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        facts = {
            "rows": count,
            "tokens": sum(map(len, rows)),
            "trained_tokens": sum(len(row) - 2 for row in rows),
            "max_length": max(map(len, rows)),
            "tokenizer": self.model.digest,
        }
        (staged / "dataset.json").write_text(json.dumps(facts))
        (staged / "probe.json").write_text(json.dumps({"sequences": rows[:2]}))
        return self.store.publish(staged, ManifestDraft(kind="dataset", name=name))

    @property
    def inputs(self) -> dict[str, Artifact]:
        return {"model": self.model, "dataset": self.dataset, "val_dataset": self.held_out}

    def spec(self, **fields: Any) -> training_pb2.TrainSpec:
        spec = training_pb2.TrainSpec(
            **{
                "max_steps": STEPS,
                "batch_size": 4,
                "micro_batch_size": 2,
                "learning_rate": 5e-3,
                "dtype": "float32",
                "lora": {"r": 4, "lora_dropout": 0.0, "target_modules": ["all-linear"]},
                **fields,
            }
        )
        given = {name: [artifact] for name, artifact in self.inputs.items()}
        return resolve(spec, ResolveContext(self.store, given, SourceSettings())).spec

    def assignment(self, name: str, attempt: int = 1, **fields: Any) -> Assignment:
        made = Assignment(
            service="training",
            kind="train",
            spec_type=type_name(training_pb2.TrainSpec),
            spec=to_json(self.spec(**fields)),
            inputs={name: [artifact.digest] for name, artifact in self.inputs.items()},
            store=str(self.store.root),
            staging=str(self.place / name),
            execution=name,
            attempt=attempt,
            watch_service=False,
        )
        made.write()
        return made

    def start(self, assignment: Assignment, **environment: str) -> subprocess.Popen:
        log = (self.place / f"{assignment.execution}.log").open("ab")
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "arriero.training.job",
                assignment.directory / "assignment.json",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                **environment,
            },
        )

    def said(self, assignment: Assignment) -> str:
        return (self.place / f"{assignment.execution}.log").read_text()[-4000:]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def alone(bench: Bench) -> dict[str, Any]:
    """The figures of one process."""
    _, golden = run_job(
        train, "train", bench.spec(), bench.inputs, bench.store, bench.place / "alone"
    )
    return json.loads((golden.path / "report.json").read_text())


@contextlib.contextmanager
def ended(*processes: subprocess.Popen):
    """Leave none behind, whatever happens."""
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def outcome_of(assignment: Assignment) -> Outcome | None:
    return Outcome.read(Outcome.path(Path(assignment.staging), assignment.attempt))


def same_curve(assignment: Assignment, alone: dict[str, Any]) -> None:
    path = assignment.directory / "outputs" / "golden" / "report.json"
    found = json.loads(path.read_text())
    assert found["losses"] == pytest.approx(alone["losses"], rel=2e-4)
    assert [loss for _, loss in found["val_losses"]] == pytest.approx(
        [loss for _, loss in alone["val_losses"]], rel=2e-4
    )


def until(done, process: subprocess.Popen, bench: Bench, assignment: Assignment) -> None:
    deadline = time.monotonic() + 300
    while not done():
        assert process.poll() is None, bench.said(assignment)
        assert time.monotonic() < deadline, bench.said(assignment)
        time.sleep(0.01)


def test_two_processes_have_the_losses_of_one(bench, alone):
    job = bench.assignment("two", nproc_per_node=2)
    process = bench.start(job)
    with ended(process):
        assert process.wait(120) == 0, bench.said(job)
    outcome = outcome_of(job)
    assert outcome is not None
    assert outcome.ok
    assert {output.name for output in outcome.outputs} == {"adapter", "golden"}
    same_curve(job, alone)


def test_sharded_weights_stop_at_a_signal_and_go_on_as_if_they_had_not(bench, alone):
    first = bench.assignment("sharded", nproc_per_node=2, fsdp=True)
    process = bench.start(first)
    with ended(process):
        until((first.checkpoints / "step-0000000001").exists, process, bench, first)
        process.terminate()
        assert process.wait(120) == 75, bench.said(first)
    outcome = outcome_of(first)
    assert outcome is not None
    assert outcome.preempted
    assert "it is saved" in outcome.status["message"]
    second = bench.assignment("sharded", attempt=2, nproc_per_node=2, fsdp=True)
    process = bench.start(second)
    with ended(process):
        assert process.wait(120) == 0, bench.said(second)
    assert "resumed from step" in bench.said(second)
    same_curve(second, alone)


def test_two_agents_that_meet_on_the_loopback_train_together(bench, alone):
    job = bench.assignment("agents", nodes=2, nproc_per_node=1)
    meeting = {
        "PET_NNODES": "2",
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
        "PET_RDZV_ID": "test",
    }
    agents = [bench.start(job, **meeting) for _ in range(2)]
    with ended(*agents):
        assert [agent.wait(120) for agent in agents] == [0, 0], bench.said(job)
    same_curve(job, alone)


def test_several_machines_without_a_place_to_meet_are_refused(bench):
    job = bench.assignment("nowhere", nodes=2)
    process = bench.start(job)
    with ended(process):
        assert process.wait(120) == 1
    outcome = outcome_of(job)
    assert outcome is not None
    assert not outcome.retryable
    assert "nodes: 2, but this service" in outcome.status["message"]
    assert "PET_RDZV_ENDPOINT" in outcome.status["message"]


def ranks_of(process: subprocess.Popen) -> dict[int, psutil.Process]:
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RANK" in (env := child.environ()):
                found[int(env["RANK"])] = child
    return found


def test_a_killed_rank_takes_the_attempt_down_within_seconds(bench, alone):
    job = bench.assignment("killed", nproc_per_node=2)
    process = bench.start(job)
    with ended(process):
        until((job.checkpoints / "step-0000000001").exists, process, bench, job)
        ranks = ranks_of(process)
        ranks[1].kill()
        assert process.wait(120) == 128 + signal.SIGKILL, bench.said(job)
        assert not psutil.pid_exists(ranks[0].pid)
    assert outcome_of(job) is None  # what rank 0 noticed is not why
    assert "rank 1 was ended by signal 9" in bench.said(job)
    # Checkpoints are whole: one process can go on with them too.
    again = bench.assignment("killed", attempt=2)
    process = bench.start(again)
    with ended(process):
        assert process.wait(120) == 0, bench.said(again)
    assert "resumed from step" in bench.said(again)
    same_curve(again, alone)
