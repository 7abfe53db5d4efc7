"""What a node does with a Deployment's pods, for a `FakeCluster`.

Responsibility: init containers in their order, and again when they fail; the others
after them; readiness, notice before the end, eviction; status and logs of all this.
Does not know Deployments, nor what runs.
"""

from __future__ import annotations

import base64
import itertools
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from arriero.kubernetes.pods import leaving, ready
from arriero.rpc.channel import check_health
from arriero.testing.cluster import NAMESPACE, FakeCluster, Object
from arriero.testing.containers import kill

# Starts a container of a pod (the pod, its name, its environment): what runs, and
# the pod's address, which only the last one is asked for.
Start = Callable[[Object, str, Mapping[str, str]], tuple[subprocess.Popen[bytes], str]]
_ANNOTATION = re.compile(r"metadata\.annotations\['(.*)'\]")
_LOOK_SECONDS = 0.1


def environment(cluster: FakeCluster, pod: Object, container: Object) -> dict[str, str]:
    """A container's variables, those from Secrets and the downward API too.

    Raises:
        KeyError: there is no such Secret, key or field.
    """
    found = {}
    for item in container.get("env") or ():
        source = item.get("valueFrom") or {}
        if "secretKeyRef" in source:
            wanted = source["secretKeyRef"]
            data = cluster.get("secrets", wanted["name"])["data"]
            found[item["name"]] = base64.b64decode(data[wanted["key"]]).decode()
        elif "fieldRef" in source:
            found[item["name"]] = _field(pod, source["fieldRef"]["fieldPath"])
        else:
            found[item["name"]] = str(item.get("value") or "")
    return found


def _field(pod: Object, path: str) -> str:
    if annotation := _ANNOTATION.fullmatch(path):
        return str(pod["metadata"]["annotations"][annotation[1]])
    known = {"metadata.namespace": NAMESPACE, "metadata.name": str(pod["metadata"]["name"])}
    return known[path]


class Processes:
    """Containers as processes of this machine, each pod on a loopback address of its own.

    Args:
        directory: where emptyDirs lie; values of the environment that are paths in
            them are made to fit. Without it they stay.
        extra: more of every container's environment.
    """

    def __init__(self, directory: Path | None, extra: Mapping[str, str]) -> None:
        self._directory = directory
        self._extra = dict(extra)
        self._addresses: dict[str, str] = {}
        # Other tests' pods have other ones.
        self._network = f"127.{secrets.randbelow(250) + 1}.{secrets.randbelow(250) + 1}"

    def __call__(
        self, pod: Object, container: str, env: Mapping[str, str]
    ) -> tuple[subprocess.Popen[bytes], str]:
        """See `Start`."""
        count = len(self._addresses) % 250 + 2
        address = self._addresses.setdefault(pod["metadata"]["name"], f"{self._network}.{count}")
        spec = _container(pod, container)
        outside = {k: v for k, v in os.environ.items() if not k.startswith(("ARRIERO_", "AWS_"))}
        here = {key: self._placed(pod, spec, value) for key, value in env.items()}
        process = subprocess.Popen(
            [sys.executable if argument == "python" else argument for argument in spec["args"]],
            env={**outside, **self._extra, **here, "ARRIERO_LISTEN": f"{address}:50051"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return process, address

    def overfull(self, pod: Object) -> str:
        """Which volume holds more than it may, as a kubelet says it; empty for none."""
        for volume in pod["spec"].get("volumes") or ():
            limit = str((volume.get("emptyDir") or {}).get("sizeLimit") or "")
            if self._directory is None or not limit.isdecimal():
                continue
            files = self._volume(pod, volume["name"]).rglob("*")
            if sum(map(_size, files)) > int(limit):
                return f'Usage of EmptyDir volume "{volume["name"]}" exceeds the limit "{limit}". '
        return ""

    def _placed(self, pod: Object, container: Object, value: str) -> str:
        if self._directory is None:
            return value
        for mount in container.get("volumeMounts") or ():
            path = re.escape(mount["mountPath"])
            place = str(self._volume(pod, mount["name"]))
            value = re.sub(rf"^(file://)?{path}(?=/|$)", rf"\g<1>{place}", value)
        return value

    def _volume(self, pod: Object, name: str) -> Path:
        assert self._directory is not None
        place = self._directory / str(pod["metadata"]["name"]) / name
        place.mkdir(parents=True, exist_ok=True)
        return place


class Kubelet:
    """Runs pods, each in a thread.

    Args:
        cluster: whose pods.
        start: starts a container.
        overfull: says of a pod which of its volumes holds too much; default: none does.
        notice: seconds between a pod's deletion and its SIGTERM (its preStop).
        back_off: seconds before an init container that failed is started again; twice as
            long after each failure.
    """

    def __init__(
        self,
        cluster: FakeCluster,
        start: Start,
        *,
        overfull: Callable[[Object], str] = lambda _: "",
        notice: float = 3.0,
        back_off: float = 0.5,
    ) -> None:
        self._cluster = cluster
        self._start = start
        self._overfull = overfull
        self._notice = notice
        self._back_off = back_off
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def run(self, pod: Object) -> None:
        """Take a new pod."""
        self._cluster.put("pods", {**pod, "status": {"phase": "Pending"}})
        thread = threading.Thread(target=self._live, args=(pod,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def close(self) -> None:
        """Kill what still runs."""
        self._closed.set()
        for thread in self._threads:
            thread.join(120)

    def _live(self, pod: Object) -> None:
        name = pod["metadata"]["name"]
        try:
            evicted = not all(
                self._initialize(pod, container)
                for container in pod["spec"].get("initContainers") or ()
            )
            if evicted or not self._serve(pod):
                return  # it stays, for whoever asks why
        except KeyError:
            pass  # it is gone
        self._cluster.remove("pods", name)

    def _initialize(self, pod: Object, container: Object) -> bool:
        """Run an init container until it has done its work; False when the pod is evicted."""
        called = container["name"]
        for count in itertools.count():
            process, _ = self._begin(pod, container)
            self._say(pod, initContainerStatuses=[_state(called, count, running={})])
            if not self._follow(pod, process):
                return False
            if not (code := process.returncode):
                done = _state(called, count, terminated={"exitCode": 0, "reason": "Completed"})
                self._say(pod, initContainerStatuses=[done])
                return True
            state = _state(called, count, waiting={"reason": "CrashLoopBackOff"})
            state["lastState"] = {"terminated": {"exitCode": code, "reason": "Error"}}
            self._say(pod, initContainerStatuses=[state])
            if self._closed.wait(self._back_off * 2**count):
                break
        raise KeyError(pod["metadata"]["name"])

    def _serve(self, pod: Object) -> bool:
        """Run its first container; False when the pod is evicted."""
        process, address = self._begin(pod, pod["spec"]["containers"][0])
        try:
            self._say(pod, phase="Running", podIP=address)
            return self._follow(pod, process, f"{address}:50051")
        finally:
            kill(process)

    def _follow(self, pod: Object, process: subprocess.Popen[bytes], address: str = "") -> bool:
        """Watch a process until it ends; ask `address` whether it is ready.

        Raises:
            KeyError: the pod is deleted.
        """
        name = pod["metadata"]["name"]
        last = 0.0  # when it is told to leave, as soon as it is to leave
        told = False
        while process.poll() is None:
            if self._closed.wait(_LOOK_SECONDS):
                kill(process)
            if said := self._overfull(pod):
                kill(process)
                self._say(pod, phase="Failed", reason="Evicted", message=said, conditions=[])
                return False
            try:
                found = self._cluster.get("pods", name)
            except KeyError:  # its Deployment is gone
                found = None
            if found is None or leaving(found):
                last = last or time.monotonic() + (self._notice if found and address else 0)
                # Once: a second SIGTERM ends running calls.
                if not told and time.monotonic() >= last:
                    process.terminate()
                    told = True
            elif address and not ready(found) and check_health(address):
                self._say(pod, conditions=[{"type": "Ready", "status": "True"}])
        if told:
            raise KeyError(name)
        return True

    def _begin(self, pod: Object, container: Object) -> tuple[subprocess.Popen[bytes], str]:
        called = container["name"]
        env = environment(self._cluster, pod, container)
        process, address = self._start(pod, called, env)
        name = pod["metadata"]["name"]
        key = name if called == "main" else f"{name}/{called}"
        if key in self._cluster.logs:
            self._cluster.logs[f"{key}/previous"] = self._cluster.logs[key]
        self._cluster.logs[key] = ""

        def read() -> None:
            for line in process.stdout or ():
                self._cluster.logs[key] += line.decode(errors="replace")

        threading.Thread(target=read, daemon=True).start()
        return process, address

    def _say(self, pod: Object, **status: object) -> None:
        with self._cluster.change("pods", pod["metadata"]["name"]) as item:
            item["status"] |= status


def _state(called: str, restarts: int, **state: Object) -> Object:
    return {"name": called, "restartCount": restarts, "state": state}


def _container(pod: Object, called: str) -> Object:
    spec = pod["spec"]
    every = (*(spec.get("initContainers") or ()), *spec["containers"])
    return next(container for container in every if container["name"] == called)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # it is gone meanwhile
        return 0
