"""The quantization service as it runs: a real process, real jobs, over gRPC."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf import duration_pb2

from arriero.errors import ArrieroError, FailedPrecondition, InvalidArgument
from arriero.gates.golden import Golden, log_softmax
from arriero.llama import Context, Model, read_header
from arriero.rpc import connect_sync, from_rpc_error, from_status
from arriero.store import Artifact, ManifestDraft, Store
from arriero.v1 import quantization_pb2 as pb
from arriero.v1 import types_pb2
from arriero.v1.quantization_pb2_grpc import QuantizationServiceStub


class Service:
    """A running service, with its store."""

    def __init__(self, home: Path) -> None:
        self.store = Store.open(home / "store")
        address = home / "address"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "arriero.quantization"],
            env={
                **os.environ,
                "ARRIERO_STORE": str(home / "store"),
                "ARRIERO_LISTEN": "127.0.0.1:0",
                "ARRIERO_ADDRESS_FILE": str(address),
            },
        )
        deadline = time.monotonic() + 300
        while not address.exists():
            assert self.process.poll() is None, "the service ended"
            assert time.monotonic() < deadline, "the service did not start"
            time.sleep(0.02)
        self.channel = connect_sync(address.read_text().strip())
        self.rooms = QuantizationServiceStub(self.channel)
        self.operations = operations_pb2_grpc.OperationsStub(self.channel)

    def publish(self, source: Path, kind: str, **draft: object) -> Artifact:
        staged = self.store.staging("test", f"{kind}-{source.name}") / "artifact"
        shutil.copytree(source, staged)
        return self.store.publish(staged, ManifestDraft(kind=kind, **draft))  # type: ignore[arg-type]

    def wait(self, operation: operations_pb2.Operation) -> operations_pb2.Operation:
        request = operations_pb2.WaitOperationRequest(
            name=operation.name, timeout=duration_pb2.Duration(seconds=300)
        )
        ended: operations_pb2.Operation = self.operations.WaitOperation(request, timeout=400)
        assert ended.done
        return ended

    def result(self, operation: operations_pb2.Operation) -> types_pb2.OperationResult:
        ended = self.wait(operation)
        assert not ended.HasField("error"), ended.error.message
        result = types_pb2.OperationResult()
        assert ended.response.Unpack(result)
        return result

    def close(self) -> None:
        self.channel.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("quantization"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(
    service: Service,
    tiny_llama_dir: Path,
    tiny_gguf: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Artifact:
    """The tiny model, with golden logits that its F16 file gives (torch takes seconds)."""
    ids = [1, *range(260, 320)]
    with Model(tiny_gguf) as loaded, Context(loaded, n_ctx=64, n_threads=1) as context:
        rows = context.sequence_logits(ids)
    golden = tmp_path_factory.mktemp("golden")
    Golden(
        np.array(ids, dtype=np.int32),
        np.array([len(ids)], dtype=np.int32),
        log_softmax(rows).astype(np.float16),
    ).write(golden)
    report = service.publish(golden, "report", labels={"report": "golden"})
    return service.publish(tiny_llama_dir, "model", name="tiny", golden=report.digest)


def quantize(model: Artifact, request: str, *types: str) -> pb.QuantizeRequest:
    return pb.QuantizeRequest(
        context=types_pb2.StageContext(request_id=request),
        spec=pb.QuantizeSpec(model=model.digest, types=types),
    )


def error_of(call: object, request: object) -> ArrieroError:
    with pytest.raises(grpc.RpcError) as caught:
        call(request, timeout=120)  # type: ignore[operator]
    return from_rpc_error(caught.value)


def test_files_are_made_measured_and_chosen(service: Service, model: Artifact) -> None:
    started = service.rooms.Quantize(quantize(model, "q1", "q8_0", "Q4_0"), timeout=120)
    made = service.result(started)
    assert [o.name for o in made.outputs] == ["Q8_0", "Q4_0"]
    assert {(g.gate, g.verdict) for g in made.gates} == {
        ("gguf.tokens", types_pb2.GATE_VERDICT_PASSED),
        ("gguf.template", types_pb2.GATE_VERDICT_SKIPPED),  # no template anywhere
        ("gguf.rope", types_pb2.GATE_VERDICT_PASSED),
    }
    for output in made.outputs:
        artifact = service.store.get(output.digest)
        assert artifact.manifest.kind == "gguf"
        assert artifact.manifest.name == "tiny"
        assert artifact.manifest.parents == (model.digest,)
        assert artifact.manifest.golden == model.manifest.golden
        (entry,) = artifact.manifest.files
        assert entry.path == f"tiny.{output.name}.gguf"
        assert read_header(artifact.file(entry.path)).metadata["arriero.source"] == model.digest

    again = service.result(service.rooms.Quantize(quantize(model, "q2", "Q8_0", "q4_0")))
    assert again.cached
    assert [o.digest for o in again.outputs] == [o.digest for o in made.outputs]

    evaluate = pb.EvaluateRequest(
        context=types_pb2.StageContext(request_id="e1"),
        spec=pb.EvaluateSpec(
            models=[o.digest for o in made.outputs],
            choose=pb.Choose(smallest=pb.Smallest(max_kld=2.0)),
        ),
    )
    chosen, report = service.result(service.rooms.Evaluate(evaluate, timeout=120)).outputs
    assert (chosen.name, chosen.digest) == ("chosen", made.outputs[1].digest)
    assert service.store.get(report.digest).manifest.labels["report"] == "evaluation"

    evaluate.context.request_id = "e2"
    evaluate.spec.choose.smallest.max_kld = 1e-12
    failed = service.wait(service.rooms.Evaluate(evaluate, timeout=120))
    refusal = from_status(failed.error)
    assert isinstance(refusal, FailedPrecondition)
    assert "Q8_0" in refusal.message


@pytest.mark.parametrize(
    ("types", "field"), [((), "types"), (("Q8_0", "Q5_9"), "types[1]"), (("iq1_s",), "types[0]")]
)
def test_wrong_types_are_refused_before_work_starts(
    service: Service, model: Artifact, types: tuple[str, ...], field: str
) -> None:
    refusal = error_of(service.rooms.Quantize, quantize(model, f"wrong-{types}", *types))
    assert isinstance(refusal, InvalidArgument)
    assert [v.field for v in refusal.violations] == [field]
    assert "Traceback" not in refusal.message


def test_cancelling_stops_the_converter_and_publishes_nothing(
    service: Service, model: Artifact
) -> None:
    before = len(service.store.list("gguf"))
    started = service.rooms.Quantize(quantize(model, "cancel", "Q5_0"), timeout=120)
    parent = psutil.Process(service.process.pid)
    deadline = time.monotonic() + 300
    while not any(_runs(p, "arriero.quantization.official") for p in _children(parent)):
        assert time.monotonic() < deadline, "the converter did not start"
        time.sleep(0.02)
    service.operations.CancelOperation(operations_pb2.CancelOperationRequest(name=started.name))
    assert service.wait(started).error.code == grpc.StatusCode.CANCELLED.value[0]
    deadline = time.monotonic() + 300
    while _children(parent):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.02)
    assert len(service.store.list("gguf")) == before


def test_a_killed_job_publishes_nothing_and_its_next_attempt_everything(
    service: Service, model: Artifact
) -> None:
    before = {artifact.digest for artifact in service.store.list("gguf")}
    started = service.rooms.Quantize(quantize(model, "killed", "Q5_1", "Q4_1"), timeout=120)
    parent = psutil.Process(service.process.pid)
    deadline = time.monotonic() + 300
    converter = "arriero.quantization.official"
    while not (converters := [p for p in _children(parent) if _runs(p, converter)]):
        assert time.monotonic() < deadline, "the converter did not start"
        time.sleep(0.02)
    (job,) = [p for p in _children(parent) if _runs(p, "arriero.quantization.job")]
    job.kill()
    assert {artifact.digest for artifact in service.store.list("gguf")} == before
    result = service.result(started)
    assert [output.name for output in result.outputs] == ["Q5_1", "Q4_1"]
    made = {artifact.digest for artifact in service.store.list("gguf")} - before
    assert made == {output.digest for output in result.outputs}
    psutil.wait_procs(converters, timeout=120)
    assert not any(process.is_running() for process in converters)


def _runs(process: psutil.Process, module: str) -> bool:
    try:
        return module in process.cmdline()
    except psutil.Error:
        return False


def _children(parent: psutil.Process) -> list[psutil.Process]:
    found = []
    for child in parent.children(recursive=True):
        try:
            child.cmdline()
        except psutil.Error:
            continue
        if child.is_running():
            found.append(child)
    return found
