"""A release on a real cluster: installed, tested, hurt, scaled, updated, removed.

Runs only when it is asked to (`make e2e`), with

    ARRIERO_E2E_KUBECONFIG   of a cluster whose namespace may be made and removed
    ARRIERO_E2E_REGISTRY     where the three images are, such as registry.example/arriero
    ARRIERO_E2E_TAG          their tag
    ARRIERO_E2E_UPGRADE_TAG  the tag to update to; default: the same images, other settings
    ARRIERO_E2E_VALUES       a values file for what the cluster needs (storage classes, ...)
    ARRIERO_E2E_NAMESPACE    default: arriero-e2e

and `helm` and `kubectl` on the path. The tests build on each other, in file order.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from arriero.client import Client
from arriero.errors import InvalidArgument
from arriero.testing.models import tiny_llama
from arriero.v1 import orchestrator_pb2 as pb

KUBECONFIG = os.environ.get("ARRIERO_E2E_KUBECONFIG", "")
NAMESPACE = os.environ.get("ARRIERO_E2E_NAMESPACE", "arriero-e2e")
CHART = Path(__file__).parents[2] / "deploy/helm/arriero"
RELEASE = "arriero"
ENDPOINT = "herd"

pytestmark = [
    pytest.mark.skipif(not KUBECONFIG, reason="make e2e runs these, on a real cluster"),
    pytest.mark.timeout(1800),
]


def run(*command: str, check: bool = True, timeout: float = 900) -> str:
    env = {**os.environ, "KUBECONFIG": KUBECONFIG}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    if check:
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def kubectl(*arguments: str, **options: Any) -> str:
    return run("kubectl", "-n", NAMESPACE, *arguments, **options)


def objects(kind: str, selector: str = "") -> list[dict[str, Any]]:
    found = kubectl("get", kind, "-l", selector, "-o", "json")
    return list(json.loads(found)["items"])


def values(**more: str) -> list[str]:
    settings = {
        "imageRegistry": os.environ["ARRIERO_E2E_REGISTRY"],
        "imageTag": os.environ["ARRIERO_E2E_TAG"],
        # Four at once while they are replaced, on whatever node there is.
        "endpoints.resources.requests.cpu": "100m",
        **more,
    }
    arguments = [item for key, value in settings.items() for item in ("--set", f"{key}={value}")]
    if path := os.environ.get("ARRIERO_E2E_VALUES"):
        arguments += ["--values", path]
    return arguments


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds} s"
        time.sleep(1)
    return value


@contextlib.contextmanager
def reached() -> Iterator[Client]:
    """A client of the release, by a port-forward of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    left = threading.Event()
    keeper = threading.Thread(target=forward, args=(port, left))
    keeper.start()
    try:
        client = Client(f"127.0.0.1:{port}")

        def answers() -> bool:
            with contextlib.suppress(Exception):
                client.list_runs(1)
                return True
            return False

        until(answers, 180, "the orchestrator answers")
        yield client
        client.close()
    finally:
        left.set()
        keeper.join()


def forward(port: int, left: threading.Event) -> None:
    """Forward a local port; kubectl ends with the pod that it chose, and is started again."""
    command = ["kubectl", "-n", NAMESPACE, "port-forward"]
    command += [f"service/{RELEASE}-orchestrator", f"{port}:50051"]
    env = {**os.environ, "KUBECONFIG": KUBECONFIG}
    while not left.is_set():
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not left.wait(0.2):
            pass
        process.terminate()
        process.wait()
        left.wait(1)


def named() -> set[str]:
    """What there is in the namespace that could be the release's."""
    kinds = "deployments,jobs,pods,services,horizontalpodautoscalers,configmaps,secrets"
    found = json.loads(kubectl("get", kinds, "-o", "json"))["items"]
    names = {f"{item['kind']}/{item['metadata']['name']}" for item in found}
    return {name for name in names if RELEASE in name}


@pytest.fixture(scope="module")
def release() -> Iterator[set[str]]:
    """Installed once; removed at the end whatever happened. What was there before it."""
    before = named()
    arguments = ["--namespace", NAMESPACE, "--create-namespace", "--wait", "--timeout", "10m"]
    run("helm", "install", RELEASE, str(CHART), *arguments, *values())
    yield before
    run("helm", "uninstall", RELEASE, "--namespace", NAMESPACE, "--wait", check=False)
    run("kubectl", "delete", "namespace", NAMESPACE, "--ignore-not-found", check=False)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, write_rows: Callable[..., Path]) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 400)


def pipeline(directory: Path, steps: int, resources: str = "") -> Path:
    """A pipeline file; another number of steps is other work."""
    path = directory / "e2e.yaml"
    data: dict[str, Any] = {
        "name": "e2e",
        "stages": [
            {
                "name": "rows",
                "dataset": {
                    "sources": ["dataset/e2e:v1"],
                    "tokenizer": "model/e2e:v1",
                    "template": "alpaca",
                    "cutoff_len": 256,
                    "val_set_size": 4,
                },
            },
            {
                "name": "sft",
                "train": {
                    "model": "model/e2e:v1",
                    "dataset": "rows",
                    "lora": {"r": 4, "lora_dropout": 0.0, "target_modules": ["all-linear"]},
                    "max_steps": steps,
                    "batch_size": 4,
                    "learning_rate": 0.01,
                    "save_steps": 20,
                },
            },
            {"name": "tuned", "merge": {"model": "model/e2e:v1", "adapters": ["sft"]}},
            {"name": "quants", "quantize": {"model": "tuned", "types": ["Q8_0"]}},
            {"name": "live", "deploy": {"model": "quants", "endpoint": ENDPOINT}},
        ],
    }
    if resources:
        data["stages"][1]["resources"] = resources
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def stage(run: pb.Run, name: str) -> pb.StageStatus:
    return next(s for s in run.stages if s.name == name)


def test_helm_test_passes(release: set[str]) -> None:
    out = run("helm", "test", RELEASE, "--namespace", NAMESPACE, "--logs", "--timeout", "30m")
    assert "Succeeded" in out


def test_a_pipeline_survives_the_deaths_of_its_pods(
    release: set[str], rows: Path, tmp_path: Path
) -> None:
    with reached() as client:
        tiny = tiny_llama(tmp_path / "tiny")
        client.artifacts.push(tiny, kind="model", name="e2e", tag="model/e2e:v1")
        client.artifacts.push(rows, kind="dataset", name="e2e", tag="dataset/e2e:v1")
        run_id = client.create_run(pipeline(tmp_path, 400)).id

    def training() -> Any:
        with reached() as client:
            status = stage(client.get_run(run_id), "sft")
            return status.metadata.progress.HasField("checkpoint_time") and status

    until(training, 600, "the training saves a checkpoint")
    job = f"arriero.dev/run={run_id},arriero.dev/stage=sft"
    before = {pod["metadata"]["uid"] for pod in objects("pods", job)}
    kubectl("delete", "pod", "-l", "app.kubernetes.io/component=orchestrator", "--wait=false")
    kubectl("delete", "pod", "-l", job, "--wait=false")
    kubectl("delete", "pod", "-l", "app.kubernetes.io/component=training", "--wait=false")
    with reached() as client:
        ended = client.wait(run_id, timeout=1200)
    assert ended.state == pb.RUN_STATE_SUCCEEDED, ended.error
    sft = stage(ended, "sft").metadata
    assert sft.attempt == 2
    assert not before & {pod["metadata"]["uid"] for pod in objects("pods", job)}
    with reached() as client:
        lines = list(client.logs(run_id, stage="sft"))
    assert any("resume" in line.message or "goes on" in line.message for line in lines)


def test_an_upgrade_during_a_training_loses_nothing(release: set[str], tmp_path: Path) -> None:
    with reached() as client:
        run_id = client.create_run(pipeline(tmp_path, 401)).id
    job = f"arriero.dev/run={run_id},arriero.dev/stage=sft"
    until(lambda: [p for p in objects("pods", job) if p["status"]["phase"] == "Running"], 300, job)
    uids = {pod["metadata"]["uid"] for pod in objects("pods", job)}
    tag = os.environ.get("ARRIERO_E2E_UPGRADE_TAG", os.environ["ARRIERO_E2E_TAG"])
    more = values(imageTag=tag, drainSeconds="21")
    arguments = ["--namespace", NAMESPACE, "--wait", "--timeout", "10m"]
    run("helm", "upgrade", RELEASE, str(CHART), *arguments, *more)
    with reached() as client:
        ended = client.wait(run_id, timeout=1200)
    assert ended.state == pb.RUN_STATE_SUCCEEDED, ended.error
    assert stage(ended, "sft").metadata.attempt == 1
    assert uids == {pod["metadata"]["uid"] for pod in objects("pods", job)}


def test_scaling_and_updating_under_load_fail_no_request(release: set[str]) -> None:
    """By the gateway: one to three replicas, one killed, another model, and back to one."""
    body = {"model": ENDPOINT, "messages": [{"role": "user", "content": "Name llama 3"}]}
    script = (
        "import json, os, time, urllib.request\n"
        f"body = json.dumps({json.dumps(body)} | {{'max_tokens': 8}}).encode()\n"
        f"url = 'http://{RELEASE}-gateway:8000/v1/chat/completions'\n"
        "done, told, slowest = 0, time.time(), 0.0\n"
        "while not os.path.exists('/tmp/enough'):\n"
        "    headers = {'Content-Type': 'application/json'}\n"
        "    request = urllib.request.Request(url, body, headers)\n"
        "    began = time.time()\n"
        "    json.load(urllib.request.urlopen(request, timeout=60)); done += 1\n"
        "    slowest = max(slowest, time.time() - began)\n"
        "    if time.time() > told + 10:\n"  # or somebody between takes the connection for dead
        "        told = time.time(); print('answers', done, flush=True)\n"
        "print('all answers', done, 'slowest', round(slowest, 2))\n"
    )
    pod = objects("pods", "app.kubernetes.io/component=gateway")[0]["metadata"]["name"]
    said: list[str] = []

    def load() -> None:
        said.append(kubectl("exec", pod, "--", "python", "-c", script, check=False, timeout=1800))

    thread = threading.Thread(target=load)
    thread.start()
    try:
        with reached() as client:
            client.endpoints.scale(ENDPOINT, 3)
            until(lambda: settled(client, 3), 300, "three replicas")
            replicas = objects("pods", f"arriero.dev/endpoint={ENDPOINT}")
            killed = replicas[0]["metadata"]["name"]
            kubectl("delete", "pod", killed, "--wait=false")
            until(lambda: settled(client, 3, without=killed), 300, "another replica")
            served = client.endpoints.get(ENDPOINT).spec.model
            other = next(a for a in client.artifacts.list("gguf") if a.digest != served)
            client.endpoints.update(ENDPOINT, other.digest, replicas=3)
            until(lambda: settled(client, 3, model=other.digest), 600, "another model")
            client.endpoints.scale(ENDPOINT, 1)
            until(lambda: settled(client, 1), 300, "one replica")
    finally:
        kubectl("exec", pod, "--", "touch", "/tmp/enough")
        thread.join()
    assert said[0].splitlines()[-1].startswith("all answers"), said
    assert int(said[0].splitlines()[-1].split()[2]) > 0


def settled(client: Client, count: int, *, without: str = "", model: str = "") -> bool:
    found = client.endpoints.get(ENDPOINT)
    if any(r.name == without or model not in (r.digest, "") for r in found.replicas):
        return False
    return found.ready_replicas == found.desired_replicas == len(found.replicas) == count


def test_a_profile_that_nobody_has_is_refused(release: set[str], tmp_path: Path) -> None:
    with reached() as client, pytest.raises(InvalidArgument, match="no resource profile"):
        client.create_run(pipeline(tmp_path, 402, resources="no-such-profile"))


def test_nothing_is_left_behind(release: set[str]) -> None:
    # Helm 3 leaves it, which would read its log too late.
    kubectl("delete", "pod", f"{RELEASE}-test-pipeline", "--ignore-not-found")
    run("helm", "uninstall", RELEASE, "--namespace", NAMESPACE, "--wait", "--timeout", "10m")
    until(lambda: not named() - release, 300, "everything of the release is gone")
