"""An orchestrator on a cluster that is a fake; its replicas are processes of this machine."""

from __future__ import annotations

import base64
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

import arriero
from arriero.client import Client
from arriero.testing.cluster import NAMESPACE, FakeCluster
from arriero.testing.controllers import ReplicaController

ROOT = str(Path(next(iter(arriero.__path__))).parent)
PATH = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster() as made:
        yield made


@pytest.fixture
def on_kubernetes(
    cluster: FakeCluster, tmp_path: Path, wait_until: Callable[..., Any]
) -> Callable[..., AbstractContextManager[Client]]:
    """Runs an orchestrator for a `with` block; takes its store, and the pod of a replica."""

    @contextlib.contextmanager
    def run(store: str, pod: dict[str, Any]) -> Iterator[Client]:
        templates = tmp_path / "platform"
        templates.mkdir()
        body = {"kind": "Deployment", "spec": {"template": {"spec": pod}}}
        (templates / "endpoint.yaml").write_text(yaml.safe_dump(body))
        env = {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}
        replicas = ReplicaController(cluster, env, volumes=tmp_path / "volumes")
        address = tmp_path / "address"
        orchestrator = subprocess.Popen(
            [sys.executable, "-m", "arriero.orchestrator"],
            env={
                **os.environ,
                **env,
                "ARRIERO_STORE": store,
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
            orchestrator.wait(120)
            replicas.close()

    return run


def _replica(store: str) -> dict[str, Any]:
    return {
        "name": "main",
        "image": "herd/llama:1",
        "args": ["python", "-m", "arriero.inference"],
        "env": [{"name": "ARRIERO_STORE", "value": store}],
        "ports": [{"name": "grpc", "containerPort": 50051}],
    }


@pytest.fixture
def sharing(
    on_kubernetes: Callable[..., AbstractContextManager[Client]], tmp_path: Path
) -> Iterator[Client]:
    """Of an orchestrator whose replicas share its store."""
    store = str(tmp_path / "store")
    with on_kubernetes(store, {"containers": [_replica(store)]}) as made:
        yield made


@pytest.fixture
def margin() -> str:
    """What a volume may hold beyond the model."""
    return "1Mi"


@pytest.fixture
def endpoint_url(s3_env: dict[str, str]) -> str:
    """Where replicas' init containers look for the bucket."""
    return s3_env["ARRIERO_STORE_ENDPOINT_URL"]


@pytest.fixture
def fetching(
    on_kubernetes: Callable[..., AbstractContextManager[Client]],
    cluster: FakeCluster,
    s3_url: str,
    s3_env: dict[str, str],
    endpoint_url: str,
    margin: str,
) -> Iterator[Client]:
    """Of an orchestrator whose replicas have their models brought, and no access to the bucket."""
    keys = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    data = {key: base64.b64encode(s3_env[key].encode()).decode() for key in keys}
    cluster.put("secrets", {"metadata": {"name": "bucket"}, "data": data})
    variables = {
        "ARRIERO_STORE": s3_url,
        "ARRIERO_STORE_CACHE": "/model/.cache",
        "ARRIERO_STORE_ENDPOINT_URL": endpoint_url,
        "ARRIERO_DELIVERY": "/model",
    }
    volume = {"name": "model", "mountPath": "/model"}
    initial = {
        "name": "model",
        "image": "herd/llama:1",
        "args": ["python", "-m", "arriero.inference.delivery"],
        "env": [
            *({"name": name, "value": value} for name, value in variables.items()),
            *(
                {"name": key, "valueFrom": {"secretKeyRef": {"name": "bucket", "key": key}}}
                for key in keys
            ),
        ],
        "volumeMounts": [volume],
    }
    pod = {
        "initContainers": [initial],
        "containers": [_replica("file:///model") | {"volumeMounts": [volume]}],
        "volumes": [{"name": "model", "emptyDir": {"sizeLimit": margin}}],
    }
    with on_kubernetes(s3_url, pod) as made:
        yield made
