"""Preparing is killed, or its service is: the next attempt makes the same bytes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from google.longrunning import operations_pb2, operations_pb2_grpc

from arriero import rpc
from arriero.operations.process import marked
from arriero.settings import ClientSettings
from arriero.store import ManifestDraft, Store
from arriero.v1 import dataset_pb2, dataset_pb2_grpc, types_pb2

ROWS = 30_000


class Place:
    """A home with rows that take seconds, and the service that may be killed."""

    def __init__(self, root: Path, model: Path, wait_until: Callable[..., Any]) -> None:
        self.root, self._wait_until = root, wait_until
        self.data = root / "data"
        self.data.mkdir()
        rows = (
            {"instruction": f"Describe llama {i}.", "output": f"Llama {i} is {i % 13} years old."}
            for i in range(ROWS)
        )
        (self.data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.store = Store.open(root / "store")
        staging = self.store.staging("tests", "tokenizer") / "files"
        shutil.copytree(model, staging)
        self.tokenizer = self.store.publish(staging, ManifestDraft(kind="model", name="tiny"))
        self.service: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        address = self.root / "address"
        address.unlink(missing_ok=True)
        self.service = subprocess.Popen(
            [sys.executable, "-m", "arriero.dataset"],
            env=os.environ
            | {
                "ARRIERO_STORE": str(self.root / "store"),
                "ARRIERO_LISTEN": "127.0.0.1:0",
                "ARRIERO_ADDRESS_FILE": str(address),
                "ARRIERO_ALLOWED_PATHS": str(self.data),
            },
        )
        self._wait_until(address.exists, what="the service starts")
        self.channel = rpc.connect_sync(address.read_text().strip(), ClientSettings())

    def begin(self, request_id: str) -> str:
        request = dataset_pb2.PrepareDatasetRequest(
            # Forced, so that it is done again whatever the store has.
            context=types_pb2.StageContext(request_id=request_id, stage="rows", force=True),
            spec=dataset_pb2.DatasetSpec(
                sources=[str(self.data / "rows.jsonl")],
                tokenizer=self.tokenizer.digest,
                val_set_size=100,
                dedup="near",
                packing=True,
                num_proc=2,
            ),
        )
        with rpc.translated():
            stub = dataset_pb2_grpc.DatasetServiceStub(self.channel)
            return str(stub.PrepareDataset(request, timeout=120).name)

    def wait(self, name: str) -> tuple[dict[str, str], int]:
        """Digest of every file that was made, and how many attempts that took."""
        with rpc.translated():
            done = operations_pb2_grpc.OperationsStub(self.channel).WaitOperation(
                operations_pb2.WaitOperationRequest(name=name), timeout=300
            )
        assert not done.HasField("error"), done.error
        metadata = types_pb2.OperationMetadata()
        assert done.metadata.Unpack(metadata)
        files = {}
        for output in metadata.outputs:
            self.store.verify(output.digest)
            for entry in self.store.get(output.digest).manifest.files:
                files[f"{output.name}/{entry.path}"] = entry.sha256
        return files, metadata.attempt

    def encoding(self) -> list[psutil.Process]:
        """The job and its crew, as soon as tokens are being written."""

        def found() -> list[psutil.Process]:
            for spool in self.root.glob("store/staging/dataset/*/attempts/*/scratch/tokens.bin"):
                if spool.stat().st_size:
                    processes = []
                    for pid in marked(spool.parts[-5]):
                        with contextlib.suppress(psutil.NoSuchProcess):
                            processes.append(psutil.Process(pid))
                    return processes
            return []

        return self._wait_until(found, what="rows are encoded")

    def kill(self) -> None:
        assert self.service is not None
        self.service.kill()
        self.service.wait()
        self.channel.close()


@pytest.fixture
def place(tmp_path: Path, tiny_llama_dir: Path, wait_until) -> Iterator[Place]:
    made = Place(tmp_path, tiny_llama_dir, wait_until)
    made.start()
    yield made
    made.channel.close()
    made.service.send_signal(signal.SIGTERM)
    assert made.service.wait(120) == 0


def test_kills_of_the_job_and_of_its_service_change_no_byte(place: Place, wait_until) -> None:
    undisturbed, attempts = place.wait(place.begin("first"))
    assert attempts == 1
    assert {"train/data.arrow", "val/data.arrow", "report/report.json"} <= set(undisturbed)

    name = place.begin("job")
    for process in place.encoding():
        with contextlib.suppress(psutil.NoSuchProcess):  # gone with the one killed before
            process.kill()
    assert place.wait(name) == (undisturbed, 2)

    name = place.begin("service")
    processes = place.encoding()
    place.kill()
    wait_until(lambda: not any(p.is_running() for p in processes), 300, "the job follows")
    place.start()
    assert place.wait(name) == (undisturbed, 2)
