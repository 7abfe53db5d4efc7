"""A Kubernetes API of one namespace, over HTTP, for tests.

Responsibility: objects with versions, conflicts, selectors, watches, `/scale`,
`/status`, logs, ownership, and faults on demand; it records who asked for what.
Starts nothing by itself: `controllers` does what a cluster's controllers would.
"""

from __future__ import annotations

import copy
import re
import ssl
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import ThreadingHTTPServer
from pathlib import Path

import yaml

from arriero.testing.requests import ApiFault, Asked, Object, handler

__all__ = ["NAMESPACE", "FakeCluster", "Object"]

Listener = Callable[[str, str, Object], None]

NAMESPACE = "herd"
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_FOREGROUND = "foregroundDeletion"
# Objects whose names are DNS labels; pods take theirs from Jobs, with eleven characters more.
_SHORT_NAMES = {"services": 63, "jobs": 52}


class FakeCluster:
    """The server; use it in a `with` block.

    Args:
        tls: makes it serve https, on all addresses, as pods need it.

    Attributes:
        url: where it listens.
        port: of it.
        asked: (verb, group, resource) of every request, `deployments/scale` for
            subresources.
        logs: what pods wrote, by name; `<name>/<container>` of others than `main`,
            and `/previous` behind both of the container before.
        unserved: groups of kinds that nobody has installed.
    """

    namespace = NAMESPACE
    version = (1, 36)
    plane = None

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.asked: set[tuple[str, str, str]] = set()
        self.logs: dict[str, str] = {}
        self.unserved: set[str] = set()
        self._objects: dict[tuple[str, str], Object] = {}
        self._history: list[tuple[int, str, str, Object]] = []
        self._version = 100
        self._oldest = 0
        self._epoch = 0
        self._news = threading.Condition(threading.RLock())
        self._faults: list[tuple[str, str, ApiFault]] = []
        self._listeners: list[Listener] = []
        where = "127.0.0.1" if tls is None else "0.0.0.0"
        self._server = ThreadingHTTPServer((where, 0), handler(self))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        if tls is not None:
            # The handshake is each connection's own business: nobody holds up the others.
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
            self.url = f"https://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeCluster:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.break_watches()
        self._server.shutdown()
        self._server.server_close()

    def kubeconfig(self, path: Path) -> Path:
        """Write what `KUBECONFIG` is to name."""
        body = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "fake", "user": {"token": "a-token"}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
        }
        path.write_text(yaml.safe_dump(body))
        return path

    # What tests do

    def listen(self, listener: Listener) -> None:
        """Call it after each change with (event, plural, object); as a controller."""
        self._listeners.append(listener)

    def fail(self, verb: str, plural: str, code: int, reason: str, message: str) -> None:
        """Answer the next such request (`create`, `replace`, ...) with an error."""
        self._faults.append((verb, plural, ApiFault(code, reason, message)))

    def break_watches(self) -> None:
        """End every watch now, as a network does."""
        with self._news:
            self._epoch += 1
            self._news.notify_all()

    def forget(self) -> None:
        """Remember no change up to now: watches that ask for older ones get 410."""
        with self._news:
            self._version += 1
            self._oldest = self._version
            self._history.clear()

    def get(self, plural: str, name: str) -> Object:
        """A copy of an object; KeyError without one."""
        with self._news:
            return copy.deepcopy(self._objects[plural, name])

    def all(self, plural: str) -> list[Object]:
        """Copies of all objects of a kind, by name."""
        with self._news:
            keys = sorted(key for key in self._objects if key[0] == plural)
            return [copy.deepcopy(self._objects[key]) for key in keys]

    def put(self, plural: str, item: Object) -> Object:
        """Make an object, or write one over, as somebody else in the cluster does."""
        with self._news:
            found = self._objects.get((plural, item["metadata"]["name"]))
            return self._store("MODIFIED" if found else "ADDED", plural, copy.deepcopy(item))

    @contextmanager
    def change(self, plural: str, name: str) -> Iterator[Object]:
        """Change an object in place, in a `with` block."""
        with self._news:
            item = copy.deepcopy(self._objects[plural, name])
            yield item
            self._store("MODIFIED", plural, item)

    def remove(self, plural: str, name: str) -> None:
        """Delete an object and what it owns; fine when it is gone."""
        with self._news:
            item = self._objects.pop((plural, name), None)
            if item is None:
                return
            self._record("DELETED", plural, item)
            for key in self._dependents(item):
                if key in self._objects and not _is_process(self._objects[key]):
                    self.remove(*key)
            for key, other in list(self._objects.items()):
                going = _FOREGROUND in (other["metadata"].get("finalizers") or ())
                if going and key in self._objects and not self._dependents(other):
                    self.remove(*key)

    def event(self, kind: str, name: str, reason: str, message: str) -> None:
        """A warning about an object."""
        self.put(
            "events",
            {
                "metadata": {"name": f"{name}.{uuid.uuid4().hex[:8]}"},
                "type": "Warning",
                "reason": reason,
                "message": message,
                "lastTimestamp": _now(),
                "involvedObject": {"kind": kind, "name": name},
            },
        )

    # What requests do

    def answer(self, verb: str, path: Asked, body: Object | None) -> Object:
        """Do what a request asks."""
        with self._news:
            self.asked.add((verb, path.group, path.resource))
            for fault in self._faults:
                if fault[:2] == (verb, path.resource):
                    self._faults.remove(fault)
                    raise fault[2]
            if path.namespace != NAMESPACE:
                raise ApiFault(403, "Forbidden", f"namespace {path.namespace} is not yours")
            return getattr(self, f"_{verb}")(path, body)  # type: ignore[no-any-return]

    def _list(self, path: Asked, _: Object | None) -> Object:
        items = [item for item in self.all(path.plural) if path.selects(item)]
        return {"kind": "List", "metadata": {"resourceVersion": str(self._version)}, "items": items}

    def _get(self, path: Asked, _: Object | None) -> Object:
        return copy.deepcopy(self._find(path))

    def _create(self, path: Asked, body: Object | None) -> Object:
        assert body is not None
        item = copy.deepcopy(body)
        name = str(item["metadata"].get("name") or "")
        _validate(path.plural, item)
        if (path.plural, name) in self._objects:
            raise ApiFault(409, "AlreadyExists", f'{path.plural} "{name}" already exists')
        return self._store("ADDED", path.plural, item)

    def _update(self, path: Asked, body: Object | None) -> Object:
        assert body is not None
        found = self._find(path)
        _validate(path.plural, body)
        version = body["metadata"].get("resourceVersion")
        if version and version != found["metadata"]["resourceVersion"]:
            raise ApiFault(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {path.plural} "{path.name}": the object has '
                "been modified; please apply your changes to the latest version and try again",
            )
        item = copy.deepcopy(body)
        item["status"] = found.get("status", {})
        return self._store("MODIFIED", path.plural, item)

    def _patch(self, path: Asked, body: Object | None) -> Object:
        item = copy.deepcopy(self._find(path))
        assert body is not None
        if path.subresource == "scale":
            item["spec"]["replicas"] = body["spec"]["replicas"]
            self._store("MODIFIED", path.plural, item)
            return {"kind": "Scale", "spec": {"replicas": item["spec"]["replicas"]}}
        _merge(item, body)
        return self._store("MODIFIED", path.plural, item)

    def _delete(self, path: Asked, body: Object | None) -> Object:
        item = copy.deepcopy(self._find(path))
        if (body or {}).get("propagationPolicy") == "Foreground":
            for key in self._dependents(item):
                if not _is_process(self._objects[key]):
                    self.remove(*key)
            if self._dependents(item):
                item["metadata"].setdefault("deletionTimestamp", _now())
                item["metadata"]["finalizers"] = [_FOREGROUND]
                return self._store("MODIFIED", path.plural, item)
        self.remove(path.plural, path.name)
        return {"kind": "Status", "status": "Success"}

    def _dependents(self, item: Object) -> list[tuple[str, str]]:
        """Keys of what an object owns."""
        uid = item["metadata"]["uid"]
        return [
            key
            for key, other in self._objects.items()
            if any(o.get("uid") == uid for o in other["metadata"].get("ownerReferences") or ())
        ]

    def _find(self, path: Asked) -> Object:
        item = self._objects.get((path.plural, path.name))
        if item is None:
            raise ApiFault(404, "NotFound", f'{path.plural} "{path.name}" not found')
        return item

    def log(self, path: Asked) -> str:
        """What a pod wrote."""
        with self._news:
            self.asked.add(("get", "", "pods/log"))
            previous = path.query.get("previous") == "true"
            container = path.query.get("container", "main")
            key = path.name if container == "main" else f"{path.name}/{container}"
            key += "/previous" if previous else ""
            if key not in self.logs:
                raise ApiFault(400, "BadRequest", f"container of {path.name} has no log")
            lines = self.logs[key].splitlines()
            count = path.query.get("tailLines")
            return "\n".join(lines[-int(count) :] if count else lines) + "\n"

    def watch(self, path: Asked) -> Iterator[Object]:
        """Events after a version, until the watch is broken."""
        self.asked.add(("watch", path.group, path.resource))
        after = int(path.query.get("resourceVersion") or 0)
        epoch = self._epoch
        yield {}  # headers go out at once
        while True:
            with self._news:
                if after < self._oldest:
                    gone = ApiFault(410, "Expired", f"too old resource version: {after}")
                    yield {"type": "ERROR", "object": gone.status()}
                    return
                news = [h for h in self._history if h[0] > after]
                if not news:
                    self._news.wait(0.5)
                    if self._epoch != epoch:
                        return
                    continue
            for version, kind, plural, item in news:
                after = version
                if plural == path.plural and path.selects(item):
                    yield {"type": kind, "object": item}

    # Keeping

    def _store(self, kind: str, plural: str, item: Object) -> Object:
        metadata = item["metadata"]
        old = self._objects.get((plural, metadata["name"]))
        metadata.setdefault("namespace", NAMESPACE)
        if old is None:
            metadata["uid"] = str(uuid.uuid4())
            metadata["creationTimestamp"] = _now()
            metadata["generation"] = 1
        else:
            for key in ("uid", "creationTimestamp"):
                metadata[key] = old["metadata"][key]
            changed = old.get("spec") != item.get("spec")
            metadata["generation"] = old["metadata"]["generation"] + changed
        self._objects[plural, metadata["name"]] = item
        self._record(kind, plural, item)
        return copy.deepcopy(item)

    def _record(self, kind: str, plural: str, item: Object) -> None:
        self._version += 1
        item["metadata"]["resourceVersion"] = str(self._version)
        seen = copy.deepcopy(item)
        self._history.append((self._version, kind, plural, seen))
        self._news.notify_all()
        for listener in self._listeners:
            threading.Thread(target=listener, args=(kind, plural, seen), daemon=True).start()


def _validate(plural: str, item: Object) -> None:
    """The rules of names and labels that a real API server has, and Job's own."""
    metadata = item["metadata"]
    name = str(metadata.get("name") or "")
    problems = []
    if not _NAME.fullmatch(name) or len(name) > _SHORT_NAMES.get(plural, 253):
        problems.append(f"metadata.name: {name!r}")
    if plural == "services" and not name[:1].isalpha():
        problems.append(f"metadata.name: {name!r} must start with a letter")
    labels = dict(metadata.get("labels") or {})
    spec = item.get("spec") or {}
    template = spec.get("template") if isinstance(spec.get("template"), dict) else None
    if template is not None:
        labels.update(template.get("metadata", {}).get("labels") or {})
    problems += [f"metadata.labels: {v!r}" for v in labels.values() if not _LABEL.fullmatch(str(v))]
    if plural == "jobs" and (template or {}).get("spec", {}).get("restartPolicy") != "Never":
        problems.append("spec.template.spec.restartPolicy: Required value")
    if plural == "deployments":
        wanted = spec.get("selector", {}).get("matchLabels") or {}
        if not wanted or not wanted.items() <= (labels or {}).items():
            problems.append("spec.selector: does not match template labels")
    if problems:
        raise ApiFault(422, "Invalid", f'{plural} "{name}" is invalid: {"; ".join(problems)}')


def _is_process(pod: Object) -> bool:
    """A Job's pod that runs: it goes when its process did."""
    job = "batch.kubernetes.io/job-name" in (pod["metadata"].get("labels") or {})
    return job and pod.get("status", {}).get("phase") == "Running"


def _merge(item: Object, patch: Object) -> None:
    """RFC 7386."""
    for key, value in patch.items():
        if value is None:
            item.pop(key, None)
        elif isinstance(value, dict) and isinstance(item.get(key), dict):
            _merge(item[key], value)
        else:
            item[key] = copy.deepcopy(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
