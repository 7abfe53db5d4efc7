"""The merging service as a process of its own, over gRPC: import, merge, export, refusals."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.longrunning import operations_pb2, operations_pb2_grpc

from arriero.errors import ArrieroError, DiskFull
from arriero.rpc.channel import connect_sync
from arriero.rpc.status import from_rpc_error, from_status
from arriero.store import Artifact, ManifestDraft, Store
from arriero.store.files import tree_size
from arriero.testing.adapters import tiny_adapter
from arriero.testing.hub import FakeHub, Repository
from arriero.testing.models import tiny_llama
from arriero.v1 import merging_pb2, merging_pb2_grpc, types_pb2


class Service:
    """A running service and how to call it."""

    def __init__(self, place: Path, hub: FakeHub, **extra: str) -> None:
        self.place = place
        self.hub = hub
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
                "ARRIERO_SECRET_HUB": hub.token,
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(place / "hf"),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                **extra,
            },
        )
        deadline = time.monotonic() + 300
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
        assert self.process.wait(120) == 0

    def start(self, spec: Any, request_id: str) -> operations_pb2.Operation:
        context = types_pb2.StageContext(request_id=request_id, run="run", stage="stage")
        if isinstance(spec, merging_pb2.ImportSpec):
            return self.stub.Import(
                merging_pb2.ImportRequest(spec=spec, context=context), wait_for_ready=True
            )
        if isinstance(spec, merging_pb2.ExportSpec):
            return self.stub.Export(
                merging_pb2.ExportRequest(spec=spec, context=context), wait_for_ready=True
            )
        return self.stub.Merge(
            merging_pb2.MergeRequest(spec=spec, context=context), wait_for_ready=True
        )

    def finish(self, spec: Any, request_id: str) -> types_pb2.OperationResult:
        return self.ended(self.start(spec, request_id))

    def ended(self, operation: operations_pb2.Operation) -> types_pb2.OperationResult:
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

    def artifacts(self, result: types_pb2.OperationResult) -> dict[str, Artifact]:
        return {output.name: self.store.get(output.digest) for output in result.outputs}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with FakeHub() as hub:
        running = Service(tmp_path_factory.mktemp("merging"), hub)
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
        "merge.vocab": "passed",
        "tokenizer.match": "passed",
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


def test_what_came_from_a_hub_goes_to_a_hub_with_its_card(
    service: Service, sources: tuple[Path, Path]
) -> None:
    """The hub is a fake: it speaks the Hub's API and Git LFS, but not Xet."""
    hub = service.hub
    files = {path.name: path.read_bytes() for path in sources[0].iterdir()}
    hub.repositories["meta/tiny"] = Repository(files)
    base = service.finish(merging_pb2.ImportSpec(source="hf://meta/tiny"), "h1").outputs[0]
    lora = service.finish(merging_pb2.ImportSpec(source=str(sources[1])), "h2").outputs[0]
    merge = merging_pb2.MergeSpec(model=base.digest, adapters=[lora.digest])
    merged = service.finish(merge, "h3").outputs[0]

    spec = merging_pb2.ExportSpec(
        model=merged.digest, max_shard_size=100_000, target="hf://me/tuned", token_secret="hub"
    )
    made = service.artifacts(service.finish(spec, "h4"))["model"]
    there = hub.repositories["me/tuned"]
    assert there.private
    assert made.manifest.labels["revision"] == there.commit
    for entry in made.manifest.files:
        assert there.files[entry.path] == made.file(entry.path).read_bytes()
    card = there.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: transformers\nbase_model: meta/tiny\n")
    assert f"revision `{'c' * 40}`" in card
    assert "| merge.logits | model `tiny` | passed |" in card
    assert '"qlora_base": "full"' in card
    assert f"`{lora.digest}`" in card
    assert str(service.place) not in card
    assert hub.token not in card

    # A push is never answered from the store.
    there.files.clear()
    assert not service.finish(spec, "h5").cached
    assert "README.md" in there.files
    # Without a target the same layout is made once.
    spec.ClearField("target")
    spec.ClearField("token_secret")
    assert not service.finish(spec, "h6").cached
    assert service.finish(spec, "h7").cached


def test_a_pushed_adapter_names_its_base_on_the_hub(
    service: Service, sources: tuple[Path, Path]
) -> None:
    import json

    from safetensors import safe_open

    files = {path.name: path.read_bytes() for path in sources[0].iterdir()}
    service.hub.repositories["meta/tiny"] = Repository(files)
    base = service.finish(merging_pb2.ImportSpec(source="hf://meta/tiny"), "a1").outputs[0]
    adapter = service.store.get(
        service.finish(merging_pb2.ImportSpec(source=str(sources[1])), "a2").outputs[0].digest
    )
    # As a training publishes it: made from its base.
    place = service.store.staging("test", "trained")
    for entry in adapter.manifest.files:
        (place / entry.path).write_bytes(adapter.file(entry.path).read_bytes())
    config = json.loads((place / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base.digest
    (place / "adapter_config.json").write_text(json.dumps(config))
    trained = service.store.publish(
        place, ManifestDraft(kind="adapter", name="sft", parents=[base.digest])
    )
    spec = merging_pb2.ExportSpec(
        model=trained.digest, target="hf://me/sft", token_secret="hub", private=False
    )
    output = service.finish(spec, "a3").outputs[0]
    assert output.digest == trained.digest
    there = service.hub.repositories["me/sft"]
    assert not there.private
    assert json.loads(there.files["adapter_config.json"])["base_model_name_or_path"] == "meta/tiny"
    assert 'AutoModelForCausalLM.from_pretrained("meta/tiny")' in there.files["README.md"].decode()
    copy = service.place / "sent.safetensors"
    copy.write_bytes(there.files["adapter_model.safetensors"])
    with safe_open(str(copy), "numpy") as tensors:
        assert list(tensors.keys())


def test_a_hub_that_refuses_fails_the_push_and_publishes_nothing(
    service: Service, sources: tuple[Path, Path]
) -> None:
    base = service.finish(merging_pb2.ImportSpec(source=str(sources[0])), "n1").outputs[0]
    before = len(service.store.list())
    service.hub.refuse = 403
    spec = merging_pb2.ExportSpec(model=base.digest, target="hf://me/no", token_secret="hub")
    with pytest.raises(ArrieroError, match="the hub refuses hf://me/no") as caught:
        service.finish(spec, "n2")
    service.hub.refuse = 0
    assert caught.value.code == "PERMISSION_DENIED"
    assert len(service.store.list()) == before
    error = refusal(
        lambda: service.start(merging_pb2.ExportSpec(model=base.digest, shards=2), "n3")
    )
    assert (error.code, "shards" in error.message) == ("INVALID_ARGUMENT", True)


def test_an_export_that_is_killed_publishes_nothing_and_is_done_again(
    service: Service, sources: tuple[Path, Path]
) -> None:
    base = service.finish(merging_pb2.ImportSpec(source=str(sources[0])), "k1").outputs[0]
    before = {artifact.digest for artifact in service.store.list()}
    spec = merging_pb2.ExportSpec(model=base.digest, format="meta", shards=2)
    operation = service.start(spec, "k2")
    deadline = time.monotonic() + 300
    while not (jobs := psutil.Process(service.process.pid).children()):
        assert time.monotonic() < deadline, "no job was started"
        time.sleep(0.01)
    for job in jobs:
        job.kill()
    result = service.ended(operation)
    metadata = types_pb2.OperationMetadata()
    request = operations_pb2.GetOperationRequest(name=operation.name)
    assert service.operations.GetOperation(request).metadata.Unpack(metadata)
    assert metadata.attempt == 2
    made = {artifact.digest for artifact in service.store.list()} - before
    assert made == {result.outputs[0].digest}
    service.store.verify(result.outputs[0].digest)


def published(store: Store, source: Path, kind: str) -> Artifact:
    import shutil

    place = store.staging("test", kind) / "out"
    shutil.copytree(source, place)
    return store.publish(place, ManifestDraft(kind=kind, name="thing"))


def test_a_merge_that_is_killed_publishes_nothing_and_is_done_again(
    service: Service, tmp_path: Path, wait_until: Any
) -> None:
    base = tiny_llama(tmp_path / "base", hidden=256, layers=8)
    running = Service(tmp_path, service.hub)
    try:
        model = published(running.store, base, "model")
        adapter = published(running.store, tiny_adapter(tmp_path / "a", base), "adapter")
        spec = merging_pb2.MergeSpec(model=model.digest, adapters=[adapter.digest])
        operation = running.start(spec, "killed")
        staging = tmp_path / "store" / "staging"
        wait_until(lambda: list(staging.glob("**/outputs/model/model.safetensors")))
        [job] = [
            child
            for child in psutil.Process(running.process.pid).children(recursive=True)
            if "arriero.merging.job" in " ".join(child.cmdline())
        ]
        job.kill()
        assert {artifact.digest for artifact in running.store.list()} == {
            model.digest,
            adapter.digest,
        }
        result = running.finish(spec, "killed")
        assert {output.name for output in result.outputs} == {"model", "golden"}
        running.store.verify(result.outputs[0].digest)
        metadata = types_pb2.OperationMetadata()
        found = running.operations.GetOperation(
            operations_pb2.GetOperationRequest(name=operation.name)
        )
        assert found.metadata.Unpack(metadata)
        assert metadata.attempt == 2
    finally:
        running.close()


def test_a_disk_that_is_too_small_is_refused_with_figures_before_the_first_byte(
    service: Service, tmp_path: Path, tiny_llama_dir: Path
) -> None:
    store = Store.open(tmp_path / "store")
    model = published(store, tiny_llama_dir, "model")
    adapter = published(store, tiny_adapter(tmp_path / "a", tiny_llama_dir), "adapter")
    room = tree_size(tmp_path / "store") + 100_000
    running = Service(tmp_path, service.hub, ARRIERO_STORE_QUOTA_BYTES=str(room))
    try:
        spec = merging_pb2.MergeSpec(model=model.digest, adapters=[adapter.digest])
        error = refusal(lambda: running.start(spec, "full"))
        assert isinstance(error, DiskFull)
        assert re.search(r"\(\d+ bytes\), .* free \(\d+ bytes\)", error.message)
        assert not list((tmp_path / "store" / "staging").glob("**/outputs/*"))
    finally:
        running.close()
