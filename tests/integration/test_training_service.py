"""The training service as a process of its own: train, reuse, refuse, survive a kill, over gRPC."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pyarrow as pa
import pytest
from google.longrunning import operations_pb2, operations_pb2_grpc

from arriero.errors import InvalidArgument
from arriero.operations.memory import oom_kills
from arriero.rpc.channel import connect_sync
from arriero.rpc.status import from_rpc_error, from_status
from arriero.store import Artifact, ManifestDraft, Store
from arriero.testing.models import VOCABULARY, tiny_llama
from arriero.v1 import training_pb2, training_pb2_grpc, types_pb2


class Service:
    """A running service with a model and rows in its store."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.store = Store.open(place / "store")
        self.model = self._model()
        self.dataset = self._dataset()
        address = place / "address"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "arriero.training"],
            stderr=(place / "log").open("w"),
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "ARRIERO_STORE": str(place / "store"),
                "ARRIERO_LISTEN": "127.0.0.1:0",
                "ARRIERO_ADDRESS_FILE": str(address),
            },
        )
        self.until(address.is_file)
        self.channel = connect_sync(address.read_text().strip())
        self.stub = training_pb2_grpc.TrainingServiceStub(self.channel)
        self.operations = operations_pb2_grpc.OperationsStub(self.channel)

    def _model(self) -> Artifact:
        staged = tiny_llama(self.store.staging("test", "model") / "files", hidden=32)
        return self.store.publish(staged, ManifestDraft(kind="model", name="tiny"))

    def _dataset(self) -> Artifact:
        staged = self.store.staging("test", "rows") / "files"
        staged.mkdir(parents=True)
        random = np.random.default_rng(0)
        rows = [random.integers(3, VOCABULARY, 12).tolist() for _ in range(24)]
        kind = pa.list_(pa.int32())
        batch = pa.record_batch(
            [pa.array(rows, kind), pa.array([[-100] * 4 + row[4:] for row in rows], kind)],
            names=["input_ids", "labels"],
        )
        path = str(staged / "data.arrow")
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        facts = {"rows": 24, "tokens": 24 * 12, "trained_tokens": 24 * 8, "max_length": 12}
        facts["tokenizer"] = self.model.digest  # type: ignore[assignment]
        (staged / "dataset.json").write_text(json.dumps(facts))
        (staged / "probe.json").write_text(json.dumps({"sequences": rows[:3]}))
        return self.store.publish(staged, ManifestDraft(kind="dataset", name="rows"))

    def until(self, done, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert self.process.poll() is None, (self.place / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (self.place / "log").read_text()[-3000:]
            time.sleep(0.05)

    def close(self) -> None:
        self.channel.close()
        self.process.terminate()
        assert self.process.wait(120) == 0

    def start(self, request_id: str, **fields) -> operations_pb2.Operation:
        spec = training_pb2.TrainSpec(
            **{
                "model": self.model.digest,
                "dataset": self.dataset.digest,
                "lora": {"r": 2},
                "batch_size": 4,
                "learning_rate": 1e-2,
                "dtype": "float32",
                **fields,
            }
        )
        context = types_pb2.StageContext(request_id=request_id, run="run", stage="stage")
        request = training_pb2.TrainRequest(spec=spec, context=context)
        return self.stub.Train(request, wait_for_ready=True)

    def metadata(self, name: str) -> types_pb2.OperationMetadata:
        operation = self.operations.GetOperation(operations_pb2.GetOperationRequest(name=name))
        metadata = types_pb2.OperationMetadata()
        assert operation.metadata.Unpack(metadata)
        return metadata

    def job(self) -> psutil.Process:
        """The job that runs."""
        # Its own children have its command line for a moment, before they have theirs.
        jobs = (
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if "arriero.training.job" in " ".join(child.cmdline())
        )
        return next(jobs)

    def finish(self, operation: operations_pb2.Operation) -> types_pb2.OperationResult:
        deadline = time.monotonic() + 300
        while not operation.done:
            assert time.monotonic() < deadline, (self.place / "log").read_text()[-3000:]
            request = operations_pb2.WaitOperationRequest(name=operation.name)
            request.timeout.FromSeconds(20)
            operation = self.operations.WaitOperation(request)
        if operation.HasField("error"):
            raise from_status(operation.error)
        result = types_pb2.OperationResult()
        assert operation.response.Unpack(result)
        return result


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("training"))
    yield running
    running.close()


def test_an_adapter_and_its_golden_logits_are_published_once(service: Service):
    result = service.finish(service.start("first", max_steps=4))
    adapter, golden = result.outputs
    assert (adapter.name, adapter.kind, golden.name, golden.kind) == (
        "adapter",
        "adapter",
        "golden",
        "report",
    )
    manifest = service.store.get(adapter.digest).manifest
    assert manifest.golden == golden.digest
    assert set(manifest.parents) == {service.model.digest, service.dataset.digest}
    assert [gate.gate for gate in result.gates] == [
        "train.finite",
        "train.improves",
        "adapter.health",
    ]
    # Where checkpoints go and how often changes no result.
    again = service.finish(service.start("second", max_steps=4, save_steps=2))
    assert again.cached
    assert again.outputs[0].digest == adapter.digest


def test_a_wrong_spec_is_refused_at_once_with_its_field(service: Service):
    with pytest.raises(grpc.RpcError) as caught:
        service.start("wrong", lora={"r": 0}, learning_rate=-1)
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidArgument)
    assert {item.field for item in error.violations} == {"lora.r", "learning_rate"}


def test_a_killed_job_goes_on_from_its_checkpoint(service: Service):
    operation = service.start("killed", max_steps=1200, save_steps=100)
    service.until(lambda: service.metadata(operation.name).progress.step >= 150)
    before = service.metadata(operation.name).progress
    assert before.HasField("checkpoint_time")
    os.kill(service.job().pid, signal.SIGKILL)
    service.until(lambda: service.metadata(operation.name).attempt == 2)
    service.until(
        lambda: (
            service.metadata(operation.name).progress.phase == "training"
            and service.metadata(operation.name).progress.step > 0
        )
    )
    resumed = service.metadata(operation.name).progress
    assert resumed.step >= 100
    result = service.finish(operation)
    adapter = service.store.get(result.outputs[0].digest)
    assert adapter.manifest.metrics["steps"] == 1200
    report = json.loads(service.store.get(result.outputs[1].digest).file("report.json").read_text())
    assert len(report["losses"]) == 1200


@pytest.fixture
def starving() -> Iterator[Path]:
    """A control group, made by root, whose processes get next to no memory any more."""
    root = Path("/sys/fs/cgroup")
    old = (root / "memory").is_dir()
    group = (root / "memory" if old else root) / f"arriero-training-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text("262144")
        (group / ("memory.swappiness" if old else "memory.swap.max")).write_text("0")
    except OSError as error:
        pytest.skip(f"control groups can not be made here: {error}")
    yield group
    group.rmdir()


def test_a_job_that_the_kernel_kills_for_memory_goes_on_with_half_of_it(
    service: Service, starving: Path
):
    operation = service.start("starved", max_steps=200_000, save_steps=50, micro_batch_size=4)
    service.until(lambda: service.metadata(operation.name).progress.training_step >= 100)
    (starving / "cgroup.procs").write_text(str(service.job().pid))
    service.until(lambda: service.metadata(operation.name).progress.micro_batch_size == 2)
    metadata = service.metadata(operation.name)
    assert "killed by the kernel's out-of-memory killer" in metadata.jobs[0].status.message
    assert metadata.attempt == 2
    assert metadata.progress.training_step >= 100
    service.operations.CancelOperation(operations_pb2.CancelOperationRequest(name=operation.name))
    service.until(lambda: service.metadata(operation.name).HasField("end_time"))


def test_a_killed_rank_costs_an_attempt_and_not_the_training(service: Service):
    before = oom_kills()
    operation = service.start("ranks", max_steps=300, save_steps=20, nproc_per_node=2)
    service.until(lambda: service.metadata(operation.name).progress.step >= 30)
    (rank,) = [
        child
        for child in psutil.Process(service.process.pid).children(recursive=True)
        if child.environ().get("RANK") == "1"
    ]
    rank.kill()
    service.until(lambda: service.metadata(operation.name).attempt == 2)
    kills = oom_kills()
    result = service.finish(operation)
    report = json.loads(service.store.get(result.outputs[1].digest).file("report.json").read_text())
    assert len(report["losses"]) == 300
    first, second = service.metadata(operation.name).jobs
    # Where the kernel killed anybody at all for memory meanwhile, the job is taken for one too.
    named = "SIGKILL" if kills == before else "SIGKILL|out-of-memory killer"
    assert re.search(named, first.status.message)
    assert not second.status.message
