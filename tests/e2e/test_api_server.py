"""Arriero's Kubernetes code against a real API server, controllers and scheduler.

    ARRIERO_KUBE_BIN=<directory of etcd, kube-apiserver, ...> make kube-api

There are no containers: `arriero.testing.node` reports pods as a kubelet does. What an
old API server lacks is skipped. The behaviours of Jobs are in
tests/unit/operations/test_cluster_jobs.py, which runs against the same server.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from arriero import errors
from arriero.kubernetes import Api, Informer
from arriero.kubernetes import api as resources
from arriero.kubernetes.api import AUTOSCALERS, CONFIG_MAPS, DEPLOYMENTS, JOBS, PODS, SERVICES
from arriero.operations.cluster import KubernetesJobs
from arriero.operations.profiles import Profile
from arriero.operations.profiles import Templates as JobTemplates
from arriero.operations.runner import Exit, Launch
from arriero.orchestrator import cluster as orchestrator_cluster
from arriero.orchestrator import stamping
from arriero.orchestrator.cluster import KubernetesPlatform
from arriero.orchestrator.platform import Desired, Observed
from arriero.replica import ReplicaSettings
from arriero.testing.control_plane import MISSING, VARIABLE, ControlPlane
from arriero.testing.node import Node
from arriero.testing.real_cluster import RealCluster

pytestmark = [
    pytest.mark.skipif(not os.environ.get(VARIABLE), reason=MISSING),
    pytest.mark.timeout(180),
]

Object = dict[str, Any]
ROOT = Path(__file__).parents[2]
ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64
CONTAINER = {
    "name": "main",
    "image": "herd/llama:1",
    "ports": [{"name": "grpc", "containerPort": 50051}, {"name": "metrics", "containerPort": 9090}],
}
_addresses = itertools.count(1)


@pytest.fixture
def cluster(control_plane: ControlPlane) -> Iterator[RealCluster]:
    with RealCluster(control_plane) as made:
        yield made


@pytest.fixture
def node(cluster: RealCluster) -> Iterator[Node]:
    """Pods that are ready at once, and do nothing."""

    def start(pod: Object, env: object) -> tuple[None, str]:
        count = next(_addresses)
        return None, f"10.9.{count // 250}.{count % 250 + 1}"

    made = Node(cluster.plane, {}, start=start)
    yield made
    made.close()


@pytest.fixture
def api(cluster: RealCluster, tmp_path: Path) -> Api:
    return connect(cluster, tmp_path)


def connect(cluster: RealCluster, tmp_path: Path, token: str = "") -> Api:
    config = cluster.kubeconfig(tmp_path / f"kubeconfig-{next(_addresses)}", token=token)
    return Api.connect(cluster.namespace, {"KUBECONFIG": str(config)})


@pytest.fixture
def autoscalers(cluster: RealCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The beta of `autoscaling/v2`, which has the same fields, where there is no other."""
    if cluster.version >= (1, 23):
        return
    beta = resources.Resource("apis/autoscaling/v2beta2", AUTOSCALERS.plural)
    monkeypatch.setattr(orchestrator_cluster, "AUTOSCALERS", beta)
    made = stamping.Stamp.autoscaler

    def stamped(self: stamping.Stamp, desired: Desired) -> Object | None:
        body = made(self, desired)
        return body and body | {"apiVersion": "autoscaling/v2beta2"}

    monkeypatch.setattr(stamping.Stamp, "autoscaler", stamped)


async def until(condition: Callable[[], Any], what: str = "it", seconds: float = 40.0) -> Any:
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        with contextlib.suppress(KeyError, ValueError, IndexError):
            if value := await asyncio.to_thread(condition):
                return value
        assert asyncio.get_running_loop().time() < deadline, f"{what} did not happen"
        await asyncio.sleep(0.05)


def service(name: str, **labels: str) -> Object:
    return {"metadata": {"name": name, "labels": labels}, "spec": {"ports": [{"port": 1}]}}


def config_map(name: str, **labels: str) -> Object:
    return {"metadata": {"name": name, "labels": labels}, "data": {"key": "value"}}


# The API


def test_objects_conflicts_and_refusals_are_what_we_take_them_for(
    api: Api, cluster: RealCluster, tmp_path: Path
) -> None:
    made = api.create(SERVICES, service("a", herd="x"))
    with pytest.raises(errors.AlreadyExists, match='services "a" already exists'):
        api.create(SERVICES, service("a"))
    with pytest.raises(errors.NotFound, match='services "b" not found'):
        api.get(SERVICES, "b")
    with pytest.raises(errors.InvalidArgument, match=r"metadata\.labels"):
        api.create(SERVICES, service("c", herd="not a label!"))
    api.patch(SERVICES, "a", {"metadata": {"labels": {"herd": "y"}}})
    with pytest.raises(errors.Aborted, match="has been modified"):
        api.replace(SERVICES, made)
    api.ensure(SERVICES, service("a", herd="z"), orchestrator_cluster._keep_address)
    items, _ = api.list(SERVICES, labels="herd=z")
    assert [item["spec"]["clusterIP"] for item in items] == [made["spec"]["clusterIP"]]
    with pytest.raises(errors.FailedPrecondition) as caught:
        connect(cluster, tmp_path, token="another").get(SERVICES, "a")
    assert caught.value.reason == "CLUSTER_TOKEN"
    with pytest.raises(errors.NotFound, match=r"serves no scaledobjects of keda\.sh"):
        api.list(resources.SCALED_OBJECTS)
    with pytest.raises(errors.ArrieroError) as nothing:
        api.log("nobody")
    assert isinstance(nothing.value, errors.NotFound)
    assert api.delete(SERVICES, "a")
    assert not api.delete(SERVICES, "a")


def test_a_quota_that_is_used_up_is_told_apart_from_a_role(api: Api, cluster: RealCluster) -> None:
    quota = {"metadata": {"name": "jobs"}, "spec": {"hard": {"count/jobs.batch": "0"}}}
    cluster.put("resourcequotas", quota)
    job = {"metadata": {"name": "a"}, "spec": {"template": {"spec": pod_spec()}}}

    def refused() -> bool:
        with contextlib.suppress(errors.ResourceExhausted):
            api.create(JOBS, job)
            api.delete(JOBS, "a")
            return False
        return True

    asyncio.run(until(refused, "the quota is in force"))
    with pytest.raises(errors.ResourceExhausted, match=r"limited: count/jobs\.batch=0") as caught:
        api.create(JOBS, job)
    assert caught.value.reason == "QUOTA_EXCEEDED"


def pod_spec() -> Object:
    return {"restartPolicy": "Never", "containers": [CONTAINER]}


def test_a_watch_of_a_version_that_is_forgotten_is_410(api: Api, cluster: RealCluster) -> None:
    _, version = api.list(CONFIG_MAPS)
    for number in range(3):
        api.create(CONFIG_MAPS, config_map(f"map-{number}"))
    followed = list(itertools.islice(api.watch(CONFIG_MAPS, version), 3))
    assert [kind for kind, _ in followed] == ["ADDED"] * 3
    cluster.plane.compact()
    cluster.plane.kill()
    cluster.plane.start()
    with pytest.raises(errors.OutOfRange, match="too old resource version"):
        list(api.watch(CONFIG_MAPS, version))


async def test_an_informer_lives_through_the_death_of_the_api_server(
    api: Api, cluster: RealCluster
) -> None:
    informer = Informer(api, CONFIG_MAPS, "herd=x")
    informer.start()
    assert await asyncio.to_thread(informer.synced, 20)

    def names() -> list[str]:
        return [item["metadata"]["name"] for item in informer.all()]

    api.create(CONFIG_MAPS, config_map("before", herd="x"))
    await until(lambda: names() == ["before"])
    for turn in ("once", "twice"):
        await asyncio.to_thread(cluster.plane.kill)
        with pytest.raises(errors.Unavailable, match="cannot be reached"):
            api.get(CONFIG_MAPS, "before")
        await asyncio.to_thread(cluster.plane.start)
        # While the informer waits to ask again the world changes, and is forgotten.
        api.delete(CONFIG_MAPS, "before")
        api.create(CONFIG_MAPS, config_map(turn, herd="x"))
        api.create(CONFIG_MAPS, config_map("before", herd="x"))
        cluster.plane.compact()
        await until(lambda t=turn: {t, "before"} <= set(names()), "it is followed again")
    api.delete(CONFIG_MAPS, "once")
    await until(lambda: names() == ["before", "twice"])
    informer.stop()


# Jobs


def templates(**profiles: Profile) -> JobTemplates:
    job = {"kind": "Job", "spec": {"template": {"spec": {"containers": [CONTAINER]}}}}
    return JobTemplates(job, {"default": Profile("default"), **profiles})


class Told:
    """A launch, and what its user was told."""

    def __init__(self, tmp_path: Path, profile: str = "", nodes: int = 0) -> None:
        self.words: list[str] = []
        self.launch = Launch(
            *("m", tmp_path / "a.json", f"0a{next(_addresses):02x}", tmp_path / "log"),
            profile=profile,
            nodes=nodes,
            tell=lambda error: self.words.append(error.message if error else ""),
        )

    def heard(self, *words: str) -> bool:
        return any(all(word in said for word in words) for said in self.words)


@contextlib.asynccontextmanager
async def running(place: KubernetesJobs, told: Told) -> Any:
    handle = await place.start(told.launch)
    task = asyncio.create_task(handle.wait())
    yield handle, task
    await handle.kill()
    left = await asyncio.wait_for(task, 60)
    assert left == Exit(None)
    await place.close()


async def test_a_gpu_that_no_node_has_is_told_in_the_schedulers_words(
    api: Api, cluster: RealCluster, node: Node, tmp_path: Path
) -> None:
    gpu = Profile("gpu", resources={"limits": {"nvidia.com/gpu": 4}})
    place = KubernetesJobs(api, templates(gpu=gpu), room="training", start_seconds=0.1)
    told = Told(tmp_path, "gpu")
    async with running(place, told):
        await until(lambda: told.heard("no node takes it", "Insufficient nvidia.com/gpu"))
    assert cluster.all("jobs") == cluster.all("pods") == []


async def test_pods_that_a_quota_refuses_are_told_in_the_controllers_words(
    api: Api, cluster: RealCluster, node: Node, tmp_path: Path
) -> None:
    cluster.put("resourcequotas", {"metadata": {"name": "q"}, "spec": {"hard": {"pods": "0"}}})
    await until(lambda: cluster.get("resourcequotas", "q").get("status", {}).get("hard"))
    place = KubernetesJobs(api, templates(), room="training", start_seconds=0.1)
    told = Told(tmp_path)
    async with running(place, told):
        await until(lambda: told.heard("the namespace's quota is used up", "limited: pods=0"))


async def test_a_priority_that_nobody_defined_is_told_and_given_up(
    api: Api, cluster: RealCluster, node: Node, tmp_path: Path
) -> None:
    high = Profile("high", priority_class_name="high")
    place = KubernetesJobs(api, templates(high=high), room="training", start_seconds=1.0)
    told = Told(tmp_path, "high")
    handle = await place.start(told.launch)
    left = await asyncio.wait_for(handle.wait(), 60)
    assert left.problem is not None
    assert "no PriorityClass with name high was found" in left.problem.message
    assert cluster.all("jobs") == []
    await place.close()


async def test_the_death_of_the_api_server_is_not_the_jobs(
    api: Api, cluster: RealCluster, node: Node, tmp_path: Path
) -> None:
    place = KubernetesJobs(api, templates(), room="training")
    told = Told(tmp_path)
    async with running(place, told) as (_, task):
        await until(lambda: cluster.all("pods")[0]["status"]["phase"] == "Running")
        (before,) = cluster.all("pods")
        await asyncio.to_thread(cluster.plane.kill)
        await asyncio.sleep(2)
        assert not task.done()
        await asyncio.to_thread(cluster.plane.start)
        await asyncio.sleep(2)
        assert not task.done()
        (after,) = cluster.all("pods")
        assert after["metadata"]["uid"] == before["metadata"]["uid"]


async def test_a_job_on_two_nodes_has_a_service_that_goes_with_it(
    api: Api, cluster: RealCluster, node: Node, tmp_path: Path
) -> None:
    two = Profile("two", nodes=2)
    place = KubernetesJobs(api, templates(two=two), room="training")
    told = Told(tmp_path, "two", nodes=2)
    async with running(place, told):
        (made,) = await until(lambda: cluster.all("services"))
        assert made["spec"]["clusterIP"] == "None"
        await until(lambda: len(cluster.all("pods")) == 2)
    await until(lambda: not cluster.all("services"), "its Service is collected")


# Endpoints


@contextlib.asynccontextmanager
async def platform_of(api: Api, owner: Object | None = None, **scaling: Any) -> Any:
    body = {"kind": "Deployment", "spec": {"template": {"spec": {"containers": [CONTAINER]}}}}
    read = stamping.Templates(body, scaling=stamping.Scaling(**scaling))
    platform = KubernetesPlatform(api, stamping.Stamp(read, "herd", owner))
    await platform.start()
    try:
        yield platform
    finally:
        await platform.close()


def desire(digest: str = ONE, replicas: int = 2, generation: int = 1, **settings: Any) -> Desired:
    return Desired("zh", digest, replicas, generation, ReplicaSettings(**settings))


async def complete(platform: KubernetesPlatform, desired: Desired) -> Observed:
    platform.apply(desired)

    def until(seen: Observed) -> bool:
        caught_up = seen.generation >= desired.generation
        return caught_up and seen.complete(desired.digest, desired.replicas)

    return await platform.wait(desired.name, until, timeout=60)


@pytest.mark.usefixtures("autoscalers")
async def test_an_endpoint_is_rolled_scaled_and_removed(
    api: Api, cluster: RealCluster, node: Node
) -> None:
    async with platform_of(api) as platform:
        seen = await complete(platform, desire())
        assert all(r.address.startswith("10.9.") for r in seen.replicas)
        subsets = await until(
            lambda: cluster.get("endpoints", "herd-endpoint-zh-replicas")["subsets"]
        )
        told = {f"{a['ip']}:50051" for a in subsets[0]["addresses"]}
        assert told == {r.address for r in seen.replicas}

        fewest, watching = [2], True

        async def watch() -> None:
            while watching:
                fewest.append(
                    len([r for r in platform.observe("zh").replicas if r.state == "READY"])
                )
                await asyncio.sleep(0.02)

        task = asyncio.create_task(watch())
        rolled = await complete(platform, desire(TWO, generation=2))
        watching = False
        await task
        assert min(fewest) >= 2
        assert {r.digest for r in rolled.ready(TWO)} == {TWO}
        for generation, count in ((3, 3), (4, 1), (5, 0)):
            await complete(platform, desire(TWO, count, generation))
        # Somebody deletes it: it is made again.
        await complete(platform, desire(TWO, 1, 6))
        uid = cluster.get("deployments", "herd-endpoint-zh")["metadata"]["uid"]
        cluster.remove("deployments", "herd-endpoint-zh")
        await until(
            lambda: cluster.get("deployments", "herd-endpoint-zh")["metadata"]["uid"] != uid
        )
        await complete(platform, desire(TWO, 1, 6))
        platform.remove("zh")
        kinds = ("deployments", "services", "pods", "replicasets")
        await until(lambda: not any(cluster.all(kind) for kind in kinds))
        await until(lambda: platform.observe("zh").replicas == ())


@pytest.mark.usefixtures("autoscalers")
async def test_an_autoscalers_minimum_moves_and_its_number_stays(
    api: Api, cluster: RealCluster, node: Node
) -> None:
    async with platform_of(api, mode="hpa", max=4) as platform:
        await complete(platform, desire(replicas=1))
        (made, _) = api.list(orchestrator_cluster.AUTOSCALERS)
        assert (made[0]["spec"]["minReplicas"], made[0]["spec"]["maxReplicas"]) == (1, 4)
        await until(lambda: platform.observe("zh").elastic)
        # The real HPA controller itself raises the number to its minimum.
        seen = await complete(platform, desire(replicas=2, generation=2))
        assert seen.elastic
        await until(lambda: len(platform.observe("zh").ready(ONE)) == 2, seconds=60)
        platform.remove("zh")
        await until(lambda: not api.list(orchestrator_cluster.AUTOSCALERS)[0])


@pytest.mark.usefixtures("autoscalers")
async def test_what_keeps_replicas_from_starting_is_told(
    api: Api, cluster: RealCluster, node: Node
) -> None:
    cluster.put("resourcequotas", {"metadata": {"name": "q"}, "spec": {"hard": {"pods": "1"}}})
    await until(lambda: cluster.get("resourcequotas", "q").get("status", {}).get("hard"))
    async with platform_of(api) as platform:
        platform.apply(desire())
        (failed,) = await until(
            lambda: [r for r in platform.observe("zh").replicas if r.state == "FAILED"]
        )
        assert (
            "exceeded quota: q, requested: pods=1, used: pods=1, limited: pods=1" in failed.detail
        )
        # The quota is raised: nobody has to ask again.
        api.patch(QUOTAS, "q", {"spec": {"hard": {"pods": "9"}}})
        await complete(platform, desire())


QUOTAS = resources.Resource("api/v1", "resourcequotas")


@pytest.mark.usefixtures("autoscalers")
async def test_an_image_that_a_kubelet_cannot_pull_is_a_failed_replica(
    api: Api, cluster: RealCluster
) -> None:
    async with platform_of(api) as platform:
        platform.apply(desire(replicas=1))
        (pod,) = await until(lambda: cluster.all("pods"))
        said = 'Back-off pulling image "herd/llama:1"'
        waiting = {"waiting": {"reason": "ImagePullBackOff", "message": said}}
        container = {
            "name": "main",
            "image": "herd/llama:1",
            "imageID": "",
            "ready": False,
            "restartCount": 0,
            "state": waiting,
        }
        cluster.state("pods", pod["metadata"]["name"], {"containerStatuses": [container]})
        await until(lambda: platform.observe("zh").failed(ONE))
        (failed,) = platform.observe("zh").failed(ONE)
        assert said in failed.detail


@pytest.mark.usefixtures("autoscalers")
async def test_what_is_made_goes_with_its_owner(
    api: Api, cluster: RealCluster, node: Node, tmp_path: Path
) -> None:
    api.create(CONFIG_MAPS, config_map("release"))
    owner = api.owner("release")
    place = KubernetesJobs(api, templates(), room="training", owner=owner)
    told = Told(tmp_path)
    handle = await place.start(told.launch)
    task = asyncio.create_task(handle.wait())
    async with platform_of(api, owner) as platform:
        await complete(platform, desire(replicas=1))
        await until(lambda: len(cluster.all("pods")) == 2)
    api.delete(CONFIG_MAPS, "release")  # as `helm uninstall` does
    kinds = ("jobs", "deployments", "services", "pods")
    await until(lambda: not any(cluster.all(kind) for kind in kinds), "all is collected")
    left = await asyncio.wait_for(task, 60)
    assert left.evicted
    await place.close()


# Access


def chart(*kinds: str) -> list[Object]:
    """Objects of the chart's default rendering."""
    text = (ROOT / "deploy/helm/snapshot.yaml").read_text()
    return [item for item in yaml.safe_load_all(text) if item and item["kind"] in kinds]


def install_access(cluster: RealCluster) -> None:
    kinds = {
        "ServiceAccount": "serviceaccounts",
        "Role": "roles",
        "RoleBinding": "rolebindings",
        "ConfigMap": "configmaps",
    }
    for item in chart(*kinds):
        item["metadata"]["namespace"] = cluster.namespace
        for subject in item.get("subjects") or ():
            subject["namespace"] = cluster.namespace
        cluster.put(kinds[item["kind"]], item)


@pytest.mark.usefixtures("autoscalers")
async def test_the_charts_roles_are_enough_and_no_more(
    cluster: RealCluster, node: Node, tmp_path: Path
) -> None:
    install_access(cluster)
    clients = {}
    for room in ("dataset", "training", "merging", "quantization"):
        token = cluster.plane.token(cluster.namespace, f"arriero-{room}")
        clients[room] = api = connect(cluster, tmp_path, token)
        owner = api.owner(f"arriero-jobs-{room}")
        place = KubernetesJobs(api, templates(two=Profile("two", nodes=2)), room=room, owner=owner)
        told = Told(tmp_path, "two", nodes=2)
        async with running(place, told) as (handle, _):
            await until(lambda: len(cluster.all("pods")) == 2)
            assert await place.adopt(told.launch, None, 0) is not None
            await handle.suspend()
            await handle.resume()
            await asyncio.to_thread(api.list, resources.EVENTS)
            pod = cluster.all("pods")[0]["metadata"]["name"]
            await until(lambda api=api, pod=pod: api.log(pod) == "")
        assert not any("forbidden" in said for said in told.words)
        await until(lambda: not cluster.all("pods"))

    token = cluster.plane.token(cluster.namespace, "arriero-orchestrator")
    orchestrator = connect(cluster, tmp_path, token)
    mine = orchestrator.owner("arriero-platform")
    for mode in ("none", "hpa"):
        async with platform_of(orchestrator, mine, mode=mode) as platform:
            await complete(platform, desire())
            await complete(platform, desire(TWO, 2, 2))
            await complete(platform, desire(TWO, 3, 3))
            platform.remove("zh")
            await until(lambda: not cluster.all("deployments") and not cluster.all("services"))

    for called, client in (*clients.items(), ("orchestrator", orchestrator)):
        said = f"arriero-{called}.*cannot"
        for plural in ("secrets", "serviceaccounts", "persistentvolumeclaims", "nodes"):
            with pytest.raises(errors.PermissionDenied, match=said):
                client.list(resources.Resource("api/v1", plural))
        with pytest.raises(errors.PermissionDenied, match=said):
            client.create(PODS, {"metadata": {"name": "own"}, "spec": pod_spec()})
        with pytest.raises(errors.PermissionDenied, match=said):
            client.patch(PODS, "any", {}, subresource="exec")
        with pytest.raises(errors.PermissionDenied, match=said):
            Api(client._client, "kube-system").list(PODS)
    with pytest.raises(errors.PermissionDenied, match="cannot create"):
        orchestrator.create(JOBS, {"metadata": {"name": "own"}})
    with pytest.raises(errors.PermissionDenied, match="cannot create"):
        api.create(DEPLOYMENTS, {"metadata": {"name": "own"}})


def test_every_object_of_the_chart_that_this_server_knows_is_taken(cluster: RealCluster) -> None:
    plurals = {
        "ServiceAccount": "serviceaccounts",
        "Deployment": "deployments",
        "Service": "services",
        "ConfigMap": "configmaps",
        "Role": "roles",
        "RoleBinding": "rolebindings",
        "NetworkPolicy": "networkpolicies",
        "PersistentVolumeClaim": "persistentvolumeclaims",
        "Pod": "pods",
    }
    if cluster.version >= (1, 21):
        plurals |= {"CronJob": "cronjobs", "PodDisruptionBudget": "poddisruptionbudgets"}
    found = sorted(chart(*plurals), key=lambda item: list(plurals).index(item["kind"]))
    for item in found:
        item["metadata"]["namespace"] = cluster.namespace
        for subject in item.get("subjects") or ():
            subject["namespace"] = cluster.namespace
        if cluster.version < (1, 30) and item["kind"] == "Deployment":
            of_old(item["spec"]["template"]["spec"])
        version = item["apiVersion"]
        base = f"/apis/{version}" if "/" in version else "/api/v1"
        path = f"{base}/namespaces/{cluster.namespace}/{plurals[item['kind']]}"
        made = cluster.plane.ask("POST", path, item)
        assert dropped(item, made) == []


def of_old(pod: Object) -> None:
    """Put what an old API server has in the place of what it does not know."""
    for constraint in pod.get("topologySpreadConstraints") or ():
        constraint.pop("matchLabelKeys", None)
    for container in pod["containers"]:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "grpc" in container.get(probe, {}):
                del container[probe]["grpc"]
                container[probe]["tcpSocket"] = {"port": 50052}
        if "sleep" in container.get("lifecycle", {}).get("preStop", {}):
            container["lifecycle"]["preStop"] = {"exec": {"command": ["sleep", "5"]}}


def dropped(sent: Any, kept: Any, path: str = "") -> list[str]:
    """Paths of what was sent and is not kept: a server drops fields that it does not know."""
    if isinstance(sent, dict) and isinstance(kept, dict):
        return [p for key in sent for p in dropped(sent[key], kept.get(key), f"{path}.{key}")]
    if isinstance(sent, list) and isinstance(kept, list) and len(sent) == len(kept):
        pairs = enumerate(zip(sent, kept, strict=True))
        return [p for n, (a, b) in pairs for p in dropped(a, b, f"{path}[{n}]")]
    missing = kept is None and sent not in (None, {}, [], "", False, 0)
    return [f"{path}: {sent!r}"] if missing else []
