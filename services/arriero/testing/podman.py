"""Pods in containers of this machine: `podman kube play`, given what a cluster would add.

Responsibility: from a pod's template to a running container with an address, a
name and its claims, for a `FakeCluster`. Does not know Arriero.

What podman (4.3) does with a pod as it is: image, arguments, user and group,
capabilities, read-only root, no new privileges, memory limits, emptyDirs, claims
and ConfigMaps as volumes. What `start` does in the place of a kubelet: values from
Secrets and the downward API, the service account's directory, the API's address, names
of Services (as aliases of the network); init containers are started by whoever plays,
before the others. What nobody does here: probes (whoever plays asks them), ports of
containers (podman would open them on this machine), preStop, fsGroup, sizes of volumes,
spreading, network policies, restarts.
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

import yaml

from arriero.errors import Internal
from arriero.testing.cluster import NAMESPACE, FakeCluster, Object
from arriero.testing.kubelet import environment

_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_TOKEN = "a-token"
_START_SECONDS = 60.0
# Those of podman may be more than this machine allows.
_ULIMITS = '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\n'


def missing(images: Iterable[str]) -> str:
    """Why pods can't be played here; empty when they can."""
    for command in ("podman", "openssl", "ip"):
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

    Attributes:
        cluster: the API server; pods take their Secrets from it.
        gateway: this machine's address, as pods see it.
    """

    cluster: FakeCluster

    def __init__(self, name: str, directory: Path) -> None:
        self._name = name
        self._directory = directory
        self._pods: list[str] = []
        self._volumes: list[str] = []
        (directory / "containers.conf").write_text(_ULIMITS)
        self._env = {**os.environ, "CONTAINERS_CONF": str(directory / "containers.conf")}
        self.gateway = ""

    def __enter__(self) -> Podman:
        self._run("network", "create", self._name)
        form = "{{(index .Subnets 0).Gateway}}"
        self.gateway = self._run("network", "inspect", self._name, "--format", form).strip()
        self.cluster = FakeCluster(self._tls()).__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.__exit__()
        for pod in self._pods:
            self._run("pod", "rm", "--force", "--time", "0", pod, check=False)
        self._run("volume", "rm", "--force", *self._volumes, check=False)
        self._run("network", "rm", "--force", self._name, check=False)

    def claim(self, claims: Iterable[Object]) -> None:
        """Make PersistentVolumeClaims, which become volumes."""
        made = [copy.deepcopy(claim) for claim in claims]
        for claim in made:
            claim["metadata"]["name"] = self._volume(claim["metadata"]["name"])
            self._volumes.append(claim["metadata"]["name"])
        if made:
            self._play("claims", made, "--network", self._name)

    def start(
        self,
        pod: Object,
        container: str = "main",
        env: Mapping[str, str] = {},
        *,
        config: Mapping[str, Mapping[str, str]] = {},
        aliases: Iterable[str] = (),
    ) -> tuple[subprocess.Popen[bytes], str]:
        """Start a container of a pod, which is made for the first: see `kubelet.Start`.

        Args:
            pod: with name and spec.
            container: its name; init containers before `main`.
            env: more of that container than its spec says; the pod's first call alone can.
            config: data of the ConfigMaps that it mounts, by name.
            aliases: names by which others find it.

        Returns:
            A process that is the container's (output, SIGTERM, exit code), and the pod's address.

        Raises:
            Internal: podman refuses; with its words.
        """
        name = pod["metadata"]["name"]
        if name not in self._pods:
            self._make(pod, container, env, config, aliases)
        process = subprocess.Popen(
            ["podman", "start", "--attach", "--sig-proxy", f"{name}-{container}"],
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return process, self._address(name, process) if container == "main" else ""

    def _make(
        self,
        pod: Object,
        started: str,
        env: Mapping[str, str],
        config: Mapping[str, Mapping[str, str]],
        aliases: Iterable[str],
    ) -> None:
        """Make a pod and its containers; none runs yet."""
        name, spec = pod["metadata"]["name"], copy.deepcopy(pod["spec"])
        maps = {key: dict(value) for key, value in config.items()}
        for container in (*spec.get("initContainers", ()), *spec["containers"]):
            for key in ("ports", "startupProbe", "readinessProbe", "livenessProbe", "lifecycle"):
                container.pop(key, None)
            found = environment(self.cluster, pod, container)
            found |= env if container["name"] == started else {}
            container["env"] = [{"name": k, "value": v} for k, v in found.items()]
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

    def inside(self, pod: str, *command: str) -> str:
        """What a command in a pod's container writes."""
        return self._run("exec", f"{pod}-main", *command)

    def stop(self, pod: str, grace: int) -> int:
        """SIGTERM, and SIGKILL after `grace` seconds; the container's exit code."""
        container = f"{pod}-main"
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
        self._hold()
        return found

    def _hold(self) -> None:
        """Keep this machine's hardware address in the network, which follows the lowest of pods'.

        When it changes, pods that run send what is for this machine to nobody for half a minute.
        """
        form = "{{.NetworkInterface}}"
        bridge = self._run("network", "inspect", self._name, "--format", form).strip()
        address = Path(f"/sys/class/net/{bridge}/address").read_text().strip()
        command = ["ip", "link", "set", "dev", bridge, "address", address]
        subprocess.run(command, check=True, capture_output=True)

    def _account(self, spec: Object) -> dict[str, str]:
        """Mount what a service account's pod has, and say where the API is."""
        for container in spec["containers"]:
            container["env"] += [
                {"name": "KUBERNETES_SERVICE_HOST", "value": self.gateway},
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
        names = ["-subj", "/CN=api", "-addext", f"subjectAltName=IP:{self.gateway}"]
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
