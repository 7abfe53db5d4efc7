"""One namespace of a real API server, with the surface of `FakeCluster`.

Responsibility: what tests do to a cluster from outside (read, change, remove, break
connections), so that one test can run against both. Starts no pods: `node` does.
"""

from __future__ import annotations

import copy
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arriero.testing.control_plane import ApiFailure, ControlPlane

Object = dict[str, Any]

_GROUPS = {
    "jobs": "apis/batch/v1",
    "deployments": "apis/apps/v1",
    "replicasets": "apis/apps/v1",
    "horizontalpodautoscalers": "apis/autoscaling/v2",
    "roles": "apis/rbac.authorization.k8s.io/v1",
    "rolebindings": "apis/rbac.authorization.k8s.io/v1",
}
# What a namespace has before anybody makes anything.
_GIVEN = ("kubernetes", "kube-root-ca.crt")
_SECONDS = 60.0


class RealCluster:
    """A new namespace; use it in a `with` block.

    Attributes:
        plane: whose API server it is.
        namespace: a name of its own.
        version: of the API server.
    """

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.version = plane.version
        self.namespace = f"herd-{secrets.token_hex(4)}"

    def __enter__(self) -> RealCluster:
        self.plane.ask("POST", "/api/v1/namespaces", {"metadata": {"name": self.namespace}})
        deadline = time.monotonic() + _SECONDS
        while True:  # no pod is made before the account that it runs as
            self.plane.check()
            try:
                self.plane.ask("GET", self.path("serviceaccounts", "default"))
                return self
            except ApiFailure as failure:
                if failure.code != 404 or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        self.plane.ask("DELETE", f"/api/v1/namespaces/{self.namespace}")

    def kubeconfig(self, path: Path, *, token: str = "") -> Path:
        """Write what `KUBECONFIG` is to name."""
        return self.plane.kubeconfig(path, namespace=self.namespace, token=token)

    def path(self, plural: str, name: str = "", subresource: str = "") -> str:
        """Of a kind of object here, or of one."""
        parts = [_GROUPS.get(plural, "api/v1"), "namespaces", self.namespace, plural]
        return "/" + "/".join([*parts, *filter(None, (name, subresource))])

    def get(self, plural: str, name: str) -> Object:
        """An object; KeyError without one."""
        try:
            return self.plane.ask("GET", self.path(plural, name))
        except ApiFailure as failure:
            if failure.code == 404:
                raise KeyError(name) from failure
            raise

    def all(self, plural: str) -> list[Object]:
        """All objects of a kind, by name; not what the cluster itself made."""
        items = self.plane.ask("GET", self.path(plural))["items"]
        return [item for item in items if item["metadata"]["name"] not in _GIVEN]

    def put(self, plural: str, item: Object) -> Object:
        """Make an object, or write one over, as somebody else in the cluster does."""
        body = copy.deepcopy(item)
        try:
            made = self.plane.ask("POST", self.path(plural), body)
        except ApiFailure as failure:
            if failure.code != 409:
                raise
            made = self.plane.ask("PUT", self.path(plural, item["metadata"]["name"]), body)
        if item.get("status"):
            return self.state(plural, made["metadata"]["name"], item["status"])
        return made

    def state(self, plural: str, name: str, status: Object) -> Object:
        """Change fields of an object's status, as a kubelet or a controller does."""
        return self.plane.ask("PATCH", self.path(plural, name, "status"), {"status": status})

    @contextmanager
    def change(self, plural: str, name: str) -> Iterator[Object]:
        """Change an object in place, in a `with` block."""
        item = self.get(plural, name)
        before = copy.deepcopy(item)
        yield item
        if item.get("status") != before.get("status"):
            self.state(plural, name, item["status"])
        if item["spec"] != before["spec"] or item["metadata"] != before["metadata"]:
            self.plane.ask(
                "PATCH",
                self.path(plural, name),
                {"metadata": item["metadata"], "spec": item["spec"]},
            )

    def remove(self, plural: str, name: str) -> None:
        """Delete an object and what it owns, as `kubectl delete` does; fine when it is gone."""
        try:
            body = {"propagationPolicy": "Background"}
            self.plane.ask("DELETE", self.path(plural, name), body)
        except ApiFailure as failure:
            if failure.code != 404:
                raise
