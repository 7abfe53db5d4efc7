"""An engine whose jobs are Jobs of a cluster: an API server, and real processes for pods.

The server is a fake, or a real one where `ARRIERO_KUBE_BIN` names its programs."""

import asyncio
import contextlib
import json
import os
import signal
import threading

import pytest
import yaml
from toyroom_support import asked, metadata_of, order, python_path, result_of, trace_of

from arriero import errors
from arriero.kubernetes import Api
from arriero.operations.cluster import KubernetesJobs
from arriero.operations.endings import reason_of
from arriero.operations.profiles import Templates
from arriero.operations.service import JobServicer
from arriero.rpc import Server
from arriero.settings import ServerSettings
from arriero.testing.controllers import JobController
from arriero.testing.node import Node
from arriero.v1 import job_pb2_grpc, types_pb2

FAILED = types_pb2.OPERATION_STATE_FAILED
CANCELLED = types_pb2.OPERATION_STATE_CANCELLED
TEMPLATE = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"labels": {"app.kubernetes.io/name": "arriero"}},
    "spec": {
        "template": {
            "metadata": {"labels": {"app.kubernetes.io/name": "arriero"}},
            "spec": {"containers": [{"name": "main", "image": "herd/worker:1"}]},
        }
    },
}
PROFILES = {
    "default": {"resources": {"limits": {"memory": "1Gi"}}},
    "gpu-4": {
        "resources": {"limits": {"nvidia.com/gpu": 4}},
        "gpusPerNode": 4,
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "priorityClassName": "high",
    },
    "two-nodes": {"nodes": 2, "gpusPerNode": 8},
    "kueue": {"queue": "herd-queue"},
}


@pytest.fixture
def kubelet(cluster):
    """Ask for it before `serve`: an engine that leaves waits for pods, which it ends."""
    environment = {"PYTHONPATH": python_path()}
    plane = cluster.plane
    made = JobController(cluster, environment) if plane is None else Node(plane, environment)
    yield made
    made.close()


@pytest.fixture
def templates(tmp_path):
    directory = tmp_path / "jobs"
    directory.mkdir()
    (directory / "job.yaml").write_text(yaml.safe_dump(TEMPLATE))
    (directory / "profiles.yaml").write_text(yaml.safe_dump(PROFILES))
    return Templates.read(directory)


@pytest.fixture
async def serve(cluster, templates, tmp_path, make_engine):
    """Makes engines that run Jobs and can be reported to."""
    config = cluster.kubeconfig(tmp_path / "kubeconfig")
    cluster.put("configmaps", {"metadata": {"name": "templates"}})
    servers = []

    async def make(**settings):
        api = Api.connect(cluster.namespace, {"KUBECONFIG": str(config)})
        runner = KubernetesJobs(
            api,
            settings.pop("templates", templates),
            room="merging",
            owner=api.owner("templates"),
            start_seconds=settings.pop("start_seconds", 300.0),
        )
        engine = make_engine(runner=runner, **settings)
        server = Server(ServerSettings(), name="merging")
        add = job_pb2_grpc.add_JobServiceServicer_to_server
        server.add(JobServicer(engine), add, "arriero.v1.JobService")
        servers.append(server)
        await engine.recover(await server.start())
        return engine

    yield make
    for server in servers:
        await server.stop(0)


async def until(condition, what="it", seconds=300.0):
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        with contextlib.suppress(KeyError, ValueError, IndexError):
            if value := condition():
                return value
        assert asyncio.get_running_loop().time() < deadline, f"{what} did not happen"
        await asyncio.sleep(0.02)


def the_job(cluster):
    (job,) = cluster.all("jobs")
    return job


async def log_of(engine, name):
    return (await engine.log_path(name)).read_text()


def waits_for(engine, name):
    return metadata_of(engine.get(name)).waits_for.message


async def test_a_stage_runs_as_a_job_and_its_words_come_home(
    kubelet, serve, cluster, store, tmp_path
):
    engine = await serve()
    go = tmp_path / "go"
    spec = order(steps=3, hold=2, go=str(go))
    started = await engine.start("import", spec, asked("a", owner="Ann B."))
    await until(lambda: metadata_of(engine.get(started.name)).progress.phase == "toying")
    go.touch()
    done = await engine.wait(started.name, 300)

    assert store.get(result_of(done).outputs[0].digest).manifest.name == "toy"
    job = the_job(cluster)
    assert job["metadata"]["labels"]["arriero.dev/run"] == "run-1"
    assert job["metadata"]["labels"]["arriero.dev/owner"] == "Ann-B"
    assert job["metadata"]["ownerReferences"][0]["name"] == "templates"
    spec = job["spec"]
    assert (spec["backoffLimit"], spec["completions"]) == (0, 1)
    if cluster.version >= (1, 24):
        assert spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["automountServiceAccountToken"] is False
    assert pod["containers"][0]["resources"] == {"limits": {"memory": "1Gi"}}
    assert not metadata_of(done).HasField("waits_for")
    cluster.remove("jobs", job["metadata"]["name"])  # and its pods
    written = await log_of(engine, started.name)
    assert "a raw line" in written
    assert "starts at step 0" in written
    assert written.count("a raw line") == 1


async def test_the_service_may_restart_and_adopts_what_runs(kubelet, serve, cluster, tmp_path):
    trace = tmp_path / "trace"
    engine = await serve()
    go = tmp_path / "go"
    spec = order(steps=40, hold=20, go=str(go), trace=str(trace))
    started = await engine.start("import", spec, asked("a"))
    await until(lambda: trace_of(trace), "the job runs")
    await engine.close()
    before = len(trace_of(trace))

    again = await serve()
    go.touch()
    done = await again.wait(started.name, 300)

    assert result_of(done).outputs
    assert len({pid for pid, _, _ in trace_of(trace)}) == 1
    assert len(trace_of(trace)) == 40 > before
    assert metadata_of(done).attempt == 1
    assert len(cluster.all("jobs")) == 1


async def test_a_job_keeps_the_image_that_it_started_with(
    kubelet, serve, cluster, templates, tmp_path
):
    trace = tmp_path / "trace"
    engine = await serve()
    long = order(steps=20, seconds=0.1, trace=str(trace))
    started = await engine.start("import", long, asked("a"))
    await until(lambda: trace_of(trace), "the job runs")
    await engine.close()

    newer = json.loads(json.dumps(TEMPLATE).replace("herd/worker:1", "herd/worker:2"))
    upgraded = await serve(templates=Templates(newer, templates.profiles))
    assert result_of(await upgraded.wait(started.name, 300)).outputs
    after = await upgraded.start("import", order(steps=1), asked("b"))
    assert result_of(await upgraded.wait(after.name, 300)).outputs

    images = [
        job["spec"]["template"]["spec"]["containers"][0]["image"] for job in cluster.all("jobs")
    ]
    assert sorted(images) == ["herd/worker:1", "herd/worker:2"]
    assert len({pid for pid, _, _ in trace_of(trace)}) == 1


async def test_a_job_that_ended_while_the_service_was_away_is_published(kubelet, serve, cluster):
    engine = await serve()
    started = await engine.start("import", order(steps=8, seconds=0.1), asked("a"))
    await until(lambda: cluster.all("pods"), "the pod is there")
    await engine.close()
    await until(lambda: the_job(cluster).get("status", {}).get("conditions"), "the Job ended")
    cluster.remove("jobs", the_job(cluster)["metadata"]["name"])  # as its time to live does

    again = await serve()
    assert result_of(await again.wait(started.name, 300)).outputs
    assert cluster.all("jobs") == []


async def test_a_lost_pod_costs_what_was_not_saved(kubelet, serve, cluster, tmp_path):
    trace = tmp_path / "trace"
    engine = await serve()
    go = tmp_path / "go"
    spec = order(steps=20, hold=10, go=str(go), save=True, trace=str(trace))
    started = await engine.start("import", spec, asked("a"))
    await until(lambda: len(trace_of(trace)) >= 3, "some steps are done")
    kubelet.kill(cluster.all("pods")[0]["metadata"]["name"])
    go.touch()

    done = await engine.wait(started.name, 300)

    steps = [step for _, _, step in trace_of(trace)]
    assert sorted(set(steps)) == list(range(1, 21))
    assert len(steps) <= 22  # at most the step that was under way is done twice
    assert metadata_of(done).attempt == 2
    assert len({job["metadata"]["name"] for job in cluster.all("jobs")}) == 2


async def test_a_kill_for_want_of_memory_is_named(kubelet, serve, cluster, tmp_path):
    trace = tmp_path / "trace"
    engine = await serve()
    started = await engine.start(
        "import", order(steps=10_000, seconds=0.1, trace=str(trace)), asked("a")
    )
    await until(lambda: trace_of(trace), "the job runs")
    kubelet.kill(cluster.all("pods")[0]["metadata"]["name"], reason="OOMKilled")
    await until(lambda: metadata_of(engine.get(started.name)).attempt == 2, "it runs again")
    first = metadata_of(engine.get(started.name)).jobs[0]
    assert "out-of-memory killer" in first.status.message
    await engine.cancel(started.name)
    await engine.wait(started.name, 300)


async def test_a_job_that_is_cancelled_while_it_is_made_is_deleted(
    kubelet, serve, cluster, monkeypatch
):
    engine = await serve()
    create, delete, deleted, made = Api.create, Api.delete, threading.Event(), []

    def create_late(api, resource, body):
        deleted.wait(120)
        made.append(create(api, resource, body))
        return made[-1]

    def delete_first(api, resource, name, **options):
        found = delete(api, resource, name, **options)
        deleted.set()
        return found

    monkeypatch.setattr(Api, "create", create_late)
    monkeypatch.setattr(Api, "delete", delete_first)
    started = await engine.start("import", order(steps=10_000, seconds=0.1), asked("a"))
    await until(lambda: metadata_of(engine.get(started.name)).jobs, "it begins")
    await engine.cancel(started.name)
    await engine.wait(started.name, 300)

    assert len(made) == 1
    assert cluster.all("jobs") == cluster.all("pods") == []


@pytest.mark.fake("evicts a pod without its controller")
async def test_evictions_use_up_no_attempt(kubelet, serve, cluster, tmp_path):
    trace = tmp_path / "trace"
    engine = await serve()
    go = tmp_path / "go"
    spec = order(steps=12, hold=1, go=str(go), save=True, trace=str(trace))
    started = await engine.start("import", spec, asked("a"))
    for number in range(1, 5):  # one more than there are attempts
        await until(lambda n=number: any(a == n for _, a, _ in trace_of(trace)), "it runs")
        (pod,) = [p for p in cluster.all("pods") if p["status"]["phase"] == "Running"]
        kubelet.evict(pod["metadata"]["name"])
        process = kubelet.processes[pod["metadata"]["name"]]
        await until(lambda p=process: p.poll() is not None, "it leaves")
    go.touch()
    done = await engine.wait(started.name, 300)
    assert result_of(done).outputs
    (record,) = engine._executions.values()
    assert [job.counted for job in record.record.jobs] == [False] * 4 + [True]
    assert "DeletionByTaintManager" in record.record.jobs[0].status["message"]


async def test_cancelling_deletes_the_job_and_ends_its_processes(kubelet, serve, cluster, tmp_path):
    trace = tmp_path / "trace"
    engine = await serve()
    started = await engine.start(
        "import", order(steps=10_000, seconds=0.1, trace=str(trace)), asked("a")
    )
    await until(lambda: trace_of(trace), "the job runs")
    await engine.cancel(started.name)
    done = await engine.wait(started.name, 300)
    assert metadata_of(done).state == CANCELLED
    assert cluster.all("jobs") == []
    assert all(process.poll() is not None for process in kubelet.processes.values())


needs_suspend = pytest.mark.kubernetes(1, 24)  # suspends Jobs


@needs_suspend
async def test_a_pause_suspends_the_job_and_a_resume_goes_on(kubelet, serve, cluster, tmp_path):
    trace = tmp_path / "trace"
    engine = await serve(max_jobs=1)
    go = tmp_path / "go"
    spec = order(steps=20, hold=10, go=str(go), save=True, trace=str(trace))
    started = await engine.start("import", spec, asked("a"))
    await until(lambda: len(trace_of(trace)) >= 3, "some steps are done")
    await engine.pause(started.name, paused=True)
    await until(lambda: not cluster.all("pods"), "its pod is gone")
    assert the_job(cluster)["spec"]["suspend"] is True
    assert metadata_of(engine.get(started.name)).paused
    held = len(trace_of(trace))
    go.touch()
    # The place is free meanwhile.
    other = await engine.start("import", order(steps=1, text="other"), asked("b"))
    assert result_of(await engine.wait(other.name, 300)).outputs
    assert len(trace_of(trace)) == held

    await engine.pause(started.name, paused=False)
    done = await engine.wait(started.name, 300)

    steps = [step for _, _, step in trace_of(trace)]
    assert steps == list(range(1, 21))  # it saved before it left
    assert metadata_of(done).attempt == 1
    assert not metadata_of(done).paused


@needs_suspend
async def test_a_paused_job_stays_held_over_a_restart(kubelet, serve, cluster, tmp_path):
    trace = tmp_path / "trace"
    engine = await serve()
    go = tmp_path / "go"
    spec = order(steps=10, hold=5, go=str(go), save=True, trace=str(trace))
    started = await engine.start("import", spec, asked("a"))
    await until(lambda: trace_of(trace), "the job runs")
    await engine.pause(started.name, paused=True)
    await until(lambda: not cluster.all("pods"), "its pod is gone")
    await engine.close()
    go.touch()
    again = await serve()
    await asyncio.sleep(0.5)
    assert cluster.all("pods") == []
    await again.pause(started.name, paused=False)
    assert result_of(await again.wait(started.name, 300)).outputs
    assert len(trace_of(trace)) == 10


# What a cluster refuses


def pending(cluster, job, **status):
    """A pod of a Job that does not start, as the Job controller and the kubelet leave it."""
    template = job["spec"]["template"]
    cluster.put(
        "pods",
        {
            "metadata": {
                "name": f"{job['metadata']['name']}-0-abcde",
                "labels": template["metadata"]["labels"],
                "ownerReferences": [{"uid": job["metadata"]["uid"]}],
            },
            "spec": template["spec"],
            "status": {"phase": "Pending", **status},
        },
    )


@pytest.mark.fake("leaves a pod as a kubelet would")
async def test_an_image_that_cannot_be_pulled_is_shown_and_then_given_up(serve, cluster):
    engine = await serve(start_seconds=1.0)
    started = await engine.start("import", order(), asked("a"))
    job = await until(lambda: the_job(cluster))
    waiting = {"reason": "ImagePullBackOff", "message": "manifest unknown"}
    container = {"name": "main", "image": "herd/worker:1", "state": {"waiting": waiting}}
    pending(cluster, job, containerStatuses=[container])
    done = await engine.wait(started.name, 300)
    assert "herd/worker:1 cannot be pulled" in await log_of(engine, started.name)
    assert metadata_of(done).state == FAILED
    assert "could not start for 1 s" in done.error.message
    assert "manifest unknown" in done.error.message
    assert "check the name" in done.error.message
    assert cluster.all("jobs") == []
    assert cluster.all("pods") == []


@pytest.mark.fake("leaves a pod as a scheduler would")
async def test_a_gpu_that_nobody_has_is_shown_and_waited_for(serve, cluster):
    engine = await serve(start_seconds=0.1)
    started = await engine.start("import", order(), asked("a", resources="gpu-4"))
    job = await until(lambda: the_job(cluster))
    pod = job["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["priorityClassName"] == "high"
    said = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
    pending(cluster, job, conditions=[condition | {"message": said}])
    await until(lambda: said in waits_for(engine, started.name), "it is shown")
    await asyncio.sleep(1.5)
    assert not engine.get(started.name).done
    assert said in await log_of(engine, started.name)
    await engine.cancel(started.name)
    await engine.wait(started.name, 300)
    assert cluster.all("pods") == []


@pytest.mark.fake("answers one request with an error")
async def test_a_quota_is_shown_and_waited_for(kubelet, serve, cluster):
    said = 'jobs.batch "a" is forbidden: exceeded quota: jobs, requested: 1, used: 9, limited: 9'
    cluster.fail("create", "jobs", 403, "Forbidden", said)
    engine = await serve()
    started = await engine.start("import", order(steps=1), asked("a"))
    assert result_of(await engine.wait(started.name, 300)).outputs
    assert "used: 9, limited: 9" in await log_of(engine, started.name)
    assert metadata_of(engine.get(started.name)).attempt == 1


@pytest.mark.fake("makes an event")
async def test_pods_that_the_quota_refuses_are_shown(serve, cluster):
    engine = await serve()
    started = await engine.start("import", order(), asked("a"))
    job = await until(lambda: the_job(cluster))
    said = 'Error creating: pods "a-0" is forbidden: exceeded quota: gpus, used: 4, limited: 4'
    cluster.event("Job", job["metadata"]["name"], "FailedCreate", said)
    await until(lambda: "the namespace's quota is used up" in waits_for(engine, started.name))
    await engine.cancel(started.name)
    await engine.wait(started.name, 300)


@pytest.mark.fake("answers one request with an error")
async def test_what_the_role_forbids_fails_at_once_and_says_so(serve, cluster):
    cluster.fail("create", "jobs", 403, "Forbidden", 'User "x" cannot create resource "jobs"')
    engine = await serve()
    started = await engine.start("import", order(), asked("a"))
    done = await engine.wait(started.name, 300)
    assert 'cannot create resource "jobs"' in done.error.message
    assert "the chart's Role" in done.error.message


async def test_an_unknown_profile_is_refused_before_anything_starts(serve, cluster):
    engine = await serve(gpus=4)
    for validate_only in (True, False):
        context = asked("a", resources="gpu-5", validate_only=validate_only)
        with pytest.raises(errors.InvalidArgument, match="did you mean gpu-4") as caught:
            await engine.start("import", order(), context)
        assert "default, gpu-4, kueue, two-nodes" in caught.value.message
    with pytest.raises(errors.InvalidArgument, match="has 2 nodes, and this work uses one"):
        await engine.start("import", order(), asked("b", resources="two-nodes"))
    assert cluster.all("jobs") == []


# Faults of the API


@pytest.mark.fake("answers one request with an error")
async def test_an_api_that_comes_and_goes_is_lived_through(kubelet, serve, cluster, tmp_path):
    trace = tmp_path / "trace"
    engine = await serve()
    cluster.fail("create", "jobs", 409, "AlreadyExists", "an answer that got lost")
    started = await engine.start(
        "import", order(steps=15, seconds=0.1, trace=str(trace)), asked("a")
    )
    # Nothing was made: what is there is asked for, and made at the second try.
    await until(lambda: the_job(cluster))
    await until(lambda: trace_of(trace), "the job runs")
    cluster.forget()
    cluster.break_watches()
    assert result_of(await engine.wait(started.name, 300)).outputs
    assert len(trace_of(trace)) == 15


async def test_a_job_that_somebody_deletes_is_made_again(kubelet, serve, cluster, tmp_path):
    trace = tmp_path / "trace"
    engine = await serve()
    go = tmp_path / "go"
    spec = order(steps=15, hold=8, go=str(go), save=True, trace=str(trace))
    started = await engine.start("import", spec, asked("a"))
    await until(lambda: trace_of(trace), "the job runs")
    (process,) = kubelet.processes.values()
    cluster.remove("jobs", the_job(cluster)["metadata"]["name"])
    await until(lambda: process.poll() is not None, "it leaves")
    go.touch()
    done = await engine.wait(started.name, 300)
    assert result_of(done).outputs
    assert metadata_of(done).attempt == 2
    assert [step for _, _, step in trace_of(trace)] == list(range(1, 16))


async def test_a_crash_leaves_its_last_words(kubelet, serve, cluster):
    engine = await serve()
    started = await engine.start("import", order(steps=2, kill_at=2, kill_attempt=1), asked("a"))
    await engine.wait(started.name, 300)
    (record,) = engine._executions.values()
    first = record.record.jobs[0]
    assert reason_of(first.status) in ("JOB_KILLED", "OUT_OF_MEMORY")
    assert "a raw line" in first.status["message"]


@pytest.mark.fake("has a queue without Kueue")
async def test_kueue_holds_a_job_and_lets_it_go(kubelet, serve, cluster):
    engine = await serve()
    started = await engine.start("import", order(steps=1), asked("a", resources="kueue"))
    job = await until(lambda: the_job(cluster))
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "herd-queue"
    await until(lambda: "the queue 'herd-queue'" in waits_for(engine, started.name))
    with cluster.change("jobs", job["metadata"]["name"]) as item:
        item["spec"]["suspend"] = False
    assert result_of(await engine.wait(started.name, 300)).outputs


async def test_sigterm_to_the_pod_reaches_the_job(kubelet, serve, cluster, tmp_path):
    trace = tmp_path / "trace"
    engine = await serve()
    go = tmp_path / "go"
    spec = order(steps=15, hold=8, go=str(go), save=True, trace=str(trace))
    started = await engine.start("import", spec, asked("a"))
    await until(lambda: len(trace_of(trace)) > 2, "the job runs")
    (process,) = kubelet.processes.values()
    os.kill(process.pid, signal.SIGTERM)  # as `kubectl delete pod` and drains do
    await until(lambda: process.poll() is not None, "it leaves")
    go.touch()
    done = await engine.wait(started.name, 300)
    assert [step for _, _, step in trace_of(trace)] == list(range(1, 16))
    assert metadata_of(done).attempt == 2
    (record,) = engine._executions.values()
    assert not record.record.jobs[0].counted


async def test_what_was_cancelled_while_the_service_died_is_ended_by_the_next(
    kubelet, serve, cluster, store, tmp_path
):
    trace = tmp_path / "trace"
    engine = await serve()
    spec = order(steps=10_000, seconds=0.1, trace=str(trace))
    started = await engine.start("import", spec, asked("a"))
    await until(lambda: trace_of(trace), "the job runs")
    await engine.close()
    (path,) = store.record_dir("merging").glob("executions/*/execution.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cancelled": True}))

    again = await serve()
    done = await again.wait(started.name, 300)
    assert metadata_of(done).state == CANCELLED
    assert cluster.all("jobs") == []
    assert all(process.poll() is not None for process in kubelet.processes.values())


@pytest.mark.fake("answers one request with an error")
async def test_an_api_that_is_away_when_the_service_comes_back_is_waited_for(
    kubelet, serve, cluster, tmp_path
):
    trace = tmp_path / "trace"
    engine = await serve()
    started = await engine.start(
        "import", order(steps=20, seconds=0.1, trace=str(trace)), asked("a")
    )
    await until(lambda: trace_of(trace), "the job runs")
    await engine.close()
    for _ in range(3):
        cluster.fail("get", "jobs", 503, "ServiceUnavailable", "etcd is away")
    again = await serve()
    assert result_of(await again.wait(started.name, 300)).outputs
    assert len({pid for pid, _, _ in trace_of(trace)}) == 1
