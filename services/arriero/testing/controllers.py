"""What a cluster's controllers do, for a `FakeCluster`.

Responsibility: Jobs become pods and real processes of this machine; Deployments
become pods that are ready at once, or that a `Kubelet` runs, replaced one after the
other. Does not know what runs.
"""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from arriero.rpc.ports import free_port
from arriero.testing.cluster import FakeCluster, Object
from arriero.testing.containers import kill
from arriero.testing.kubelet import Kubelet, Processes, Start, environment

_INDEX = "batch.kubernetes.io/job-completion-index"


class JobController:
    """Runs the pods of Jobs as processes.

    Args:
        cluster: whose Jobs.
        extra: more of every process's environment, under what the Job says.
        start: starts a container otherwise.
    """

    def __init__(
        self,
        cluster: FakeCluster,
        extra: Mapping[str, str],
        start: Start | None = None,
    ) -> None:
        self._cluster = cluster
        self._extra = dict(extra)
        self._start = start or self._process
        self._lock = threading.RLock()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        # Where the pods of each Job meet: they share this machine's ports.
        self._ports: dict[str, str] = {}
        cluster.listen(self._on_change)

    def close(self) -> None:
        """Kill what still runs."""
        for process in self.processes.values():
            kill(process)

    def evict(self, pod: str, reason: str = "DeletionByTaintManager") -> None:
        """Take a pod away as a drain does, without time to save."""
        with self._cluster.change("pods", pod) as item:
            condition = {"type": "DisruptionTarget", "status": "True", "reason": reason}
            item["status"].setdefault("conditions", []).append(condition)
        kill(self.processes[pod])

    def kill(self, pod: str, *, reason: str = "Error") -> None:
        """SIGKILL a pod's process; `OOMKilled` as the kubelet says it."""
        with self._cluster.change("pods", pod) as item:
            item["status"]["endReason"] = reason
        kill(self.processes[pod])

    def _on_change(self, kind: str, plural: str, item: Object) -> None:
        if plural != "jobs":
            return
        with self._lock:
            name = item["metadata"]["name"]
            if kind == "DELETED":
                self._stop(name)
                return
            try:
                job = self._cluster.get("jobs", name)
            except KeyError:
                return
            if _condition(job, "Complete") or _condition(job, "Failed"):
                return
            if job["spec"].get("suspend") or job["metadata"].get("deletionTimestamp"):
                self._stop(name)
            elif not self._pods(name):
                for index in range(job["spec"]["completions"]):
                    self._run(job, index)

    def _pods(self, job: str) -> list[Object]:
        return [
            pod
            for pod in self._cluster.all("pods")
            if pod["metadata"]["labels"].get("batch.kubernetes.io/job-name") == job
        ]

    def _stop(self, job: str) -> None:
        """SIGTERM to all; each pod goes when its process did."""
        for pod in self._pods(job):
            name = pod["metadata"]["name"]
            with self._cluster.change("pods", name) as item:
                item["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            process = self.processes.get(name)
            if process is None or process.poll() is not None:
                self._cluster.remove("pods", name)
            else:
                process.terminate()

    def _run(self, job: Object, index: int) -> None:
        template = copy.deepcopy(job["spec"]["template"])
        name = f"{job['metadata']['name']}-{index}-{secrets.token_hex(3)[:5]}"
        labels = template["metadata"]["labels"] | {
            "batch.kubernetes.io/job-name": job["metadata"]["name"],
            _INDEX: str(index),
        }
        pod = {
            "metadata": {
                "name": name,
                "labels": labels,
                "annotations": {_INDEX: str(index)},
                "ownerReferences": [{"uid": job["metadata"]["uid"]}],
            },
            "spec": template["spec"],
            "status": {"phase": "Running", "podIP": "127.0.0.1"},
        }
        self._cluster.put("pods", pod)
        container = template["spec"]["containers"][0]
        env = {"JOB_COMPLETION_INDEX": str(index), **environment(self._cluster, pod, container)}
        process, _ = self._start(pod, container["name"], env)
        self.processes[name] = process
        threading.Thread(target=self._follow, args=(job, name, process), daemon=True).start()

    def _process(
        self, pod: Object, container: str, env: Mapping[str, str]
    ) -> tuple[subprocess.Popen[bytes], str]:
        del container  # its only one
        job = pod["metadata"]["labels"]["batch.kubernetes.io/job-name"]
        meeting = {}
        if "PET_MASTER_ADDR" in env:
            port = self._ports.setdefault(job, str(free_port()))
            meeting = {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
        process = subprocess.Popen(
            [sys.executable if a == "python" else a for a in pod["spec"]["containers"][0]["args"]],
            env={**os.environ, **self._extra, **env, **meeting},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return process, "127.0.0.1"

    def _follow(self, job: Object, pod: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._cluster.logs[pod] = self._cluster.logs.get(pod, "") + line.decode()
        code = process.wait()
        with self._lock:
            try:
                with self._cluster.change("pods", pod) as item:
                    leaving = "deletionTimestamp" in item["metadata"]
                    item["status"]["phase"] = "Failed" if code else "Succeeded"
                    ended = {
                        "exitCode": 128 - code if code < 0 else code,
                        "reason": item["status"].get("endReason", "Error" if code else "Completed"),
                    }
                    state = {"name": "main", "state": {"terminated": ended}}
                    item["status"]["containerStatuses"] = [state]
                if leaving:
                    self._cluster.remove("pods", pod)
                else:
                    self._judge(job["metadata"]["name"])
            except KeyError:
                return

    def _judge(self, name: str) -> None:
        pods = self._pods(name)
        phases = [pod["status"]["phase"] for pod in pods]
        job = self._cluster.get("jobs", name)
        if "Failed" in phases:
            for pod in pods:
                process = self.processes[pod["metadata"]["name"]]
                if process.poll() is None:
                    process.terminate()
            if "Running" not in phases:
                self._finish(name, "Failed", "BackoffLimitExceeded")
        elif phases.count("Succeeded") == job["spec"]["completions"]:
            self._finish(name, "Complete", "CompletionsReached")

    def _finish(self, name: str, kind: str, reason: str) -> None:
        with self._cluster.change("jobs", name) as job:
            condition = {"type": kind, "status": "True", "reason": reason, "message": reason}
            job.setdefault("status", {})["conditions"] = [condition]


class DeploymentController:
    """Makes the pods of Deployments, the new ones before the old ones go.

    Args:
        cluster: whose Deployments.
        make: called with each new pod, to say how it fares; default: ready at once.
    """

    def __init__(self, cluster: FakeCluster, make: Callable[[Object], None] | None = None) -> None:
        self._cluster = cluster
        self._make = make or become_ready
        self._lock = threading.RLock()
        self._count = 0
        # How few pods were ready while all were meant to be, by Deployment.
        self.fewest: dict[str, int] = {}
        cluster.listen(self._on_change)

    def _on_change(self, kind: str, plural: str, item: Object) -> None:
        if plural != "deployments":
            return
        with self._lock:
            name = item["metadata"]["name"]
            try:
                deployment = self._cluster.get("deployments", name)
            except KeyError:
                return
            if (
                deployment.get("status", {}).get("observedGeneration")
                != (deployment["metadata"]["generation"])
            ):
                self._roll(deployment)

    def _roll(self, deployment: Object) -> None:
        name, spec = deployment["metadata"]["name"], deployment["spec"]
        labels = spec["selector"]["matchLabels"]
        pods = [
            pod
            for pod in self._cluster.all("pods")
            if labels.items() <= (pod["metadata"].get("labels") or {}).items()
        ]
        annotations = spec["template"]["metadata"].get("annotations")
        old = [p for p in pods if p["metadata"].get("annotations") != annotations]
        new = [p for p in pods if p not in old]
        with self._cluster.change("deployments", name) as item:
            item.setdefault("status", {})["observedGeneration"] = item["metadata"]["generation"]
        for pod in new[spec["replicas"] :]:
            self._cluster.remove("pods", pod["metadata"]["name"])
        for _ in range(spec["replicas"] - len(new)):
            made = self._add(deployment)
            if old and _ready(made):
                self._cluster.remove("pods", old.pop()["metadata"]["name"])
            self._note(name, labels, len(pods))
        if all(_ready(p) for p in self._cluster.all("pods")):
            for pod in old:
                self._cluster.remove("pods", pod["metadata"]["name"])

    def _note(self, name: str, labels: Object, wanted: int) -> None:
        ready = sum(
            _ready(p)
            for p in self._cluster.all("pods")
            if labels.items() <= (p["metadata"].get("labels") or {}).items()
        )
        if wanted:
            self.fewest[name] = min(self.fewest.get(name, ready), ready)

    def _add(self, deployment: Object) -> Object:
        self._count += 1
        template = copy.deepcopy(deployment["spec"]["template"])
        pod = {
            "metadata": {
                **template["metadata"],
                "name": f"{deployment['metadata']['name']}-{self._count}",
                "ownerReferences": [{"uid": deployment["metadata"]["uid"]}],
            },
            "spec": template["spec"],
            "status": {"phase": "Pending", "podIP": f"10.0.0.{self._count}"},
        }
        self._make(pod)
        return self._cluster.put("pods", pod)


def become_ready(pod: Object) -> None:
    """As a kubelet whose probe was answered."""
    pod["status"]["phase"] = "Running"
    pod["status"]["conditions"] = [{"type": "Ready", "status": "True"}]


def _ready(pod: Object) -> bool:
    conditions = pod["status"].get("conditions") or ()
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _condition(item: Object, kind: str) -> bool:
    conditions = item.get("status", {}).get("conditions") or ()
    return any(c["type"] == kind and c["status"] == "True" for c in conditions)


class ReplicaController:
    """Runs the pods of Deployments as real processes, by a `Kubelet`.

    One more than are wanted may run while they are replaced, and a ready one goes
    only when another is ready, as `maxUnavailable: 0, maxSurge: 1` says. A pod that
    is deleted keeps answering for `notice` seconds (the template's preStop).

    Args:
        cluster: whose Deployments.
        extra: more of every process's environment, under what the template says.
        notice: seconds between a pod's deletion and its SIGTERM.
        volumes: where emptyDirs lie; without it pods have none.
        start: starts a container otherwise.
    """

    def __init__(
        self,
        cluster: FakeCluster,
        extra: Mapping[str, str],
        *,
        notice: float = 3.0,
        volumes: Path | None = None,
        start: Start | None = None,
    ) -> None:
        self._cluster = cluster
        here = Processes(volumes, extra)
        self._kubelet = Kubelet(cluster, start or here, overfull=here.overfull, notice=notice)
        self._count = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Kill what still runs."""
        self._stop.set()
        self._thread.join(120)
        self._kubelet.close()

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            for deployment in self._cluster.all("deployments"):
                with contextlib.suppress(KeyError):  # somebody else was quicker
                    self._step(deployment)

    def _step(self, deployment: Object) -> None:
        name, spec = deployment["metadata"]["name"], deployment["spec"]
        generation = deployment["metadata"]["generation"]
        if deployment.get("status", {}).get("observedGeneration") != generation:
            with self._cluster.change("deployments", name) as item:
                item.setdefault("status", {})["observedGeneration"] = generation
        labels, wanted = spec["selector"]["matchLabels"], spec["replicas"]
        annotations = spec["template"]["metadata"].get("annotations")
        pods = [
            pod
            for pod in self._cluster.all("pods")
            if labels.items() <= pod["metadata"]["labels"].items()
            and "deletionTimestamp" not in pod["metadata"]
            and pod["status"]["phase"] in ("Pending", "Running")
        ]
        new = [pod for pod in pods if pod["metadata"]["annotations"] == annotations]
        old = [pod for pod in pods if pod not in new]
        if len(new) < wanted and len(pods) <= wanted:
            self._start(deployment)
        elif len(new) > wanted:
            self._delete(new[-1])
        elif (old and sum(map(_ready, pods)) > wanted) or (old and not wanted):
            self._delete(old[0])

    def _start(self, deployment: Object) -> None:
        self._count += 1
        template = copy.deepcopy(deployment["spec"]["template"])
        metadata = {
            **template["metadata"],
            "name": f"{deployment['metadata']['name']}-{self._count}",
            "ownerReferences": [{"uid": deployment["metadata"]["uid"]}],
        }
        self._kubelet.run({"metadata": metadata, "spec": template["spec"]})

    def _delete(self, pod: Object) -> None:
        with self._cluster.change("pods", pod["metadata"]["name"]) as item:
            item["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
