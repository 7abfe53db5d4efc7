"""Endpoints on a cluster: a fake API server, and controllers that make pods as real ones do."""

import asyncio
import contextlib

import pytest
import yaml

from arriero.errors import DeadlineExceeded, FailedPrecondition
from arriero.kubernetes import Api
from arriero.orchestrator.cluster import KubernetesPlatform
from arriero.orchestrator.platform import Desired
from arriero.orchestrator.stamping import Stamp, Templates
from arriero.replica import AdapterSettings, ReplicaSettings
from arriero.testing.cluster import NAMESPACE, FakeCluster
from arriero.testing.controllers import DeploymentController, become_ready

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64
TEMPLATE = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"labels": {"app.kubernetes.io/name": "arriero"}},
    "spec": {
        "template": {
            "metadata": {"labels": {"app.kubernetes.io/name": "arriero"}},
            "spec": {
                "containers": [
                    {
                        "name": "main",
                        "image": "herd/llama:1",
                        "env": [{"name": "ARRIERO_STORE", "value": "file:///store"}],
                        "ports": [
                            {"name": "grpc", "containerPort": 50051},
                            {"name": "metrics", "containerPort": 9090},
                        ],
                    }
                ]
            },
        }
    },
}


@pytest.fixture
def cluster():
    with FakeCluster() as made:
        yield made


@pytest.fixture
async def platform_with(cluster, tmp_path):
    """Makes platforms with other `autoscaling.yaml`."""
    config = cluster.kubeconfig(tmp_path / "kubeconfig")
    made = []

    async def make(before=None, **scaling):
        directory = tmp_path / f"templates-{len(made)}"
        directory.mkdir()
        (directory / "endpoint.yaml").write_text(yaml.safe_dump(TEMPLATE))
        (directory / "autoscaling.yaml").write_text(yaml.safe_dump(scaling))
        api = Api.connect(NAMESPACE, {"KUBECONFIG": str(config)})
        platform = KubernetesPlatform(api, Stamp(Templates.read(directory), "herd"))
        for desired in before or ():
            platform.apply(desired)
        await platform.start()
        made.append(platform)
        return platform

    yield make
    for platform in made:
        await platform.close()


def desire(digest=ONE, replicas=2, generation=1, name="zh", **settings):
    return Desired(name, digest, replicas, generation, ReplicaSettings(**settings))


async def complete(platform, desired, timeout=300):
    def until(seen):
        return seen.generation >= desired.generation and seen.complete(
            desired.digest, desired.replicas
        )

    return await platform.wait(desired.name, until, timeout=timeout)


async def until(condition, what="it", seconds=300.0):
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        with contextlib.suppress(KeyError, ValueError, IndexError):
            if value := condition():
                return value
        assert asyncio.get_running_loop().time() < deadline, f"{what} did not happen"
        await asyncio.sleep(0.02)


async def test_an_endpoint_is_a_deployment_and_two_services(platform_with, cluster):
    DeploymentController(cluster)
    platform = await platform_with()
    desired = desire(context=2048)
    platform.apply(desired)
    seen = await complete(platform, desired)

    assert [r.address for r in seen.replicas] == ["10.0.0.1:50051", "10.0.0.2:50051"]
    assert seen.replicas[0].metrics == "10.0.0.1:9090"
    assert {r.digest for r in seen.replicas} == {ONE}
    deployment = cluster.get("deployments", "herd-endpoint-zh")
    spec = deployment["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    container = spec["template"]["spec"]["containers"][0]
    env = {e["name"]: e["value"] for e in container["env"]}
    assert env["ARRIERO_STORE"] == "file:///store"
    assert env["ARRIERO_MODEL"] == ONE
    assert env["ARRIERO_CONTEXT"] == "2048"
    services = {s["metadata"]["name"]: s["spec"] for s in cluster.all("services")}
    assert services["herd-endpoint-zh-replicas"]["clusterIP"] == "None"
    assert services["herd-endpoint-zh"]["ports"][0]["port"] == 50051
    assert services["herd-endpoint-zh"]["selector"] == spec["selector"]["matchLabels"]

    platform.remove("zh")
    await until(lambda: not any(cluster.all(k) for k in ("deployments", "services", "pods")))
    assert platform.observe("zh").replicas == ()


async def test_another_model_takes_over_without_a_gap(platform_with, cluster):
    controller = DeploymentController(cluster)
    platform = await platform_with()
    platform.apply(desire())
    await complete(platform, desire())
    platform.apply(desire(TWO, generation=2))
    await complete(platform, desire(TWO, generation=2))
    assert controller.fewest["herd-endpoint-zh"] >= 2
    assert {r.digest for r in platform.observe("zh").replicas} == {TWO}


async def test_the_same_model_with_other_settings_is_complete_when_all_are_new(
    platform_with, cluster
):
    gate = asyncio.Event()

    def make(pod):
        if gate.is_set():
            pod["status"] = {"phase": "Pending"}  # the new ones take their time
        else:
            become_ready(pod)

    DeploymentController(cluster, make)
    platform = await platform_with()
    platform.apply(desire())
    await complete(platform, desire())
    gate.set()
    again = desire(generation=2, context=512)
    platform.apply(again)
    await until(lambda: any(not r.current for r in platform.observe("zh").replicas))
    with pytest.raises(DeadlineExceeded):
        await complete(platform, again, timeout=0.5)
    assert len([r for r in platform.observe("zh").replicas if r.state == "READY"]) == 2


async def test_other_adapters_need_no_other_pods(platform_with, cluster):
    DeploymentController(cluster)
    platform = await platform_with()
    platform.apply(desire())
    await complete(platform, desire())
    before = cluster.get("deployments", "herd-endpoint-zh")["metadata"]["generation"]
    again = desire(generation=2, adapters=(AdapterSettings("poet", TWO),))
    platform.apply(again)
    await complete(platform, again)
    assert cluster.get("deployments", "herd-endpoint-zh")["metadata"]["generation"] == before


async def test_scaling_without_an_autoscaler_patches_the_scale_alone(platform_with, cluster):
    DeploymentController(cluster)
    platform = await platform_with()
    platform.apply(desire(replicas=1))
    await complete(platform, desire(replicas=1))
    cluster.asked.clear()
    for generation, count in ((2, 3), (3, 1), (4, 0)):
        platform.check("zh", count)
        wanted = desire(replicas=count, generation=generation)
        platform.apply(wanted)
        await complete(platform, wanted)
    changes = {a for a in cluster.asked if a[0] in ("patch", "update", "create")}
    assert changes == {("patch", "apps", "deployments/scale")}


async def test_with_an_hpa_the_minimum_moves_and_the_maximum_holds(platform_with, cluster):
    DeploymentController(cluster)
    platform = await platform_with(mode="hpa", min=1, max=4, target=3)
    platform.apply(desire(replicas=1))
    await complete(platform, desire(replicas=1))
    found = await until(lambda: cluster.get("horizontalpodautoscalers", "herd-endpoint-zh"))
    assert (found["spec"]["minReplicas"], found["spec"]["maxReplicas"]) == (1, 4)
    metric = found["spec"]["metrics"][0]["pods"]
    assert metric["metric"]["name"] == "arriero_num_requests_waiting"
    assert metric["target"] == {"type": "AverageValue", "averageValue": "3"}

    # The autoscaler made it three: that is complete, and nobody takes it back.
    with cluster.change("deployments", "herd-endpoint-zh") as item:
        item["spec"]["replicas"] = 3
    await until(lambda: len(platform.observe("zh").ready(ONE)) == 3)
    cluster.asked.clear()
    wanted = desire(replicas=2, generation=2)
    await until(lambda: platform._autoscaler("zh"))
    platform.check("zh", 2)
    platform.apply(wanted)
    seen = await complete(platform, wanted)
    assert seen.elastic
    assert cluster.get("horizontalpodautoscalers", "herd-endpoint-zh")["spec"]["minReplicas"] == 2
    assert cluster.get("deployments", "herd-endpoint-zh")["spec"]["replicas"] == 3
    assert ("patch", "apps", "deployments/scale") not in cluster.asked

    with pytest.raises(FailedPrecondition, match="up to 4 replicas; 5 were asked for"):
        platform.check("zh", 5)
    with pytest.raises(FailedPrecondition, match="never goes below 1"):
        platform.check("zh", 0)

    # A new model leaves the number alone, too.
    platform.apply(desire(TWO, replicas=2, generation=3))
    await complete(platform, desire(TWO, replicas=2, generation=3))
    assert cluster.get("deployments", "herd-endpoint-zh")["spec"]["replicas"] == 3


async def test_somebody_elses_autoscaler_is_not_fought(platform_with, cluster):
    DeploymentController(cluster)
    platform = await platform_with()
    platform.apply(desire(replicas=1))
    await complete(platform, desire(replicas=1))
    cluster.put(
        "horizontalpodautoscalers",
        {
            "metadata": {"name": "theirs"},
            "spec": {
                "scaleTargetRef": {"kind": "Deployment", "name": "herd-endpoint-zh"},
                "minReplicas": 1,
                "maxReplicas": 2,
            },
        },
    )
    await until(lambda: platform.observe("zh").elastic)
    with pytest.raises(FailedPrecondition, match="scaled by theirs, up to 2"):
        platform.check("zh", 3)
    platform.apply(desire(replicas=2, generation=2))
    await until(
        lambda: cluster.get("horizontalpodautoscalers", "theirs")["spec"]["minReplicas"] == 2
    )
    assert cluster.get("deployments", "herd-endpoint-zh")["spec"]["replicas"] == 1


async def test_keda_is_asked_by_its_own_object(platform_with, cluster):
    DeploymentController(cluster)
    platform = await platform_with(mode="keda", max=6, prometheusAddress="http://prometheus:9090")
    platform.apply(desire(replicas=1))
    made = await until(lambda: cluster.get("scaledobjects", "herd-endpoint-zh"))
    trigger = made["spec"]["triggers"][0]["metadata"]
    assert trigger["serverAddress"] == "http://prometheus:9090"
    assert 'model_name="zh"' in trigger["query"]
    # As KEDA does: an HPA that belongs to the ScaledObject.
    owner = {"kind": "ScaledObject", "name": "herd-endpoint-zh", "uid": made["metadata"]["uid"]}
    cluster.put(
        "horizontalpodautoscalers",
        {
            "metadata": {"name": "keda-hpa-zh", "ownerReferences": [owner]},
            "spec": {
                "scaleTargetRef": {"kind": "Deployment", "name": "herd-endpoint-zh"},
                "minReplicas": 1,
                "maxReplicas": 6,
            },
        },
    )
    await until(lambda: platform.observe("zh").elastic)
    platform.check("zh", 0)
    platform.apply(desire(replicas=3, generation=2))
    await until(
        lambda: cluster.get("scaledobjects", "herd-endpoint-zh")["spec"]["minReplicaCount"] == 3
    )
    assert cluster.get("horizontalpodautoscalers", "keda-hpa-zh")["spec"]["minReplicas"] == 1
    platform.remove("zh")
    await until(lambda: not cluster.all("scaledobjects"))


# What pods say


def broken(waiting=None, count=0, conditions=(), last=None):
    def make(pod):
        container = {"name": "main", "image": "herd/llama:1", "restartCount": count, "state": {}}
        if waiting:
            container["state"]["waiting"] = waiting
        if last:
            container["lastState"] = {"terminated": last}
        pod["status"] |= {"conditions": list(conditions), "containerStatuses": [container]}

    return make


async def failed(platform, name="zh"):
    return await until(
        lambda: [r for r in platform.observe(name).replicas if r.state == "FAILED"], "it fails"
    )


async def test_an_image_that_cannot_be_pulled_is_a_failed_replica(platform_with, cluster):
    DeploymentController(
        cluster, broken({"reason": "ImagePullBackOff", "message": "manifest unknown"})
    )
    platform = await platform_with()
    platform.apply(desire(replicas=1))
    (replica,) = await failed(platform)
    assert "herd/llama:1 cannot be pulled (ImagePullBackOff): manifest unknown" in replica.detail
    assert platform.observe("zh").failed(ONE) == [replica]


async def test_a_crash_loop_shows_the_end_of_its_log(platform_with, cluster):
    cluster.logs["herd-endpoint-zh-1/previous"] = "loading\nllama: bad magic\n"
    waiting = {"reason": "CrashLoopBackOff"}
    DeploymentController(cluster, broken(waiting, 4, last={"exitCode": 1}))
    platform = await platform_with()
    platform.apply(desire(replicas=1))
    await until(lambda: "bad magic" in platform.observe("zh").replicas[0].detail)
    (replica,) = await failed(platform)
    assert "it ended 4 times" in replica.detail
    assert "exit code 1" in replica.detail


async def test_a_model_that_cannot_be_delivered_shows_what_its_init_container_said(
    platform_with, cluster
):
    cluster.logs["herd-endpoint-zh-1/previous"] = "the wrong container\n"
    cluster.logs["herd-endpoint-zh-1/model/previous"] = "a.gguf has sha256 1, expected 2\n"

    def make(pod):
        broken({"reason": "CrashLoopBackOff"}, 4, last={"exitCode": 1})(pod)
        state = pod["status"].pop("containerStatuses")[0] | {"name": "model"}
        waiting = {"name": "main", "state": {"waiting": {"reason": "PodInitializing"}}}
        pod["status"] |= {"initContainerStatuses": [state], "containerStatuses": [waiting]}

    DeploymentController(cluster, make)
    platform = await platform_with()
    platform.apply(desire(replicas=1))
    await until(lambda: "expected 2" in platform.observe("zh").replicas[0].detail)
    (replica,) = await failed(platform)
    assert "its init container model ended 4 times" in replica.detail


async def test_what_failed_last_time_is_said_while_it_is_tried_again(platform_with, cluster):
    cluster.logs["herd-endpoint-zh-1/model/previous"] = "the bucket does not answer\n"

    def make(pod):
        broken({"reason": "CrashLoopBackOff"}, 1, last={"exitCode": 1})(pod)
        state = pod["status"].pop("containerStatuses")[0] | {"name": "model"}
        pod["status"]["initContainerStatuses"] = [state]

    DeploymentController(cluster, make)
    platform = await platform_with()
    platform.apply(desire(replicas=1))
    await until(lambda: "does not answer" in platform.observe("zh").replicas[0].detail)
    with cluster.change("pods", "herd-endpoint-zh-1") as pod:
        pod["status"]["initContainerStatuses"][0]["state"] = {"running": {}}
    await until(lambda: "fetched again" in platform.observe("zh").replicas[0].detail)
    (replica,) = platform.observe("zh").replicas
    assert (replica.state, "does not answer" in replica.detail) == ("STARTING", True)


@pytest.mark.parametrize(
    ("said", "final"),
    [
        ('Usage of EmptyDir volume "model" exceeds the limit "5000". ', True),
        ("The node was low on resource: ephemeral-storage. ", False),
    ],
)
async def test_a_pod_that_was_evicted_is_told_of_by_the_next(platform_with, cluster, said, final):
    DeploymentController(cluster, lambda _: None)
    platform = await platform_with()
    platform.apply(desire(replicas=1))
    await until(lambda: platform.observe("zh").replicas)
    (pod,) = cluster.all("pods")
    status = {"phase": "Failed", "reason": "Evicted", "message": said}
    for number in range(3):
        assert not platform.observe("zh").failed(ONE)
        metadata = pod["metadata"] | {"name": f"evicted-{number}"}
        cluster.put("pods", {"metadata": metadata, "spec": {}, "status": status})
        await until(lambda: said.strip(". ") in platform.observe("zh").replicas[0].detail)
    await until(lambda: bool(platform.observe("zh").failed(ONE)) == final)
    # Who is ready is not asked for the past.
    with cluster.change("pods", pod["metadata"]["name"]) as item:
        become_ready(item)
    await until(lambda: platform.observe("zh").replicas[0].state == "READY")


async def test_a_replica_whose_model_comes_says_so(platform_with, cluster):
    def make(pod):
        state = {"name": "model", "state": {"running": {}}}
        pod["status"]["initContainerStatuses"] = [state]

    DeploymentController(cluster, make)
    platform = await platform_with()
    platform.apply(desire(replicas=1))
    await until(lambda: platform.observe("zh").replicas)
    (replica,) = platform.observe("zh").replicas
    assert (replica.state, replica.detail) == ("STARTING", "its model is being fetched")


async def test_a_secret_that_is_missing_is_told_while_it_is_waited_for(platform_with, cluster):
    scheduled = {"type": "PodScheduled", "status": "True"}
    DeploymentController(cluster, broken({"reason": "ContainerCreating"}, conditions=[scheduled]))
    platform = await platform_with()
    said = 'MountVolume.SetUp failed for volume "tls": secret "arriero-tls" not found'
    cluster.event("Pod", "herd-endpoint-zh-1", "FailedMount", said)
    platform.apply(desire(replicas=1))
    await until(lambda: platform.observe("zh").replicas[0].detail == said)
    (replica,) = platform.observe("zh").replicas
    assert replica.state == "STARTING"
    assert platform.observe("zh").failed(ONE) == []


async def test_what_is_delivered_is_named_and_fits_its_volume(platform_with, cluster, monkeypatch):
    DeploymentController(cluster)
    spec = TEMPLATE["spec"]["template"]["spec"]
    monkeypatch.setitem(spec, "initContainers", [{"name": "model", "image": "herd/llama:1"}])
    volume = {"name": "model", "emptyDir": {"sizeLimit": "1Gi"}}
    monkeypatch.setitem(spec, "volumes", [volume])
    platform = await platform_with()
    assert platform.delivers
    for generation, adapters in ((1, ()), (2, (AdapterSettings("poet", TWO),))):
        desired = Desired(
            *("zh", ONE, 1, generation, ReplicaSettings(adapters=adapters)),
            artifacts=(ONE, *(item.adapter for item in adapters)),
            size=5000,
        )
        platform.apply(desired)
        await complete(platform, desired)
    # Replicas reach no other adapters than those that they were started with.
    (pod,) = cluster.all("pods")
    (first,) = pod["spec"]["initContainers"]
    assert {"name": "ARRIERO_ARTIFACTS", "value": f"{ONE} {TWO}"} in first["env"]
    assert pod["spec"]["volumes"][0]["emptyDir"]["sizeLimit"] == str((1 << 30) + 5000)


async def test_a_node_that_is_missing_is_shown_and_waited_for(platform_with, cluster):
    said = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    DeploymentController(cluster, broken(conditions=[condition | {"message": said}]))
    platform = await platform_with()
    platform.apply(desire(replicas=1))
    (replica,) = await failed(platform)
    assert said in replica.detail
    assert platform.observe("zh").failed(ONE) == []  # another node may come


async def test_a_quota_that_is_used_up_is_shown(platform_with, cluster):
    platform = await platform_with()
    platform.apply(desire(replicas=1))
    await until(lambda: cluster.get("deployments", "herd-endpoint-zh"))
    said = 'pods "x" is forbidden: exceeded quota: gpus, used: 4, limited: 4'
    with cluster.change("deployments", "herd-endpoint-zh") as item:
        condition = {"type": "ReplicaFailure", "status": "True", "message": said}
        item["status"] = {"conditions": [condition]}
    (replica,) = await failed(platform)
    assert replica.detail == said


async def test_what_the_role_forbids_is_shown_and_tried_again(platform_with, cluster):
    DeploymentController(cluster)
    cluster.fail("create", "deployments", 403, "Forbidden", 'cannot create resource "deployments"')
    platform = await platform_with()
    platform.apply(desire(replicas=1))
    (replica,) = await failed(platform)
    assert "the chart's Role has to allow it" in replica.detail
    await complete(platform, desire(replicas=1))


async def test_a_replica_that_leaves_is_draining(platform_with, cluster):
    DeploymentController(cluster)
    platform = await platform_with()
    platform.apply(desire(replicas=1))
    await complete(platform, desire(replicas=1))
    name = platform.observe("zh").replicas[0].name
    with cluster.change("pods", name) as item:
        item["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    await until(lambda: platform.observe("zh").replicas[0].state == "DRAINING")
    assert platform.observe("zh").ready(ONE) == []


# Faults


async def test_conflicts_with_others_are_lived_through(platform_with, cluster):
    DeploymentController(cluster)
    platform = await platform_with()
    platform.apply(desire())
    await complete(platform, desire())
    cluster.fail("update", "deployments", 409, "Conflict", "the object has been modified")
    platform.apply(desire(TWO, generation=2))
    await complete(platform, desire(TWO, generation=2))


async def test_what_somebody_deletes_is_made_again(platform_with, cluster):
    DeploymentController(cluster)
    platform = await platform_with()
    platform.apply(desire())
    await complete(platform, desire())
    cluster.remove("deployments", "herd-endpoint-zh")
    await until(lambda: len(cluster.all("pods")) == 2, "they are back")
    await complete(platform, desire())


async def test_watches_that_break_and_forget_are_lived_through(platform_with, cluster):
    DeploymentController(cluster)
    platform = await platform_with()
    platform.apply(desire())
    await complete(platform, desire())
    cluster.break_watches()
    cluster.forget()
    platform.apply(desire(TWO, generation=2))
    await complete(platform, desire(TWO, generation=2))


async def test_a_restart_keeps_what_is_wanted_and_removes_the_rest(platform_with, cluster):
    DeploymentController(cluster)
    first = await platform_with()
    for name in ("zh", "old"):
        first.apply(desire(name=name, replicas=1))
        await complete(first, desire(name=name, replicas=1))
    pods = [p["metadata"]["name"] for p in cluster.all("pods") if "zh" in p["metadata"]["name"]]
    await first.close()

    again = desire(replicas=1, generation=2)
    second = await platform_with(before=[again])
    await complete(second, again)
    await until(lambda: len(cluster.all("deployments")) == 1)
    assert [p["metadata"]["name"] for p in cluster.all("pods")] == pods


def test_what_is_wrong_in_a_template_is_named(tmp_path):
    with pytest.raises(FailedPrecondition, match=r"endpoint\.yaml cannot be read"):
        Templates.read(tmp_path)
    (tmp_path / "endpoint.yaml").write_text("kind: Pod")
    with pytest.raises(FailedPrecondition, match=r"endpoint\.yaml is no apps/v1 Deployment"):
        Templates.read(tmp_path)
    (tmp_path / "endpoint.yaml").write_text(yaml.safe_dump(TEMPLATE))
    (tmp_path / "autoscaling.yaml").write_text("mode: magic")
    with pytest.raises(FailedPrecondition, match="mode is 'magic'; expected none, hpa or keda"):
        Templates.read(tmp_path)
