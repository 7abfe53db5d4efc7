"""A replica of a store in S3: an init container brings what it reads, and it needs no bucket."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

import arriero
from arriero.client import Client
from arriero.store import Artifact, ManifestDraft, Store
from arriero.testing.cluster import NAMESPACE, FakeCluster
from arriero.testing.controllers import ReplicaController

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


def without_a_bucket(env: dict[str, str]) -> dict[str, str]:
    """What the replica's own container has of the environment."""
    gone = ("AWS_", "ARRIERO_STORE")
    return {key: value for key, value in env.items() if not key.startswith(gone)}


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
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster() as made:
        yield made


@pytest.fixture
def client(
    cluster: FakeCluster,
    s3_url: str,
    s3_env: dict[str, str],
    tmp_path: Path,
    wait_until: Callable[..., Any],
) -> Iterator[Client]:
    """Of an orchestrator whose replicas are processes, each with a volume of its own."""
    templates = tmp_path / "platform"
    templates.mkdir()

    def variables(**env: str) -> list[dict[str, str]]:
        return [{"name": name, "value": value} for name, value in env.items()]

    initial = {
        "name": "model",
        "image": "herd/llama:1",
        "args": ["python", "-m", "arriero.inference.delivery"],
        "env": variables(
            ARRIERO_STORE=s3_url, ARRIERO_STORE_CACHE="/model/.cache", ARRIERO_DELIVERY="/model"
        ),
    }
    container = {
        "name": "main",
        "image": "herd/llama:1",
        "args": ["python", "-m", "arriero.inference"],
        "env": variables(ARRIERO_STORE="file:///model"),
        "ports": [{"name": "grpc", "containerPort": 50051}],
    }
    pod = {
        "initContainers": [initial],
        "containers": [container],
        "volumes": [{"name": "model", "emptyDir": {"sizeLimit": "1Mi"}}],
    }
    body = {"kind": "Deployment", "spec": {"template": {"spec": pod}}}
    (templates / "endpoint.yaml").write_text(yaml.safe_dump(body))
    count = iter(range(2, 250))

    def start(pod: dict[str, Any], env: Any) -> tuple[subprocess.Popen[bytes], str]:
        """As a kubelet: the volume, the init container, the container."""
        volume, address = str(tmp_path / pod["metadata"]["name"]), f"127.0.1.{next(count)}"
        (first,) = pod["spec"]["initContainers"]
        given = {e["name"]: e["value"].replace("/model", volume, 1) for e in first["env"][1:]}
        done = delivery({"ARRIERO_STORE": s3_url, **given})
        assert done.returncode == 0, done.stderr
        here = {key: value.replace("/model", volume) for key, value in env.items()}
        process = subprocess.Popen(
            [sys.executable, *pod["spec"]["containers"][0]["args"][1:]],
            env={
                **without_a_bucket(dict(os.environ)),
                "PYTHONPATH": PATH,
                **here,
                "ARRIERO_LISTEN": f"{address}:50051",
            },
        )
        return process, address

    replicas = ReplicaController(cluster, {}, start=start)
    address = tmp_path / "address"
    orchestrator = subprocess.Popen(
        [sys.executable, "-m", "arriero.orchestrator"],
        env={
            **os.environ,
            "PYTHONPATH": PATH,
            "ARRIERO_STORE": s3_url,
            "ARRIERO_HOME": str(tmp_path / "home"),
            "ARRIERO_DATABASE_URL": f"sqlite:///{tmp_path / 'orchestrator.db'}",
            "ARRIERO_ADDRESS_FILE": str(address),
            "ARRIERO_METRICS_LISTEN": "127.0.0.1:0",
            "ARRIERO_PLATFORM": "kubernetes",
            "ARRIERO_PLATFORM_DIR": str(templates),
            "ARRIERO_NAMESPACE": NAMESPACE,
            "ARRIERO_RELEASE": "herd",
            "KUBECONFIG": str(cluster.kubeconfig(tmp_path / "kubeconfig")),
        },
    )
    try:
        wait_until(lambda: address.exists() or orchestrator.poll() is not None, what="it is up")
        with Client(address.read_text().strip()) as made:
            yield made
    finally:
        orchestrator.terminate()
        orchestrator.wait(20)
        replicas.close()


def test_replicas_answer_without_access_to_the_bucket_and_another_model_takes_over(
    client: Client,
    cluster: FakeCluster,
    publish: Callable[..., Artifact],
    tiny_gguf: Path,
    wait_until: Callable[..., Any],
) -> None:
    data = tiny_gguf.read_bytes()
    models = [publish(name, {"herd.gguf": data, "n": name.encode()}) for name in ("v1", "v2")]

    def settled(digest: str) -> bool:
        found = client.endpoints.get("herd")
        ready = found.ready_replicas == found.desired_replicas == len(found.replicas)
        return ready and {r.digest for r in found.replicas} == {digest}

    for model, ask in zip(models, (client.endpoints.create, client.endpoints.update), strict=True):
        ask("herd", model.digest, context=256)
        wait_until(lambda digest=model.digest: settled(digest), 90, "its replicas")
        assert client.endpoint("herd").generate("llama", max_tokens=4, temperature=0).text()
    spec = cluster.get("deployments", "herd-endpoint-herd")["spec"]["template"]["spec"]
    (volume,) = spec["volumes"]
    assert int(volume["emptyDir"]["sizeLimit"]) == models[1].manifest.size + (1 << 20)
