"""A node of a real cluster, without a kubelet: pods become processes of this machine.

Responsibility: register a node, run what the scheduler binds to it, report its state
as a kubelet does, serve logs, end pods that are deleted. No images, no containers,
no volumes: a pod's `python` is this interpreter. Does not know what runs.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import urllib3

from arriero.testing.containers import kill
from arriero.testing.control_plane import ApiFailure, ControlPlane

Object = dict[str, Any]
# Starts a pod (its object, the environment of its container): what runs (None: it is
# ready at once, and ends when it is deleted), and its address.
Start = Callable[[Object, Mapping[str, str]], tuple[subprocess.Popen[bytes] | None, str]]
_LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
_HEARTBEAT_SECONDS = 5.0
_AWAY = (ApiFailure, urllib3.exceptions.HTTPError, OSError)


class Node:
    """A node that is there until it is closed.

    Args:
        plane: whose node it is.
        environment: of every process, under what the pod says.
        start: starts a pod otherwise.

    Attributes:
        processes: by pod.
        logs: what they wrote, by pod.
    """

    def __init__(
        self,
        plane: ControlPlane,
        environment: Mapping[str, str],
        start: Start | None = None,
    ) -> None:
        self._plane = plane
        self._environment = dict(environment)
        self._start = start or self._process
        self.name = f"node-{secrets.token_hex(3)}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.logs: dict[str, str] = {}
        self._pods: dict[str, _Pod] = {}  # by uid
        self._over = threading.Event()
        self._server = self._serve_logs()
        self._register()
        self._threads = [
            threading.Thread(target=loop, daemon=True)
            for loop in (self._follow, self._beat, self._server.serve_forever)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Kill what still runs, and take the node away."""
        self._over.set()
        self._threads[0].join(20)
        for process in self.processes.values():
            kill(process)
            process.wait()
        for pod in self._bound():
            self._remove(pod)
        self._quietly("DELETE", f"/api/v1/nodes/{self.name}")
        self._server.shutdown()
        self._server.server_close()

    def kill(self, pod: str, *, reason: str = "Error") -> None:
        """SIGKILL a pod's process; `OOMKilled` as the kubelet says it."""
        process = self.processes[pod]
        for known in self._pods.values():
            if known.process is process:
                known.reason = reason
        kill(process)

    # What a kubelet does

    def _register(self) -> None:
        resources = {"cpu": "64", "memory": "256Gi", "ephemeral-storage": "1Ti", "pods": "200"}
        made = self._plane.ask(
            "POST",
            "/api/v1/nodes",
            {
                "metadata": {"name": self.name, "labels": {"kubernetes.io/hostname": self.name}},
            },
        )
        self._heartbeat: Object = {
            "capacity": resources,
            "allocatable": resources,
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._server.server_port}},
            "conditions": [
                {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "it runs"}
            ],
        }
        self._state_node()
        owner = {
            "apiVersion": "v1",
            "kind": "Node",
            "name": self.name,
            "uid": made["metadata"]["uid"],
        }
        self._plane.ask(
            "POST",
            _LEASES,
            {
                "metadata": {"name": self.name, "ownerReferences": [owner]},
                "spec": {
                    "holderIdentity": self.name,
                    "leaseDurationSeconds": 40,
                    "renewTime": _micro(),
                },
            },
        )

    def _state_node(self) -> None:
        for condition in self._heartbeat["conditions"]:
            condition["lastHeartbeatTime"] = _now()
            condition.setdefault("lastTransitionTime", _now())
        self._plane.ask("PATCH", f"/api/v1/nodes/{self.name}/status", {"status": self._heartbeat})

    def _beat(self) -> None:
        while not self._over.wait(_HEARTBEAT_SECONDS):
            self._quietly("PATCH", f"{_LEASES}/{self.name}", {"spec": {"renewTime": _micro()}})

    def _follow(self) -> None:
        while not self._over.wait(0.1):
            try:
                found = self._bound()
                for pod in found:
                    self._step(pod)
            except _AWAY:  # the API is away, or was faster: what runs goes on
                continue
            left = {pod["metadata"]["uid"] for pod in found}
            for uid in [uid for uid in self._pods if uid not in left]:
                self._pods.pop(uid).kill()  # deleted without grace

    def _bound(self) -> list[Object]:
        path = f"/api/v1/pods?fieldSelector=spec.nodeName%3D{self.name}"
        return list(self._plane.ask("GET", path)["items"])

    def _step(self, pod: Object) -> None:
        metadata = pod["metadata"]
        known, leaving = self._pods.get(metadata["uid"]), "deletionTimestamp" in metadata
        if known is None:
            if leaving:
                self._remove(pod)
            if leaving or pod["status"].get("phase") in ("Succeeded", "Failed"):
                return
            known = self._pods[metadata["uid"]] = self._begin(pod)
        phase = known.phase()
        if phase != known.told:
            self._state(pod, known.status(phase))
            known.told = phase
        if not leaving:
            return
        if phase == "Running" and known.process is not None:
            known.leave(float(metadata["deletionGracePeriodSeconds"]))
        else:
            self._remove(pod)

    def _begin(self, pod: Object) -> _Pod:
        name = pod["metadata"]["name"]
        process, address = self._start(pod, _environment(pod, name))
        known = _Pod(pod["spec"]["containers"][0]["name"], process, address, _now())
        if process is not None:
            self.processes[name] = process
            if process.stdout is not None:
                known.reader = threading.Thread(target=self._read, args=(name, process))
                known.reader.start()
        return known

    def _read(self, name: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.logs[name] = self.logs.get(name, "") + line.decode(errors="replace")

    def _process(self, pod: Object, env: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], str]:
        process = subprocess.Popen(
            [sys.executable if a == "python" else a for a in pod["spec"]["containers"][0]["args"]],
            env={**os.environ, **self._environment, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return process, "127.0.0.1"

    def _state(self, pod: Object, status: Object) -> None:
        self._plane.ask("PATCH", _path(pod) + "/status", {"status": status})

    def _remove(self, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": uid}}
        self._quietly("DELETE", _path(pod), body)

    def _quietly(self, method: str, path: str, body: Object | None = None) -> None:
        with contextlib.suppress(*_AWAY):
            self._plane.ask(method, path, body)

    def _serve_logs(self) -> ThreadingHTTPServer:
        logs = self.logs

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)  # /containerLogs/<namespace>/<pod>/<container>
                _, kind, _, pod, *_ = [*url.path.split("/"), "", "", ""]
                lines = logs.get(pod, "").splitlines(keepends=True)
                count = int(parse_qs(url.query).get("tailLines", ["0"])[0])
                data = "".join(lines[-count:] if count else lines).encode()
                self.send_response(200 if kind == "containerLogs" else 404)
                self.send_header("Content-Type", "text/plain")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        made, key = self._plane.certificate("node", "/CN=node")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(made, key)
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        return server


class _Pod:
    """What runs of a pod, and its status as a kubelet tells it."""

    def __init__(
        self, container: str, process: subprocess.Popen[bytes] | None, address: str, began: str
    ) -> None:
        self.container, self.process, self.address = container, process, address
        self.began = began
        self.reason = ""  # of its end, where it is not the usual one
        self.told = ""  # the phase that the API knows
        self.reader: threading.Thread | None = None
        self._left_at: float | None = None

    def phase(self) -> str:
        """Running, or how its process ended."""
        code = None if self.process is None else self.process.poll()
        return "Running" if code is None else "Failed" if code else "Succeeded"

    def leave(self, grace: float) -> None:
        """SIGTERM, and SIGKILL after `grace` seconds."""
        assert self.process is not None
        now = time.monotonic()
        if self._left_at is None:
            self._left_at = now
            self.process.terminate()
        if now - self._left_at >= grace:
            kill(self.process)

    def kill(self) -> None:
        """At once."""
        if self.process is not None:
            kill(self.process)
            self.process.wait()

    def status(self, phase: str) -> Object:
        """A pod's status in a phase; of what ended, after all that it wrote was read."""
        state: Object = {"running": {"startedAt": self.began}}
        ready = phase == "Running"
        if self.process is not None and not ready:
            if self.reader is not None:
                self.reader.join(5)
            code = self.process.returncode
            ended = {
                "exitCode": 128 - code if code < 0 else code,
                "reason": self.reason or ("Error" if code else "Completed"),
                "startedAt": self.began,
                "finishedAt": _now(),
            }
            state = {"terminated": ended}
        container = {
            "name": self.container,
            "image": "",
            "imageID": "",
            "ready": ready,
            "restartCount": 0,
            "state": state,
        }
        word = "True" if ready else "False"
        kinds = {
            "Initialized": "True",
            "Ready": word,
            "ContainersReady": word,
            "PodScheduled": "True",
        }
        conditions = [
            {"type": kind, "status": value, "lastTransitionTime": _now()}
            for kind, value in kinds.items()
        ]
        return {
            "phase": phase,
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "hostIP": "127.0.0.1",
            "startTime": self.began,
            "conditions": conditions,
            "containerStatuses": [container],
        }


def _path(pod: Object) -> str:
    metadata = pod["metadata"]
    return f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"


def _environment(pod: Object, name: str) -> dict[str, str]:
    """What its container is given; of fields, the annotations and the name."""
    found = {}
    annotations = pod["metadata"].get("annotations") or {}
    for item in pod["spec"]["containers"][0].get("env") or ():
        field = item.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        if field.startswith("metadata.annotations"):
            found[item["name"]] = annotations.get(field.split("'")[1], "")
        else:
            found[item["name"]] = name if field == "metadata.name" else item.get("value", "")
    return found


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _micro() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
