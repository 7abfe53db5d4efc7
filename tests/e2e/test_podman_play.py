"""The chart's pods in containers: of its default values, and over S3: `make kube-play`.

Every pod spec is the one that helm renders (or that the services make of the chart's
templates), started with `podman kube play` on the real images. The API server is a
fake that pods reach as they would reach a cluster's, with a service account, over
TLS; Jobs and Deployments that the services create become pods in the same way. Then
`helm test`'s own pod takes a model the whole way. The bucket is moto's, on this machine.
`arriero.testing.podman` says what podman ignores, and what is done here in the place of
a kubelet; probes are asked from outside of the pods, as the chart has them.

    ARRIERO_PLAY_REGISTRY, ARRIERO_PLAY_TAG   the images; default: localhost, the version
"""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from arriero.rpc.channel import check_health
from arriero.testing.cluster import NAMESPACE
from arriero.testing.controllers import JobController, ReplicaController
from arriero.testing.podman import Podman, missing

ROOT = Path(__file__).parents[2]
REGISTRY = os.environ.get("ARRIERO_PLAY_REGISTRY", "")
TAG = os.environ.get("ARRIERO_PLAY_TAG") or version("arriero")
IMAGES = [f"{REGISTRY}/arriero-{name}:{TAG}" for name in ("control", "worker", "llama")]
WHY_NOT = missing(IMAGES) if REGISTRY else "make kube-play runs these, with podman"

pytestmark = [
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
    pytest.mark.timeout(1800),
]

Object = dict[str, Any]


@dataclass
class Played:
    """A pod of the chart that runs."""

    name: str
    address: str
    spec: Object
    process: subprocess.Popen[bytes]
    said: list[str]

    def probe(self, kind: str) -> bool:
        """Ask a probe of its container, as a kubelet does."""
        container = self.spec["containers"][0]
        asked = container[kind]
        if "grpc" in asked:
            where = f"{self.address}:{asked['grpc']['port']}"
            return check_health(where, service=asked["grpc"]["service"], timeout=5)
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        get = asked["httpGet"]
        url = f"http://{self.address}:{ports[get['port']]}{get['path']}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def healthy(self) -> bool:
        """Whether it starts, lives and is ready."""
        assert self.process.poll() is None, f"{self.name} ended: {''.join(self.said[-20:])}"
        return all(map(self.probe, ("startupProbe", "livenessProbe", "readinessProbe")))


@pytest.fixture(scope="module", params=["claim", "s3"])
def kind(request: pytest.FixtureRequest) -> str:
    """Where the models lie: `store.kind`."""
    return str(request.param)


@pytest.fixture(scope="module")
def podman(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    name = f"arriero-play-{kind}-{uuid.uuid4().hex[:6]}"
    with Podman(name, tmp_path_factory.mktemp("podman")) as made:
        yield made


@pytest.fixture(scope="module")
def store(
    kind: str, podman: Podman, s3_at: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[str]]:
    """The chart's values for a kind of store, which is there; its Secret, too."""
    if kind == "claim":
        yield []
        return
    keys = {"AWS_ACCESS_KEY_ID": "AKIDLLAMA", "AWS_SECRET_ACCESS_KEY": "secret-of-the-herd"}
    data = {name: base64.b64encode(value.encode()).decode() for name, value in keys.items()}
    podman.cluster.put("secrets", {"metadata": {"name": "bucket"}, "data": data})
    with s3_at(tmp_path_factory.mktemp("s3"), "0.0.0.0") as url:
        key, secret = keys.values()
        s3 = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id=key,
            aws_secret_access_key=secret,
        )
        s3.create_bucket(Bucket="models")
        seen = url.replace("127.0.0.1", podman.gateway)
        own = f"url=s3://models/herd,store.s3.endpointUrl={seen},store.s3.existingSecret=bucket"
        yield ["--set", f"store.kind=s3,store.s3.{own}"]


@pytest.fixture(scope="module")
def chart(podman: Podman, store: list[str]) -> list[Object]:
    """What helm renders, for these images; claims and ConfigMaps are there."""
    fetch = [sys.executable, str(ROOT / "docker/fetch_helm.py")]
    helm = subprocess.run(fetch, check=True, capture_output=True, text=True).stdout.strip()
    where = ["--namespace", NAMESPACE, "--set", f"imageRegistry={REGISTRY},imageTag={TAG}"]
    rendered = subprocess.run(
        [helm, "template", "arriero", str(ROOT / "deploy/helm/arriero"), *where, *store],
        check=True,
        capture_output=True,
        text=True,
    )
    found = [item for item in yaml.safe_load_all(rendered.stdout) if item]
    podman.claim(of_kind(found, "PersistentVolumeClaim"))
    for item in of_kind(found, "ConfigMap"):
        podman.cluster.put("configmaps", item)
    return found


def of_kind(chart: list[Object], kind: str) -> list[Object]:
    return [found for found in chart if found["kind"] == kind]


@pytest.fixture(scope="module")
def controllers(podman: Podman) -> Iterator[None]:
    """Jobs and Deployments of the services become pods."""
    jobs = JobController(podman.cluster, {}, podman.start)
    replicas = ReplicaController(podman.cluster, {}, start=podman.start)
    yield
    replicas.close()
    jobs.close()


def follow(process: subprocess.Popen[bytes]) -> list[str]:
    """What it writes, line by line."""
    said: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        said.extend(line.decode(errors="replace") for line in process.stdout)

    threading.Thread(target=read, daemon=True).start()
    return said


@pytest.fixture(scope="module")
def pods(chart: list[Object], podman: Podman, controllers: None) -> dict[str, Played]:
    """All pods of Deployments, by name."""
    data = {found["metadata"]["name"]: found["data"] for found in of_kind(chart, "ConfigMap")}
    played = {}
    for deployment in of_kind(chart, "Deployment"):
        template = deployment["spec"]["template"]
        labels = template["metadata"]["labels"].items()
        names = [
            f"{service['metadata']['name']}.{NAMESPACE}.svc"
            for service in of_kind(chart, "Service")
            if service["spec"]["selector"].items() <= labels
        ]
        config = {
            volume["configMap"]["name"]: data[volume["configMap"]["name"]]
            for volume in template["spec"]["volumes"]
            if "configMap" in volume
        }
        for number in range(deployment["spec"]["replicas"]):
            name = f"{deployment['metadata']['name']}-{number}"
            pod = {"metadata": {**template["metadata"], "name": name}, "spec": template["spec"]}
            process, address = podman.start(pod, config=config, aliases=names)
            played[name] = Played(name, address, template["spec"], process, follow(process))
    return played


def test_every_pod_becomes_ready_by_its_own_probes(
    pods: dict[str, Played], wait_until: Callable[..., Any]
) -> None:
    assert len(pods) == 7
    for pod in pods.values():
        wait_until(pod.healthy, 300, f"{pod.name}'s readiness; {pod.said[-5:]}")


def test_every_pod_is_restricted_as_the_chart_says(pods: dict[str, Played], podman: Podman) -> None:
    looks = (
        "import os; "
        "print(os.getuid(), os.getgid()); "
        "print(*(l.split()[1] for l in open('/proc/self/status') if l.startswith("
        "('CapEff', 'CapBnd', 'NoNewPrivs', 'Seccomp:')))); "
        "print(bool(os.statvfs('/').f_flag & os.ST_RDONLY))"
    )
    for name in pods:
        found = podman.inside(name, "python", "-c", looks).splitlines()
        assert found == ["10001 10001", f"{'0' * 16} {'0' * 16} 1 2", "True"], name


def test_the_whole_way_through_jobs_and_replicas_of_the_charts_templates(
    chart: list[Object], pods: dict[str, Played], podman: Podman, kind: str
) -> None:
    """The pod of `helm test`."""
    replicas: dict[str, Object] = {}

    def note(_: str, plural: str, pod: Object) -> None:
        if plural == "pods" and "arriero.dev/deployment" in pod["metadata"]["labels"]:
            replicas[pod["metadata"]["name"]] = pod["spec"]

    podman.cluster.listen(note)
    (pod,) = of_kind(chart, "Pod")
    process, _ = podman.start(pod)
    output, _ = process.communicate(timeout=1500)
    said = output.decode()
    assert process.returncode == 0, said + "".join(pods["arriero-orchestrator-0"].said[-20:])
    assert "whole way: passed" in said
    assert "gateway answers" in said
    made = {job["metadata"]["labels"]["arriero.dev/stage"] for job in podman.cluster.all("jobs")}
    assert made >= {"rows", "sft", "tuned", "quants"}
    assert replicas
    for name, spec in replicas.items():
        variables = {item["name"] for item in spec["containers"][0]["env"]}
        assert not any(name.startswith("AWS_") for name in variables), variables
        fetched = podman.cluster.logs.get(f"{name}/model", "")
        assert ("all is there, verified" in fetched) == (kind == "s3"), fetched


def test_every_pod_ends_in_order_within_its_grace_period(
    pods: dict[str, Played], podman: Podman
) -> None:
    for name, pod in pods.items():
        grace = pod.spec["terminationGracePeriodSeconds"]
        assert podman.stop(name, grace) == 0, f"{name}: {''.join(pod.said[-5:])}"
