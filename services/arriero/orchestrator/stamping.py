"""Endpoints as Kubernetes objects, from the administrator's templates.

Responsibility: read `endpoint.yaml`, `service.yaml` and `autoscaling.yaml`, and make
the Deployment, the Services and the autoscaler of an endpoint. Talks to nobody.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from arriero.errors import FailedPrecondition
from arriero.kubernetes.names import PREFIX, label, name
from arriero.operations.handoff import canonical
from arriero.orchestrator.platform import Desired
from arriero.replica import ADAPTERS_VARIABLE

Object = dict[str, Any]
MODEL, ENDPOINT, HASH = f"{PREFIX}model", f"{PREFIX}name", f"{PREFIX}spec-hash"
# The init container that fetches a replica's files, and the volume that it fetches them to.
DELIVERY = "model"
_GRPC_PORT = 50051


@dataclass(frozen=True)
class Scaling:
    """Who changes the number of replicas: people (`none`), an HPA, or KEDA."""

    mode: str = "none"
    min: int = 1
    max: int = 4
    target: float = 2
    metric: str = "arriero_num_requests_waiting"
    prometheusAddress: str = ""


@dataclass(frozen=True)
class Templates:
    """What an administrator gives the orchestrator for endpoints."""

    deployment: Object
    service: Object = field(default_factory=dict)
    scaling: Scaling = field(default_factory=Scaling)

    @classmethod
    def read(cls, directory: Path) -> Templates:
        """Read the files; `endpoint.yaml` has to be there.

        Raises:
            FailedPrecondition: one is missing, or is not what it should be; it is named.
        """
        path = directory / "endpoint.yaml"
        deployment = _read(path)
        pod = deployment.get("spec", {}).get("template", {}).get("spec", {})
        if deployment.get("kind") != "Deployment" or not pod.get("containers"):
            raise FailedPrecondition(
                f"{path} is no apps/v1 Deployment with a container in spec.template"
            )
        optional = [directory / "service.yaml", directory / "autoscaling.yaml"]
        service, scaling = (_read(item) if item.exists() else {} for item in optional)
        try:
            found = Scaling(**scaling)
        except TypeError as error:
            raise FailedPrecondition(f"{optional[1]}: {error}") from error
        if found.mode not in ("none", "hpa", "keda"):
            raise FailedPrecondition(
                f"{optional[1]}: mode is {found.mode!r}; expected none, hpa or keda"
            )
        return cls(deployment, service, found)

    @property
    def delivers(self) -> bool:
        """Whether an init container brings the files of a replica, which reads no others."""
        pod = self.deployment["spec"]["template"]["spec"]
        return any(item["name"] == DELIVERY for item in pod.get("initContainers") or ())

    def port(self, called: str, default: int) -> int:
        """Number of a named port of a replica."""
        container = self.deployment["spec"]["template"]["spec"]["containers"][0]
        for port in container.get("ports") or ():
            if port.get("name") == called:
                return int(port["containerPort"])
        return default


def _read(path: Path) -> Object:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise FailedPrecondition(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise FailedPrecondition(f"{path} holds no mapping")
    return data


@dataclass(frozen=True)
class Stamp:
    """Makes the objects of endpoints.

    Args:
        templates: the administrator's.
        release: a part of every name.
        owner: `ownerReference` of whatever takes all of them along when it goes.
    """

    templates: Templates
    release: str
    owner: Object | None = None

    def name(self, endpoint: str) -> str:
        """Of an endpoint's Deployment and ClusterIP Service."""
        return name(self.release, "endpoint", endpoint, longest=50)

    def selector(self, endpoint: str) -> Mapping[str, str]:
        """Labels that an endpoint's pods carry, and no others."""
        return {f"{PREFIX}deployment": self.name(endpoint)}

    def deployment(self, desired: Desired) -> Object:
        """The Deployment; its replicas are left to whoever scales it."""
        body = copy.deepcopy(self.templates.deployment)
        metadata = self._metadata(desired.name, self.name(desired.name), body.get("metadata"))
        spec = body["spec"]
        spec["selector"] = {"matchLabels": dict(self.selector(desired.name))}
        spec["replicas"] = desired.replicas
        spec.setdefault("strategy", {"type": "RollingUpdate"})
        # A new replica has to be ready before an old one goes.
        rolling = spec["strategy"].setdefault("rollingUpdate", {})
        rolling.setdefault("maxUnavailable", 0)
        rolling.setdefault("maxSurge", 1)
        template = spec["template"]
        labels = template.setdefault("metadata", {}).setdefault("labels", {})
        labels |= {**self.selector(desired.name), f"{PREFIX}endpoint": label(desired.name)}
        pod = template["spec"]
        pod.setdefault("automountServiceAccountToken", False)
        container = pod["containers"][0]
        environment = desired.environment()
        kept = [e for e in container.get("env") or () if e["name"] not in environment]
        container["env"] = [*kept, *({"name": k, "value": v} for k, v in environment.items())]
        if self.templates.delivers:
            _deliver(pod, desired)
        annotations = template["metadata"].setdefault("annotations", {})
        annotations |= {MODEL: desired.digest, ENDPOINT: desired.name}
        digest = _digest(template)
        annotations[HASH] = digest
        metadata["annotations"] |= {HASH: digest, MODEL: desired.digest}
        return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec}

    def services(self, endpoint: str) -> list[Object]:
        """A headless Service for clients that choose replicas, a ClusterIP for the others."""
        ports = [{"name": "grpc", "port": _GRPC_PORT, "targetPort": "grpc", "appProtocol": "grpc"}]
        made = []
        for called, headless in ((self.name(endpoint), False), (self.headless(endpoint), True)):
            own = {} if headless else self.templates.service
            spec = {**(own.get("spec") or {}), "selector": dict(self.selector(endpoint))}
            spec.setdefault("ports", ports)
            if headless:
                spec["clusterIP"] = "None"
            metadata = self._metadata(endpoint, called, own.get("metadata"))
            made.append({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec})
        return made

    def headless(self, endpoint: str) -> str:
        """Name of the headless Service."""
        return f"{self.name(endpoint)}-replicas"

    def autoscaler(self, desired: Desired) -> Object | None:
        """What changes the number of replicas, from the desired one up; None for people."""
        scaling, called = self.templates.scaling, self.name(desired.name)
        metadata = self._metadata(desired.name, called, None)
        most = max(scaling.max, desired.replicas)
        if scaling.mode == "hpa":
            target = {"type": "AverageValue", "averageValue": f"{scaling.target:g}"}
            pods = {"metric": {"name": scaling.metric}, "target": target}
            return {
                "apiVersion": "autoscaling/v2",
                "kind": "HorizontalPodAutoscaler",
                "metadata": metadata,
                "spec": {
                    "scaleTargetRef": {
                        "apiVersion": "apps/v1",
                        "kind": "Deployment",
                        "name": called,
                    },
                    "minReplicas": max(1, desired.replicas),
                    "maxReplicas": most,
                    "metrics": [{"type": "Pods", "pods": pods}],
                },
            }
        if scaling.mode == "keda":
            query = f'sum({scaling.metric}{{model_name="{desired.name}"}})'
            return {
                "apiVersion": "keda.sh/v1alpha1",
                "kind": "ScaledObject",
                "metadata": metadata,
                "spec": {
                    "scaleTargetRef": {"name": called},
                    "minReplicaCount": desired.replicas,
                    "maxReplicaCount": most,
                    "triggers": [
                        {
                            "type": "prometheus",
                            "metadata": {
                                "serverAddress": scaling.prometheusAddress,
                                "query": query,
                                "threshold": f"{scaling.target:g}",
                            },
                        }
                    ],
                },
            }
        return None

    def _metadata(self, endpoint: str, called: str, template: Object | None) -> Object:
        given = template or {}
        metadata: Object = {
            "name": called,
            "labels": {
                **(given.get("labels") or {}),
                f"{PREFIX}release": label(self.release),
                f"{PREFIX}endpoint": label(endpoint),
            },
            "annotations": {**(given.get("annotations") or {}), ENDPOINT: endpoint},
        }
        if self.owner is not None:
            metadata["ownerReferences"] = [self.owner]
        return metadata


def _deliver(pod: Object, desired: Desired) -> None:
    """Say what is to be fetched; the volume's size in the template is what it may be larger."""
    artifacts = " ".join(desired.artifacts)
    for item in pod["initContainers"]:
        if item["name"] == DELIVERY:
            item.setdefault("env", []).append({"name": "ARRIERO_ARTIFACTS", "value": artifacts})
    for volume in pod.get("volumes") or ():
        if volume["name"] == DELIVERY and (volume.get("emptyDir") or {}).get("sizeLimit"):
            from kubernetes.utils.quantity import parse_quantity  # an extra

            margin = parse_quantity(volume["emptyDir"]["sizeLimit"])
            volume["emptyDir"]["sizeLimit"] = str(int(margin) + desired.size)


def _digest(template: Object) -> str:
    """Of all that needs another replica when it differs; adapters are told to living ones."""
    clean = copy.deepcopy(template)
    container = clean["spec"]["containers"][0]
    container["env"] = [e for e in container["env"] if e["name"] != ADAPTERS_VARIABLE]
    return hashlib.sha256(canonical(clean)).hexdigest()[:16]
