"""A replica of a store in S3: an init container brings what it reads, and it needs no bucket."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

import arriero
from arriero.client import Client
from arriero.store import Artifact, ManifestDraft, Store
from arriero.testing.cluster import FakeCluster
from arriero.v1 import orchestrator_pb2 as pb

ROOT = str(Path(next(iter(arriero.__path__))).parent)
PATH = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])


def delivery(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "arriero.inference.delivery"],
        env={**os.environ, "PYTHONPATH": PATH, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def store(s3_url: str) -> Store:
    return Store.open(s3_url)


@pytest.fixture
def publish(store: Store) -> Callable[..., Artifact]:
    def make(name: str, files: dict[str, bytes]) -> Artifact:
        source = store.staging("test", name) / "files"
        source.mkdir()
        for file, data in files.items():
            (source / file).write_bytes(data)
        return store.publish(source, ManifestDraft(kind="gguf", name=name))

    return make


@pytest.fixture
def deliver(s3_url: str, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*artifacts: Artifact) -> subprocess.CompletedProcess[str]:
        return delivery(
            {
                "ARRIERO_STORE": s3_url,
                "ARRIERO_STORE_CACHE": str(tmp_path / "model/.cache"),
                "ARRIERO_DELIVERY": str(tmp_path / "model"),
                "ARRIERO_ARTIFACTS": " ".join(found.digest for found in artifacts),
            }
        )

    return run


def test_what_a_replica_reads_is_there_and_nothing_else(
    publish: Callable[..., Artifact], deliver: Callable[..., Any], tmp_path: Path
) -> None:
    model, adapter, other = (
        publish(name, {"a.gguf": name.encode() * 1000}) for name in ("zh", "poet", "other")
    )
    done = deliver(model, adapter)
    assert done.returncode == 0, done.stderr
    assert f"1 of 2: gguf zh, {model.digest}, {model.manifest.size} bytes" in done.stderr

    volume = Store.open(tmp_path / "model")
    assert {found.digest for found in volume.list()} == {model.digest, adapter.digest}
    volume.verify(model.digest)
    assert volume.get(model.digest).manifest == model.manifest
    copies = list((tmp_path / "model").rglob("a.gguf"))
    assert len(copies) == 2  # the room is for one of each
    assert other.digest not in str(list((tmp_path / "model").rglob("*")))

    assert deliver(model, adapter).returncode == 0  # the node was restarted


def test_what_is_damaged_or_gone_is_said_in_one_line_and_never_there(
    store: Store, publish: Callable[..., Artifact], deliver: Callable[..., Any], tmp_path: Path
) -> None:
    model = publish("zh", {"a.gguf": b"llama" * 1000})
    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    s3 = boto3.client("s3", endpoint_url=os.environ["ARRIERO_STORE_ENDPOINT_URL"], region_name="x")
    (file,) = s3.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/files/")["Contents"]
    s3.put_object(Bucket=bucket, Key=file["Key"], Body=b"other" * 1000)

    done = deliver(model)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "somebody changed the bucket" in done.stderr.splitlines()[-1]
    assert list(Store.open(tmp_path / "model").list()) == []

    s3.delete_object(Bucket=bucket, Key=file["Key"])
    done = deliver(model)
    assert done.returncode == 1
    assert "is gone" in done.stderr.splitlines()[-1]


@pytest.fixture
def herd(publish: Callable[..., Artifact], tiny_gguf: Path) -> Callable[[str], Artifact]:
    """Publishes versions of a model."""
    data = tiny_gguf.read_bytes()
    return lambda name: publish(name, {"herd.gguf": data, "version": name.encode()})


def test_replicas_have_their_files_and_no_access_to_the_bucket(
    fetching: Client,
    cluster: FakeCluster,
    herd: Callable[[str], Artifact],
    tmp_path: Path,
    wait_until: Callable[..., Any],
) -> None:
    model = herd("v1")
    herd("v2")
    fetching.endpoints.create("herd", model.digest, context=256)
    wait_until(lambda: fetching.endpoints.get("herd").ready_replicas, 300, "its replica")
    assert fetching.endpoint("herd").generate("llama", max_tokens=4, temperature=0).text()
    (pod,) = cluster.all("pods")
    (volume,) = pod["spec"]["volumes"]
    assert int(volume["emptyDir"]["sizeLimit"]) == model.manifest.size + (1 << 20)
    name = pod["metadata"]["name"]
    delivered = Store.open(tmp_path / "volumes" / name / "model")
    assert [found.digest for found in delivered.list()] == [model.digest]
    assert "all is there, verified" in cluster.logs[f"{name}/model"]
    assert not any(e["name"].startswith("AWS") for e in pod["spec"]["containers"][0]["env"])


@pytest.fixture
def deploy(
    fetching: Client, tmp_path: Path, wait_until: Callable[..., Any]
) -> Callable[[Artifact], str]:
    """Deploys a model by a run: its error."""

    def run(model: Artifact) -> str:
        work = {"model": model.digest, "endpoint": "herd", "context": 256, "timeout_seconds": 60}
        body = {"name": "herd", "stages": [{"name": "live", "deploy": work}]}
        (tmp_path / "herd.yaml").write_text(json.dumps(body))
        made = fetching.create_run(tmp_path / "herd.yaml").id
        ended = wait_until(
            lambda: (found := fetching.get_run(made)).state > pb.RUN_STATE_RUNNING and found,
            90,
            "the run's end",
        )
        return str(ended.error.message)

    return run


def test_a_model_that_is_damaged_is_the_runs_error_and_the_one_before_goes_on(
    fetching: Client, store: Store, herd: Callable[[str], Artifact], deploy: Callable[..., str]
) -> None:
    before, model = herd("v1"), herd("v2")
    assert deploy(before) == ""
    bucket, _, prefix = store.url.removeprefix("s3://").partition("/")
    s3 = boto3.client("s3", endpoint_url=os.environ["ARRIERO_STORE_ENDPOINT_URL"], region_name="x")
    for found in s3.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/files/")["Contents"]:
        place = {"Bucket": bucket, "Key": found["Key"]}
        if s3.get_object(**place)["Body"].read() == b"v2":
            s3.put_object(**place, Body=b"v3")

    said = deploy(model)
    assert "its init container model ended" in said
    assert "somebody changed the bucket" in said
    assert "serves what it served before" in said
    assert fetching.endpoints.get("herd").spec.model == before.digest
    assert fetching.endpoint("herd").generate("llama", max_tokens=4, temperature=0).text()


@pytest.mark.parametrize("endpoint_url", ["http://127.0.0.1:9"])
def test_a_bucket_that_replicas_do_not_reach_is_the_runs_error(
    herd: Callable[[str], Artifact], deploy: Callable[..., str]
) -> None:
    said = deploy(herd("v1"))
    assert "its init container model ended" in said
    assert "http://127.0.0.1:9" in said


@pytest.mark.parametrize("margin", ["1"])
def test_a_volume_that_is_too_small_is_the_runs_error(
    herd: Callable[[str], Artifact], deploy: Callable[..., str]
) -> None:
    model = herd("v1")
    said = deploy(model)
    assert f'volume "model" exceeds the limit "{model.manifest.size + 1}"' in said
