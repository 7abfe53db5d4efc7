"""Rows on an S3 server and on a hub: previewed and prepared by the service as those on disk are."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from google.longrunning import operations_pb2, operations_pb2_grpc
from moto.server import ThreadedMotoServer

from arriero import rpc
from arriero.dataset.service import MOST_FETCHED
from arriero.errors import ArrieroError, FailedPrecondition, NotFound, PermissionDenied
from arriero.settings import ClientSettings
from arriero.store import ManifestDraft, Store
from arriero.testing.hub import TOKEN, FakeHub, Repository
from arriero.v1 import dataset_pb2, dataset_pb2_grpc, types_pb2

ROWS = "".join(
    json.dumps({"instruction": f"Name llama {i}.", "output": f"Llama {i % 5} of the herd."}) + "\n"
    for i in range(40)
).encode()
KEYS = {"aws_access_key_id": "AKIDLLAMA", "aws_secret_access_key": "secret"}


class Elsewhere:
    """The service, and the same rows in three places."""

    def __init__(self, address: str, root: Path, tokenizer: str) -> None:
        self.tokenizer = tokenizer
        self.local = str(root / "data" / "rows.jsonl")
        self.store = Store.open(root / "store")
        self.channel = rpc.connect_sync(address, ClientSettings())
        self._stub = dataset_pb2_grpc.DatasetServiceStub(self.channel)

    def spec(self, source: str, **fields: Any) -> dataset_pb2.DatasetSpec:
        return dataset_pb2.DatasetSpec(sources=[source], tokenizer=self.tokenizer, **fields)

    def preview(self, source: str, **fields: Any) -> dataset_pb2.PreviewDatasetResponse:
        with rpc.translated():
            return self._stub.PreviewDataset(
                dataset_pb2.PreviewDatasetRequest(spec=self.spec(source, **fields), rows=30),
                timeout=120,
            )

    def prepared(self, source: str, **fields: Any) -> str:
        """sha256 of the rows that are trained on."""
        request = dataset_pb2.PrepareDatasetRequest(
            context=types_pb2.StageContext(stage="rows", force=True),
            spec=self.spec(source, **fields),
        )
        with rpc.translated():
            started = self._stub.PrepareDataset(request, timeout=120)
            done = operations_pb2_grpc.OperationsStub(self.channel).WaitOperation(
                operations_pb2.WaitOperationRequest(name=started.name), timeout=300
            )
        assert not done.HasField("error"), done.error
        result = types_pb2.OperationResult()
        done.response.Unpack(result)
        files = self.store.get(result.outputs[0].digest).manifest.files
        return next(entry.sha256 for entry in files if entry.path == "data.arrow")


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as made:
        made.repositories["org/rows"] = Repository({"data/rows.jsonl": ROWS, "README.md": b"#"})
        made.repositories["org/gated"] = Repository({"data/rows.jsonl": ROWS}, gated=True)
        yield made


@pytest.fixture(scope="module")
def elsewhere(
    tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory, hub: FakeHub, wait_until: Any
) -> Iterator[Elsewhere]:
    root = tmp_path_factory.mktemp("elsewhere")
    (root / "data").mkdir()
    (root / "data" / "rows.jsonl").write_bytes(ROWS)
    store = Store.open(root / "store")
    staging = store.staging("tests", "tokenizer") / "files"
    shutil.copytree(tiny_llama_dir, staging)
    tokenizer = store.publish(staging, ManifestDraft(kind="model", name="tiny")).digest
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    s3 = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **KEYS)
    s3.create_bucket(Bucket="corpora")
    s3.put_object(Bucket="corpora", Key="faq/rows.jsonl", Body=ROWS)
    s3.put_object(Bucket="corpora", Key="packed/rows.jsonl.gz", Body=gzip.compress(ROWS))
    s3.put_object(Bucket="corpora", Key="huge/rows.jsonl", Body=b"\n" * (MOST_FETCHED + 1))
    address = root / "address"
    service = subprocess.Popen(
        [sys.executable, "-m", "arriero.dataset"],
        env={key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        | {
            "ARRIERO_STORE": str(root / "store"),
            "ARRIERO_LISTEN": "127.0.0.1:0",
            "ARRIERO_ADDRESS_FILE": str(address),
            "ARRIERO_ALLOWED_PATHS": str(root / "data"),
            "ARRIERO_SECRET_HUB": TOKEN,
            "AWS_ENDPOINT_URL": url,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            **{key.upper(): value for key, value in KEYS.items()},
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(root / "hf"),
            "HF_HUB_DISABLE_XET": "1",
        },
    )
    try:
        wait_until(address.exists, what="the service starts")
        made = Elsewhere(address.read_text().strip(), root, tokenizer)
        yield made
        made.channel.close()
    finally:
        service.send_signal(signal.SIGTERM)
        assert service.wait(120) == 0
        server.stop()


@pytest.mark.parametrize(
    ("source", "fields"),
    [
        ("s3://corpora/faq/", {}),
        ("s3://corpora/packed/rows.jsonl.gz", {}),
        ("hf://datasets/org/rows@main/data", {}),
        ("hf://datasets/org/gated", {"token_secret": "hub"}),
    ],
)
def test_rows_elsewhere_are_previewed_and_prepared_as_those_on_disk_are(
    elsewhere: Elsewhere, source: str, fields: dict[str, Any]
) -> None:
    near, far = elsewhere.preview(elsewhere.local), elsewhere.preview(source, **fields)
    assert (far.rows, far.all_rows, far.format) == (30, False, "alpaca")
    assert far.samples[0].file.startswith(source[:5])
    for sample in (*near.samples, *far.samples):
        sample.ClearField("file")
    assert far == near
    assert elsewhere.prepared(source, **fields) == elsewhere.prepared(elsewhere.local)


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("s3://corpora/none", NotFound, "s3://corpora/none does not exist"),
        ("s3://nowhere/rows.jsonl", NotFound, "does not exist"),
        ("s3://corpora/huge/", FailedPrecondition, "a preview fetches at most"),
        ("hf://datasets/org/none", NotFound, "does not exist"),
        ("hf://datasets/org/gated", PermissionDenied, "give token_secret"),
    ],
)
def test_what_cannot_be_previewed_says_why(
    elsewhere: Elsewhere, source: str, error: type[ArrieroError], words: str
) -> None:
    with pytest.raises(error, match=words):
        elsewhere.preview(source)


def test_a_connection_that_breaks_loses_no_row(elsewhere: Elsewhere, hub: FakeHub) -> None:
    before = elsewhere.prepared(elsewhere.local)
    hub.repositories["org/fresh"] = Repository({"rows.jsonl": ROWS}, commit="d" * 40)
    hub.break_after = len(ROWS) // 2
    assert elsewhere.prepared("hf://datasets/org/fresh") == before
    assert hub.break_after is None, "it broke"
