"""All rooms' work as Jobs of a cluster that is a fake, whose pods are real processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import arriero
from arriero.testing.cluster import NAMESPACE, FakeCluster
from arriero.testing.controllers import JobController

ROOT = str(Path(next(iter(arriero.__path__))).parent)


@pytest.fixture(scope="module")
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster() as made:
        yield made


@pytest.fixture(scope="module")
def kubelet(
    cluster: FakeCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[JobController]:
    base = tmp_path_factory.getbasetemp()
    environment = {
        "PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]),
        "ARRIERO_ALLOWED_PATHS": f"{base}:{base.parent}",
        "OMP_NUM_THREADS": "1",
    }
    made = JobController(cluster, environment)
    yield made
    made.close()


@pytest.fixture(scope="module")
def platform(
    cluster: FakeCluster, kubelet: JobController, platform_at: Any, tmp_path_factory: Any
) -> Iterator[Any]:
    directory = tmp_path_factory.mktemp("jobs")
    pod = {"containers": [{"name": "main", "image": "herd/worker:1"}]}
    job = {"kind": "Job", "metadata": {}, "spec": {"template": {"spec": pod}}}
    (directory / "job.yaml").write_text(yaml.safe_dump(job))
    (directory / "profiles.yaml").write_text(yaml.safe_dump({"default": {}, "two": {"nodes": 2}}))
    with platform_at(
        ARRIERO_RUNNER="kubernetes",
        ARRIERO_RUNNER_DIR=str(directory),
        ARRIERO_NAMESPACE=NAMESPACE,
        ARRIERO_ADVERTISE="127.0.0.1",
        KUBECONFIG=str(cluster.kubeconfig(directory / "kubeconfig")),
    ) as made:
        yield made


def jobs_of(cluster: FakeCluster, stage: str) -> list[dict[str, Any]]:
    key = "arriero.dev/stage"
    return [j for j in cluster.all("jobs") if j["metadata"]["labels"].get(key) == stage]


def test_a_pipeline_goes_the_whole_way_with_its_training_on_two_nodes(
    platform: Any, cluster: FakeCluster, tiny_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_pipeline(tmp_path)
    data = yaml.safe_load(path.read_text())
    (sft,) = (stage for stage in data["stages"] if stage["name"] == "sft")
    sft["resources"] = "two"
    path.write_text(yaml.safe_dump(data, sort_keys=False))

    done = platform.json("run", str(path))

    assert done["state"] == "RUN_STATE_SUCCEEDED"
    (training,) = jobs_of(cluster, "sft")
    assert training["spec"]["completions"] == 2
    assert {
        p["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"]
        for p in (cluster.all("pods"))
        if p["metadata"]["labels"].get("arriero.dev/stage") == "sft"
    } == {"0", "1"}
    for stage in ("base", "rows", "tuned", "quants", "best"):
        assert len(jobs_of(cluster, stage)) == 1
    logs = platform.cli("runs", "logs", done["id"], "--stage", "sft").stdout
    assert "training" in logs


def test_a_training_outlives_its_service(
    platform: Any,
    cluster: FakeCluster,
    tiny_pipeline: Callable[..., Path],
    tmp_path: Path,
    wait_until: Callable[..., Any],
) -> None:
    path = tiny_pipeline(tmp_path, name="long", tuned=None, quants=None, best=None, live=None)
    data = yaml.safe_load(path.read_text())
    data["stages"][-1]["train"] |= {"max_steps": 300, "save_steps": 10}
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    run = platform.json("run", str(path), "--detach")["id"]

    def stage() -> Any:
        stages = platform.json("runs", "get", run)["stages"]
        return next(s for s in stages if s["name"] == "sft")

    def step() -> Any:
        return stage().get("metadata", {}).get("progress", {}).get("training_step")

    wait_until(step, what="steps")
    platform.service("training").kill()

    wait_until(lambda: stage()["state"] == "STAGE_STATE_SUCCEEDED", 300, what="its end")
    assert stage()["metadata"]["attempt"] == 1
    assert len([j for j in jobs_of(cluster, "sft") if run in str(j)]) == 1


def test_an_unknown_profile_refuses_the_run(
    platform: Any, tiny_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_pipeline(tmp_path)
    done = platform.cli("run", str(path), "--set", "stages.sft.resources=tow", check=False)
    assert done.returncode == 2
    assert "did you mean two?" in done.stdout + done.stderr
