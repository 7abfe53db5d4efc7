"""The merging service as a process of its own: import, merge, refusals, cancel, over gRPC."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.longrunning import operations_pb2, operations_pb2_grpc

from arriero.errors import ArrieroError
from arriero.rpc.channel import connect_sync
from arriero.rpc.status import from_rpc_error, from_status
from arriero.store import Artifact, Store
from arriero.testing.adapters import tiny_adapter
from arriero.v1 import merging_pb2, merging_pb2_grpc, types_pb2


class Service:
    """A running service and how to call it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.store = Store.open(place / "store")
        address = place / "address"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "arriero.merging"],
            stderr=(place / "log").open("w"),
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "ARRIERO_STORE": str(place / "store"),
                "ARRIERO_LISTEN": "127.0.0.1:0",
                "ARRIERO_ADDRESS_FILE": str(address),
                "ARRIERO_ALLOWED_PATHS": str(place),
            },
        )
        deadline = time.monotonic() + 60
        while not address.is_file():
            assert self.process.poll() is None, (place / "log").read_text()
            assert time.monotonic() < deadline, "the service did not come up"
            time.sleep(0.05)
        self.channel = connect_sync(address.read_text().strip())
        self.stub = merging_pb2_grpc.MergingServiceStub(self.channel)
        self.operations = operations_pb2_grpc.OperationsStub(self.channel)

    def close(self) -> None:
        self.channel.close()
        self.process.terminate()
        assert self.process.wait(30) == 0

    def start(self, spec: Any, request_id: str) -> operations_pb2.Operation:
        context = types_pb2.StageContext(request_id=request_id, run="run", stage="stage")
        if isinstance(spec, merging_pb2.ImportSpec):
            return self.stub.Import(
                merging_pb2.ImportRequest(spec=spec, context=context), wait_for_ready=True
            )
        return self.stub.Merge(
            merging_pb2.MergeRequest(spec=spec, context=context), wait_for_ready=True
        )

    def finish(self, spec: Any, request_id: str) -> types_pb2.OperationResult:
        operation = self.start(spec, request_id)
        deadline = time.monotonic() + 120
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

    def artifacts(self, result: types_pb2.OperationResult) -> dict[str, Artifact]:
        return {output.name: self.store.get(output.digest) for output in result.outputs}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("merging"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def sources(service: Service, tiny_llama_dir: Path) -> tuple[Path, Path]:
    import shutil

    base = Path(shutil.copytree(tiny_llama_dir, service.place / "base"))
    return base, tiny_adapter(service.place / "adapter", base)


def refusal(call: Any) -> ArrieroError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return from_rpc_error(caught.value)


def test_imported_parts_are_merged_and_published(
    service: Service, sources: tuple[Path, Path]
) -> None:
    base, adapter = sources
    model = service.finish(merging_pb2.ImportSpec(source=str(base)), "i1").outputs[0]
    lora = service.finish(merging_pb2.ImportSpec(source=str(adapter)), "i2").outputs[0]
    assert (model.kind, lora.kind) == ("model", "adapter")
    spec = merging_pb2.MergeSpec(model=model.digest, adapters=[lora.digest])
    result = service.finish(spec, "m1")
    assert [output.name for output in result.outputs] == ["model", "golden"]
    merged = service.artifacts(result)["model"].manifest
    assert merged.golden == result.outputs[1].digest
    assert set(merged.parents) == {model.digest, lora.digest}
    assert not merged.quarantined
    assert {gate.gate: gate.verdict.value for gate in merged.gates} == {
        "adapter.health": "passed",
        "merge.delta": "passed",
        "merge.logits": "passed",
    }
    service.store.verify(result.outputs[0].digest)
    again = service.finish(spec, "m2")
    assert again.cached
    assert again.outputs[0].digest == result.outputs[0].digest


def test_a_failed_gate_keeps_the_model_in_quarantine(
    service: Service, sources: tuple[Path, Path]
) -> None:
    from safetensors.numpy import load_file, save_file

    service.finish(merging_pb2.ImportSpec(source=str(sources[0])), "whole")
    broken = tiny_adapter(service.place / "broken", sources[0])
    path = str(broken / "adapter_model.safetensors")
    save_file({n: t * ("lora_A" in n) for n, t in load_file(path).items()}, path)
    with pytest.raises(ArrieroError, match=r"adapter\.health") as caught:
        service.finish(merging_pb2.ImportSpec(source=str(broken)), "broken")
    assert caught.value.code == "FAILED_PRECONDITION"
    [kept] = [a for a in service.store.list("adapter") if a.quarantined]
    spec = merging_pb2.MergeSpec(model=service.store.list("model")[0].digest)
    spec.adapters.append(kept.digest)
    assert refusal(lambda: service.start(spec, "m3")).code == "FAILED_PRECONDITION"


def test_callers_mistakes_are_refused_before_work_starts(service: Service) -> None:
    for request_id, source, code in [
        ("r1", "/etc", "INVALID_ARGUMENT"),
        ("r2", f"{service.place}/../x", "INVALID_ARGUMENT"),
        ("r3", f"{service.place}/nothing", "NOT_FOUND"),
        ("r4", "ftp://x/y", "INVALID_ARGUMENT"),
    ]:
        spec = merging_pb2.ImportSpec(source=source)
        error = refusal(lambda spec=spec, i=request_id: service.start(spec, i))
        assert error.code == code
        assert "source" in error.message
        assert "Traceback" not in error.message


def test_a_damaged_source_fails_the_operation_with_its_reason(
    service: Service, sources: tuple[Path, Path]
) -> None:
    import shutil

    damaged = Path(shutil.copytree(sources[0], service.place / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = len(service.store.list())
    with pytest.raises(ArrieroError, match="cut off") as caught:
        service.finish(merging_pb2.ImportSpec(source=str(damaged)), "damaged")
    assert caught.value.code == "DATA_LOSS"
    assert len(service.store.list()) == before
