"""The dataset service as a process of its own, over gRPC, with real jobs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.longrunning import operations_pb2, operations_pb2_grpc

from arriero import errors, rpc
from arriero.settings import ClientSettings
from arriero.store import Artifact, ManifestDraft, Store
from arriero.v1 import dataset_pb2, dataset_pb2_grpc, types_pb2

ROW = {"instruction": "Name a river.", "input": "", "output": "The Urubamba."}


class Service:
    """A running service and what to ask of it."""

    def __init__(self, address: str, store: Store, tokenizer: Artifact, data: Path) -> None:
        self.store, self.tokenizer, self.data = store, tokenizer, data
        self.channel = rpc.connect_sync(address, ClientSettings())
        self._stub = dataset_pb2_grpc.DatasetServiceStub(self.channel)
        self._operations = operations_pb2_grpc.OperationsStub(self.channel)

    def prepare(self, rows: str, request_id: str = "", **fields) -> operations_pb2.Operation:
        """Start over a file with these contents, and wait for the end."""
        (self.data / "rows.jsonl").write_text(rows)
        fields.setdefault("sources", [str(self.data / "rows.jsonl")])
        fields.setdefault("tokenizer", self.tokenizer.digest)
        request = dataset_pb2.PrepareDatasetRequest(
            context=types_pb2.StageContext(request_id=request_id, stage="rows"),
            spec=dataset_pb2.DatasetSpec(**fields),
        )
        with rpc.translated():
            started = self._stub.PrepareDataset(request, timeout=120)
            return self._operations.WaitOperation(
                operations_pb2.WaitOperationRequest(name=started.name), timeout=300
            )


def outputs(operation: operations_pb2.Operation) -> dict[str, types_pb2.StageOutput]:
    metadata = types_pb2.OperationMetadata()
    operation.metadata.Unpack(metadata)
    return {output.name: output for output in metadata.outputs}


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def service(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    place = tmp_path_factory.mktemp("dataset-service")
    data = place / "data"
    data.mkdir()
    store = Store.open(place / "store")
    staging = store.staging("tests", "tokenizer") / "files"
    shutil.copytree(tiny_llama_dir, staging)
    tokenizer = store.publish(staging, ManifestDraft(kind="model", name="tiny"))
    address_file = place / "address"
    process = subprocess.Popen(
        [sys.executable, "-m", "arriero.dataset"],
        env=os.environ
        | {
            "ARRIERO_STORE": str(place / "store"),
            "ARRIERO_LISTEN": "127.0.0.1:0",
            "ARRIERO_ADDRESS_FILE": str(address_file),
            "ARRIERO_ALLOWED_PATHS": str(data),
        },
    )
    try:
        deadline = time.monotonic() + 300
        while not address_file.exists():
            assert process.poll() is None, "the service ended at once"
            assert time.monotonic() < deadline, "the service did not start"
            time.sleep(0.05)
        made = Service(address_file.read_text().strip(), store, tokenizer, data)
        yield made
        made.channel.close()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


def test_a_dataset_is_prepared_and_published(service: Service) -> None:
    operation = service.prepare(lines(*[ROW] * 10), val_set_size=2)
    assert not operation.HasField("error"), operation.error
    result = types_pb2.OperationResult()
    assert operation.response.Unpack(result)
    assert [output.name for output in result.outputs] == ["train", "val", "report"]
    train = service.store.get(result.outputs[0].digest)
    assert train.manifest.kind == "dataset"
    assert train.manifest.parents == (service.tokenizer.digest,)
    assert train.manifest.spec["cutoff_len"] == 512
    assert train.manifest.spec["sha256"][0].startswith("sha256:")
    assert {entry.path for entry in train.manifest.files} == {
        "arriero-template.json",
        "data.arrow",
        "dataset.json",
        "probe.json",
    }
    assert {gate.verdict for gate in result.gates} == {types_pb2.GATE_VERDICT_PASSED}


def test_the_same_bytes_elsewhere_are_answered_from_the_store(service: Service) -> None:
    rows = lines(ROW, ROW)
    first = service.prepare(rows)
    (service.data / "copy.jsonl").write_text(rows)
    second = service.prepare(rows, sources=[str(service.data / "copy.jsonl")])
    result = types_pb2.OperationResult()
    second.response.Unpack(result)
    assert result.cached
    assert outputs(first)["train"].digest == outputs(second)["train"].digest


def test_a_failed_gate_quarantines_what_was_made(service: Service) -> None:
    operation = service.prepare(lines(ROW, {"instruction": "x"}, ROW))
    error = rpc.from_status(operation.error)
    assert isinstance(error, errors.FailedPrecondition)
    assert "dataset.schema" in error.message
    assert "row 2 (line 2): field 'output' is missing" in error.message
    made = outputs(operation)["train"]
    assert made.quarantined
    assert service.store.get(made.digest).quarantined


@pytest.mark.parametrize(
    ("rows", "fields", "field"),
    [
        (lines(ROW) + '{"instruction": ', {}, "sources[0]"),
        ("", {}, "sources"),
        (lines(ROW), {"sources": ["/etc/passwd"]}, "sources[0]"),
        (lines(ROW), {"sources": ["../rows.jsonl"]}, "sources[0]"),
        (lines(ROW), {"template": "alpacca"}, "template"),
        (lines(ROW), {"cutoff_len": 1}, "cutoff_len"),
    ],
)
def test_wrong_requests_are_refused_before_work_starts(
    service: Service, rows: str, fields: dict[str, object], field: str
) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        service.prepare(rows, **fields)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_missing_sources_and_tokenizers_are_not_found(service: Service) -> None:
    with pytest.raises(errors.NotFound):
        service.prepare(lines(ROW), sources=[str(service.data / "nothing.jsonl")])
    with pytest.raises(errors.NotFound):
        service.prepare(lines(ROW), tokenizer="sha256:" + "0" * 64)
