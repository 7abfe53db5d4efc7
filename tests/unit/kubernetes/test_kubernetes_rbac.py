"""The chart's Roles and templates against the code that uses them, by its default rendering."""

import asyncio
import contextlib
from pathlib import Path

import pytest
import yaml

from arriero.kubernetes import Api
from arriero.operations.cluster import KubernetesJobs
from arriero.operations.profiles import Profile, Templates, stamp
from arriero.operations.runner import Launch
from arriero.orchestrator import stamping
from arriero.orchestrator.cluster import KubernetesPlatform
from arriero.orchestrator.platform import Desired
from arriero.testing.cluster import NAMESPACE
from arriero.testing.controllers import DeploymentController

SNAPSHOT = Path(__file__).parents[3] / "deploy/helm/snapshot.yaml"
CONTAINER = {"containers": [{"name": "main", "image": "i", "ports": []}]}
# Rendered only where endpoints are scaled by KEDA.
KEDA = {
    (verb, "keda.sh", "scaledobjects") for verb in ("create", "get", "update", "patch", "delete")
}


def rendered(kind, name):
    """An object of the chart's default rendering."""
    for item in yaml.safe_load_all(SNAPSHOT.read_text()):
        if item and item["kind"] == kind and item["metadata"]["name"] == name:
            return item
    raise AssertionError(f"no {kind} {name}")


def granted(component):
    """(verb, group, resource) that the Role of a component grants."""
    return {
        (verb, group, resource)
        for rule in rendered("Role", f"arriero-{component}")["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def written(config_map, directory):
    """A ConfigMap as the kubelet mounts it."""
    for key, text in rendered("ConfigMap", config_map)["data"].items():
        (directory / key).write_text(text)
    return directory


@pytest.mark.parametrize("room", ["dataset", "training", "merging", "quantization"])
def test_a_rooms_templates_are_what_the_runner_reads(room, tmp_path):
    templates = Templates.read(written(f"arriero-jobs-{room}", tmp_path))
    launch = Launch("m", tmp_path / "a.json", "0a1b", tmp_path / "log")
    job = stamp(templates, launch, room=room, owner=None, image="")
    pod = job["spec"]["template"]["spec"]
    (main,) = pod["containers"]
    assert main["image"]
    assert "memory" in main["resources"]["limits"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["terminationGracePeriodSeconds"] >= 10
    assert "command" not in main  # the image's tini stays the first process


def test_the_endpoints_template_is_what_the_platform_reads(tmp_path):
    templates = stamping.Templates.read(written("arriero-platform", tmp_path))
    stamp = stamping.Stamp(templates, "arriero")
    made = stamp.deployment(Desired("zh", "sha256:" + "1" * 64, 2, 1))
    names = [e["name"] for e in made["spec"]["template"]["spec"]["containers"][0]["env"]]
    assert len(set(names)) == len(names)
    assert {"ARRIERO_MODEL", "ARRIERO_STORE"} <= set(names)
    assert made["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    labels = made["spec"]["template"]["metadata"]["labels"]
    assert made["spec"]["selector"]["matchLabels"].items() <= labels.items()


@pytest.fixture
def api(cluster, tmp_path):
    config = cluster.kubeconfig(tmp_path / "kubeconfig")
    return Api.connect(NAMESPACE, {"KUBECONFIG": str(config)})


async def until(condition, seconds=300.0):
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        with contextlib.suppress(KeyError, IndexError):
            if value := condition():
                return value
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)


async def test_a_room_asks_for_what_it_is_granted(cluster, api, tmp_path):
    cluster.put("configmaps", {"metadata": {"name": "jobs"}})
    job = {"kind": "Job", "spec": {"template": {"spec": CONTAINER}}}
    templates = Templates(job, {"default": Profile("default", nodes=2)})
    place = KubernetesJobs(api, templates, room="training", owner=api.owner("jobs"))
    launch = Launch("m", tmp_path / "a.json", "0a1b", tmp_path / "log", nodes=2)
    handle = await place.start(launch)
    waiting = asyncio.create_task(handle.wait())
    made = await until(lambda: cluster.all("jobs")[0])
    adopted = await place.adopt(launch, None, 0)
    assert adopted is not None
    await adopted.suspend()
    await adopted.resume()
    await until(lambda: ("list", "", "events") in cluster.asked)
    labels = made["spec"]["template"]["metadata"]["labels"]
    ended = {"terminated": {"exitCode": 3}}
    cluster.logs["p"] = "last words\n"
    cluster.put(
        "pods",
        {
            "metadata": {"name": "p", "labels": labels},
            "status": {
                "phase": "Failed",
                "containerStatuses": [{"name": "main", "state": ended}],
            },
        },
    )
    with cluster.change("jobs", made["metadata"]["name"]) as item:
        item["status"] = {"conditions": [{"type": "Failed", "status": "True"}]}
    left = await waiting
    assert (left.code, left.lines) == (3, ["last words"])
    await adopted.kill()
    await place.close()
    assert cluster.asked == granted("training")


async def test_the_orchestrator_asks_for_what_it_is_granted(cluster, api):
    cluster.put("configmaps", {"metadata": {"name": "platform"}})
    cluster.logs["herd-endpoint-zh-1/previous"] = "bad magic\n"

    def crashing(pod):
        if pod["metadata"]["name"].endswith("-2"):  # a Secret is missing, say
            pod["status"]["conditions"] = [{"type": "PodScheduled", "status": "True"}]
            return
        state = {"name": "main", "restartCount": 4, "state": {"waiting": {}}}
        state["state"]["waiting"]["reason"] = "CrashLoopBackOff"
        pod["status"]["containerStatuses"] = [state]

    DeploymentController(cluster, crashing)
    template = {"kind": "Deployment", "spec": {"template": {"spec": CONTAINER}}}
    asked = set()
    for mode in ("none", "hpa", "keda"):
        scaling = stamping.Scaling(mode=mode)
        templates = stamping.Templates(template, scaling=scaling)
        names = stamping.Stamp(templates, "herd", api.owner("platform"))
        platform = KubernetesPlatform(api, names)
        await platform.start()
        name = f"zh-{mode}" if mode != "none" else "zh"
        digest = "sha256:" + "1" * 64
        platform.apply(Desired(name, digest, 1, 1))
        await until(lambda n=name, p=platform: n in p._applied)
        platform.apply(Desired(name, "sha256:" + "2" * 64, 1, 2))
        await until(lambda n=name, p=platform: p._applied[n] == 2)
        if mode == "none":
            await until(lambda: ("get", "", "pods/log") in cluster.asked)
            await until(lambda: ("list", "", "events") in cluster.asked)
        if mode == "hpa":
            await until(lambda n=name, p=platform: p._autoscaler(n))
        if mode == "keda":
            owner = {"kind": "ScaledObject", "name": names.name(name)}
            target = {"kind": "Deployment", "name": names.name(name)}
            cluster.put(
                "horizontalpodautoscalers",
                {
                    "metadata": {"name": "keda", "ownerReferences": [owner]},
                    "spec": {"scaleTargetRef": target, "maxReplicas": 4},
                },
            )
            await until(lambda n=name, p=platform: p._autoscaler(n))
        platform.apply(Desired(name, "sha256:" + "2" * 64, 2, 3))
        await until(lambda n=name, p=platform: p._applied[n] == 3)
        platform.remove(name)
        await until(lambda n=name, p=platform: n not in p._applied)
        await platform.close()
        asked |= cluster.asked
    # What is only asked where two are at it at once: an object that appeared meanwhile.
    races = {("update", "", "services"), ("update", "autoscaling", "horizontalpodautoscalers")}
    assert asked - granted("orchestrator") <= KEDA
    assert granted("orchestrator") - asked <= races
