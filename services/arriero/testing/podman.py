"""Pods in containers of this machine: `podman kube play`, given what a cluster would add.

Responsibility: from a pod's template to a running container with an address, a
name and its claims, for a `FakeCluster`. Does not know Arriero.

What podman (4.3) does with a pod as it is: image, arguments, user and group,
capabilities, read-only root, no new privileges, memory limits, emptyDirs, claims
and ConfigMaps as volumes. What `play` does in the place of a kubelet: values from
the downward API, the service account's directory, the API's address, names of
Services (as aliases of the network). What nobody does here: probes (whoever plays
asks them), ports of containers (podman would open them on this machine), preStop,
fsGroup, sizes of volumes, spreading, network policies, restarts.
"""

from __future__ import annotations

import copy
import os
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from arriero.errors import FailedPrecondition, Internal
from arriero.testing.cluster import NAMESPACE, FakeCluster, Object

_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_TOKEN = "a-token"
_START_SECONDS = 60.0
# Those of podman may be more than this machine allows.
_ULIMITS = '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\n'


def missing(images: Iterable[str]) -> str:
    """Why pods can't be played here; empty when they can."""
    for command in ("podman", "openssl"):
        if shutil.which(command) is None:
            return f"needs the {command} command"
    for image in images:
        if subprocess.run(["podman", "image", "exists", image], check=False).returncode:
            return f"podman has no image {image}: make images"
    return ""


class Podman:
    """A network of pods, and the API server that they find in it; use it in a `with` block.

    Args:
        name: of the network, and before the names of volumes.
        directory: an empty one, for files.
        claims: PersistentVolumeClaims, which become volumes.
    """

    cluster: FakeCluster

    def __init__(self, name: str, directory: Path, claims: Iterable[Object] = ()) -> None:
        self._name = name
        self._directory = directory
        self._claims = [copy.deepcopy(claim) for claim in claims]
        self._pods: list[str] = []
        self._volumes: list[str] = []
        (directory / "containers.conf").write_text(_ULIMITS)
        self._env = {**os.environ, "CONTAINERS_CONF": str(directory / "containers.conf")}
        self._gateway = ""

    def __enter__(self) -> Podman:
        self._run("network", "create", self._name)
        form = "{{(index .Subnets 0).Gateway}}"
        self._gateway = self._run("network", "inspect", self._name, "--format", form).strip()
        self.cluster = FakeCluster(self._tls()).__enter__()
        for claim in self._claims:
            claim["metadata"]["name"] = self._volume(claim["metadata"]["name"])
            self._volumes.append(claim["metadata"]["name"])
        self._play("claims", self._claims, "--network", self._name)
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.__exit__()
        for pod in self._pods:
            self._run("pod", "rm", "--force", "--time", "0", pod, check=False)
        self._run("volume", "rm", "--force", *self._volumes, check=False)
        self._run("network", "rm", "--force", self._name, check=False)

    def start(
        self,
        pod: Object,
        env: Mapping[str, str] | None = None,
        *,
        config: Mapping[str, Mapping[str, str]] = {},
        aliases: Iterable[str] = (),
    ) -> tuple[subprocess.Popen[bytes], str]:
        """Play a pod: a process that is its container's (output, SIGTERM, exit code), its address.

        Args:
            pod: with name and spec; only its container `main` is looked at.
            env: of the container, where somebody has resolved it.
            config: data of the ConfigMaps that it mounts, by name.
            aliases: names by which others find it.

        Raises:
            Internal: podman refuses; with its words.
        """
        name, spec = pod["metadata"]["name"], copy.deepcopy(pod["spec"])
        maps = {key: dict(value) for key, value in config.items()}
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            for key in ("ports", "startupProbe", "readinessProbe", "livenessProbe", "lifecycle"):
                container.pop(key, None)
            resolved = env if env is not None else _resolved(container.get("env") or ())
            container["env"] = [{"name": k, "value": v} for k, v in resolved.items()]
        spec["restartPolicy"] = "Never"
        if spec.get("automountServiceAccountToken", True):
            maps["kube-api-access"] = self._account(spec)
        self._own(name, spec)
        documents: list[Object] = [
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": self._volume(f"{name}-{key}")},
                "data": data,
            }
            for key, data in maps.items()
        ]
        self._volumes += [found["metadata"]["name"] for found in documents]
        metadata = {"name": name, "labels": pod["metadata"].get("labels") or {}}
        documents.append({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        self._pods.append(name)
        network = ":".join([self._name, ",".join(f"alias={alias}" for alias in aliases)])
        self._play(name, documents, "--start=false", "--network", network.rstrip(":"))
        process = subprocess.Popen(
            ["podman", "start", "--attach", "--sig-proxy", self.container(name)],
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return process, self._address(name, process)

    def container(self, pod: str) -> str:
        """What podman calls a pod's container."""
        return f"{pod}-main"

    def inside(self, pod: str, *command: str) -> str:
        """What a command in a pod's container writes."""
        return self._run("exec", self.container(pod), *command)

    def stop(self, pod: str, grace: int) -> int:
        """SIGTERM, and SIGKILL after `grace` seconds; the container's exit code."""
        container = self.container(pod)
        self._run("stop", "--time", str(grace), container)
        return int(self._run("inspect", container, "--format", "{{.State.ExitCode}}"))

    def _address(self, pod: str, process: subprocess.Popen[bytes]) -> str:
        form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        infra = self._run("pod", "inspect", pod, "--format", "{{.InfraContainerID}}").strip()
        deadline = time.monotonic() + _START_SECONDS
        while not (found := self._run("inspect", infra, "--format", form).strip()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise Internal(f"podman did not start {pod}")
            time.sleep(0.1)
        return found

    def _account(self, spec: Object) -> dict[str, str]:
        """Mount what a service account's pod has, and say where the API is."""
        for container in spec["containers"]:
            container["env"] += [
                {"name": "KUBERNETES_SERVICE_HOST", "value": self._gateway},
                {"name": "KUBERNETES_SERVICE_PORT", "value": str(self.cluster.port)},
            ]
            container.setdefault("volumeMounts", []).append(
                {"name": "kube-api-access", "mountPath": _ACCOUNT, "readOnly": True}
            )
        spec.setdefault("volumes", []).append(
            {"name": "kube-api-access", "configMap": {"name": "kube-api-access"}}
        )
        authority = (self._directory / "tls.crt").read_text()
        return {"token": _TOKEN, "ca.crt": authority, "namespace": NAMESPACE}

    def _own(self, pod: str, spec: Object) -> None:
        """For podman a volume of that name is one, whichever pod it is in."""
        for volume in spec.get("volumes", ()):
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]
                claim["claimName"] = self._volume(claim["claimName"])
            elif "configMap" in volume:
                volume["configMap"]["name"] = self._volume(f"{pod}-{volume['configMap']['name']}")
            volume["name"] = f"{pod}-{volume['name']}"
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            for mount in container.get("volumeMounts", ()):
                mount["name"] = f"{pod}-{mount['name']}"

    def _volume(self, claim: str) -> str:
        return f"{self._name}-{claim}"

    def _tls(self) -> ssl.SSLContext:
        place = self._directory
        files = ["-keyout", f"{place}/tls.key", "-out", f"{place}/tls.crt"]
        kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        names = ["-subj", "/CN=api", "-addext", f"subjectAltName=IP:{self._gateway}"]
        subprocess.run(
            ["openssl", "req", "-x509", "-days", "2", *kind, *files, *names],
            check=True,
            capture_output=True,
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(place / "tls.crt", place / "tls.key")
        return context

    def _play(self, name: str, documents: list[Object], *options: str) -> None:
        path = self._directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump_all(documents))
        self._run("kube", "play", *options, str(path))

    def _run(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(
            ["podman", *arguments],
            check=False,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=170,
        )
        if check and done.returncode:
            raise Internal(f"podman {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout


def _resolved(env: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Values, those of the downward API too."""
    found = {}
    for item in env:
        if "value" in item:
            found[item["name"]] = str(item["value"])
        elif item["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.namespace"}}:
            found[item["name"]] = NAMESPACE
        else:
            raise FailedPrecondition(f"{item} cannot be resolved here")
    return found
