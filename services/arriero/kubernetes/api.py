"""Objects of one namespace, over HTTP.

Responsibility: read, make, change, delete and watch, as dicts; every failure is
an `ArrieroError`. Blocks. Does not know what any object is for.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from arriero.errors import (
    Aborted,
    AlreadyExists,
    ArrieroError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)

Object = dict[str, Any]

GONE = "GONE"
QUOTA = "QUOTA_EXCEEDED"
_CONNECT_SECONDS = 5.0
_READ_SECONDS = 30.0
# The server ends a watch by then; reading waits a little longer, since a connection
# that a network dropped without a word says nothing either.
WATCH_SECONDS = 90
_CONFLICTS = 8
_JSON = "application/json"
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


@dataclass(frozen=True, slots=True)
class Resource:
    """A kind of object, as its path has it: `apis/batch/v1`, `jobs`."""

    base: str
    plural: str


PODS = Resource("api/v1", "pods")
SERVICES = Resource("api/v1", "services")
EVENTS = Resource("api/v1", "events")
CONFIG_MAPS = Resource("api/v1", "configmaps")
JOBS = Resource("apis/batch/v1", "jobs")
DEPLOYMENTS = Resource("apis/apps/v1", "deployments")
AUTOSCALERS = Resource("apis/autoscaling/v2", "horizontalpodautoscalers")
SCALED_OBJECTS = Resource("apis/keda.sh/v1alpha1", "scaledobjects")


class Api:
    """Calls to one cluster's API about one namespace; safe to share between threads.

    Args:
        client: `kubernetes.client.ApiClient`, configured.
        namespace: that everything is in.
    """

    def __init__(self, client: Any, namespace: str) -> None:
        self._client = client
        self.namespace = namespace

    @classmethod
    def connect(cls, namespace: str, env: Mapping[str, str] | None = None) -> Api:
        """With the pod's own service account, or with what `KUBECONFIG` names.

        Raises:
            FailedPrecondition: the package is missing, or neither is there.
        """
        env = os.environ if env is None else env
        try:
            from kubernetes import client, config
        except ImportError as error:
            raise FailedPrecondition(
                "the package `kubernetes` is not installed; install arriero[kubernetes]"
            ) from error
        configuration = client.Configuration()
        try:
            if env.get("KUBECONFIG"):
                config.load_kube_config(env["KUBECONFIG"], client_configuration=configuration)
            elif _SERVICE_ACCOUNT.exists():
                config.load_incluster_config(client_configuration=configuration)
            else:
                raise config.ConfigException(
                    f"there is no {_SERVICE_ACCOUNT} and KUBECONFIG is not set"
                )
        except (config.ConfigException, OSError, ValueError) as error:
            raise FailedPrecondition(
                f"no access to a cluster: {error}; run in a pod with a service account, or set "
                "KUBECONFIG",
                reason="NO_CLUSTER",
            ) from error
        return cls(client.ApiClient(configuration), namespace)

    # Reading

    def get(self, resource: Resource, name: str) -> Object:
        """One object.

        Raises:
            NotFound: there is none.
        """
        return self._json("GET", self._path(resource, name))

    def find(self, resource: Resource, name: str) -> Object | None:
        """One object; None where there is none."""
        try:
            return self.get(resource, name)
        except NotFound:
            return None

    def list(
        self, resource: Resource, *, labels: str = "", fields: str = ""
    ) -> tuple[list[Object], str]:
        """All objects of two selectors, and the version of that list."""
        query = {"labelSelector": labels, "fieldSelector": fields}
        answer = self._json("GET", self._path(resource), query)
        return list(answer.get("items") or ()), str(answer["metadata"].get("resourceVersion", ""))

    def watch(
        self, resource: Resource, version: str, *, labels: str = ""
    ) -> Iterator[tuple[str, Object]]:
        """What happens after a version: (`ADDED` | `MODIFIED` | `DELETED` | `BOOKMARK`, object).

        Ends when the server ends it, after a minute or two.

        Raises:
            OutOfRange: the server does not remember that version any more; list again.
            Unavailable: the connection broke.
        """
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "labelSelector": labels,
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        response = self._send(
            "GET", self._path(resource), query, timeout=(_CONNECT_SECONDS, WATCH_SECONDS + 15)
        )
        with _translated(), contextlib.closing(response):
            for line in _lines(response):
                event = json.loads(line)
                kind, item = str(event["type"]), event["object"]
                if kind == "ERROR":
                    raise _error(int(item.get("code", 500)), item)
                yield kind, item

    def log(
        self, pod: str, *, container: str = "", previous: bool = False, lines: int | None = None
    ) -> str:
        """What a container wrote, a pod's only one if none is named; at most a mebibyte of it.

        Raises:
            NotFound, InvalidArgument: there is nothing (any more, or yet).
        """
        query = {"limitBytes": str(1 << 20)}
        if container:
            query["container"] = container
        if previous:
            query["previous"] = "true"
        if lines is not None:
            query["tailLines"] = str(lines)
        return self._call("GET", self._path(PODS, pod, "log"), query).decode(errors="replace")

    def owner(self, config_map: str) -> Object:
        """An `ownerReference` to a ConfigMap: what has it goes when the ConfigMap goes.

        Raises:
            NotFound: there is no such ConfigMap.
        """
        found = self.get(CONFIG_MAPS, config_map)
        uid = found["metadata"]["uid"]
        return {"apiVersion": "v1", "kind": "ConfigMap", "name": config_map, "uid": uid}

    # Changing

    def create(self, resource: Resource, body: Object) -> Object:
        """Make an object.

        Raises:
            AlreadyExists: there is one of that name.
            ResourceExhausted: over a quota (reason `QUOTA_EXCEEDED`).
            InvalidArgument: the API does not take it.
        """
        return self._json("POST", self._path(resource), body=body)

    def replace(self, resource: Resource, body: Object) -> Object:
        """Put an object in the place of the version that it names.

        Raises:
            Aborted: somebody changed it meanwhile.
        """
        return self._json("PUT", self._path(resource, body["metadata"]["name"]), body=body)

    def patch(
        self, resource: Resource, name: str, body: Object, *, subresource: str = ""
    ) -> Object:
        """Change some fields (a JSON merge patch: null removes)."""
        path = self._path(resource, name, subresource)
        return self._json("PATCH", path, body=body, content="application/merge-patch+json")

    def delete(self, resource: Resource, name: str, *, dependents_first: bool = False) -> bool:
        """Delete an object and, in time, what it owns; whether there was one.

        With `dependents_first` it stays, being deleted, until what it owns is gone.
        """
        options = {"propagationPolicy": "Foreground" if dependents_first else "Background"}
        try:
            self._json("DELETE", self._path(resource, name), body=options)
        except NotFound:
            return False
        return True

    def ensure(
        self, resource: Resource, body: Object, keep: Callable[[Object, Object], None]
    ) -> None:
        """Make an object, or bring the one that exists to what it should be.

        Read, change, write again: where somebody else was faster (409) it is read anew.

        Args:
            resource: of what kind.
            body: what it should be.
            keep: called with the existing object and a copy of `body`, to take over
                what others own.

        Raises:
            Aborted: somebody else is faster every time.
            ArrieroError: as `create`.
        """
        name = body["metadata"]["name"]
        for left in reversed(range(_CONFLICTS)):
            found = self.find(resource, name)
            try:
                if found is None:
                    self.create(resource, body)
                    return
                wanted = json.loads(json.dumps(body))
                wanted["metadata"]["resourceVersion"] = found["metadata"]["resourceVersion"]
                keep(found, wanted)
                self.replace(resource, wanted)
                return
            except (Aborted, AlreadyExists, NotFound):
                if not left:
                    raise

    # The wire

    def _path(self, resource: Resource, name: str = "", subresource: str = "") -> str:
        parts = [resource.base, "namespaces", quote(self.namespace, safe=""), resource.plural]
        if name:
            parts.append(quote(name, safe=""))
        if subresource:
            parts.append(subresource)
        return "/" + "/".join(parts)

    def _json(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = _JSON,
    ) -> Object:
        answer: Object = json.loads(self._call(method, path, query, body, content))
        return answer

    def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = _JSON,
    ) -> bytes:
        response = self._send(method, path, query, body, content)
        with _translated(), contextlib.closing(response):
            data: bytes = response.read()
            return data

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content: str = _JSON,
        timeout: tuple[float, float] = (_CONNECT_SECONDS, _READ_SECONDS),
    ) -> Any:
        import urllib3

        given = {key: value for key, value in (query or {}).items() if value}
        configuration = self._client.configuration
        headers = {"Accept": "application/json", "Content-Type": content}
        # Read anew each time: a service account's token is replaced every hour.
        token = configuration.auth_settings().get("BearerToken")
        if token and token["value"]:
            headers[token["key"]] = token["value"]
        with _translated():
            response = self._client.rest_client.pool_manager.request(
                method,
                f"{configuration.host}{path}{f'?{urlencode(given)}' if given else ''}",
                body=json.dumps(body) if body is not None else None,
                headers=headers,
                timeout=urllib3.Timeout(connect=timeout[0], read=timeout[1]),
                preload_content=False,
                retries=False,
            )
            if response.status >= 300:
                data = response.read()
                response.close()
                status = _status(data)
                if response.status == 404 and "kind" not in status:
                    raise NotFound(_unserved(path), reason="NO_SUCH_API")
                raise _error(response.status, status)
        return response


def _lines(response: Any) -> Iterator[bytes]:
    """Lines of a body as they come; half a line at the end is a broken connection."""
    rest = b""
    for chunk in response.stream(amt=None, decode_content=False):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line for line in whole if line.strip())
    if rest.strip():
        raise Unavailable("the cluster's API ended a watch in the middle of a line")


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    import urllib3

    try:
        yield
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise Unavailable(f"the cluster's API cannot be reached: {error}") from error


def _status(data: bytes) -> Object:
    try:
        answer = json.loads(data)
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {"message": data[:200].decode(errors="replace")}


def _unserved(path: str) -> str:
    """Of a path that a server has nothing at: it answers so without a `Status`."""
    base, _, rest = path.partition("/namespaces/")
    plural = (rest.split("/") + [""])[1]
    return (
        f"the cluster's API serves no {plural} of {base.removeprefix('/apis/')}; install what "
        "defines them, or turn off what needs them"
    )


def _error(code: int, status: Mapping[str, Any]) -> ArrieroError:
    """What an answer means, in our tree."""
    said = str(status.get("message") or status.get("reason") or f"HTTP {code}")
    message = f"the cluster's API says: {said}"
    if code == 401:
        return FailedPrecondition(
            f"{message}; the service account's token is not accepted", reason="CLUSTER_TOKEN"
        )
    if code == 403:
        if "exceeded quota" in said or "insufficient quota" in said:
            return ResourceExhausted(message, reason=QUOTA)
        return PermissionDenied(
            f"{message}; the chart's Role has to allow it", reason="CLUSTER_FORBIDDEN"
        )
    if code == 404:
        return NotFound(message)
    if code == 409:
        taken = status.get("reason") == "AlreadyExists"
        return AlreadyExists(message) if taken else Aborted(message, reason="CONFLICT")
    if code == 410:
        return OutOfRange(message, reason=GONE)
    if code in (400, 405, 415, 422):
        return InvalidArgument(message, reason="CLUSTER_REFUSES")
    return Unavailable(message)
