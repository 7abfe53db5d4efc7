"""Objects as the cluster has them, followed in a thread.

Responsibility: list once, watch from there, list again when the server forgot;
tell of every change. Does not know what the objects are.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from arriero.errors import ArrieroError, OutOfRange, PermissionDenied
from arriero.kubernetes.api import Api, Object, Resource

_log = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0


class Informer:
    """The objects of a kind and a label selector, by name.

    Args:
        api: where they are.
        resource: of what kind.
        labels: selector.
        changed: called in the informer's thread after each change, with the names.
    """

    def __init__(
        self,
        api: Api,
        resource: Resource,
        labels: str,
        changed: Callable[[set[str]], None] = lambda names: None,
    ) -> None:
        self._api = api
        self._resource = resource
        self._labels = labels
        self._changed = changed
        self._objects: dict[str, Object] = {}
        self._lock = threading.Lock()
        self._synced = threading.Event()
        self._stop = threading.Event()
        self.problem: ArrieroError | None = None
        self._thread = threading.Thread(
            target=self._run, name=f"watch-{resource.plural}", daemon=True
        )

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def stop(self) -> None:
        """Leave soon; a watch that has no news ends with the process."""
        self._stop.set()

    def synced(self, timeout: float) -> bool:
        """Whether everything was listed once, within `timeout` seconds."""
        return self._synced.wait(timeout)

    def get(self, name: str) -> Object | None:
        """An object as it was last seen."""
        with self._lock:
            return self._objects.get(name)

    def all(self) -> list[Object]:
        """All of them, by name."""
        with self._lock:
            return [self._objects[name] for name in sorted(self._objects)]

    def labelled(self, key: str, value: str) -> list[Object]:
        """Those that carry a label, by name."""
        return [o for o in self.all() if (o["metadata"].get("labels") or {}).get(key) == value]

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        version = ""
        while not self._stop.is_set():
            try:
                if not version:
                    version = self._list()
                    self.problem = None
                for kind, item in self._api.watch(self._resource, version, labels=self._labels):
                    version = str(item["metadata"]["resourceVersion"])
                    pause = _FIRST_PAUSE
                    self._take(kind, item)
                    if self._stop.is_set():
                        return
            except OutOfRange:
                version = ""  # 410: too old; everything anew
                continue
            except ArrieroError as error:
                self.problem = error
                level = logging.ERROR if isinstance(error, PermissionDenied) else logging.INFO
                _log.log(level, "watching %s: %s", self._resource.plural, error.message)
            except Exception:
                # What cannot be read must not end the watch: everything anew.
                _log.exception("watching %s failed", self._resource.plural)
                version = ""
            self._stop.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _list(self) -> str:
        items, version = self._api.list(self._resource, labels=self._labels)
        found = {item["metadata"]["name"]: item for item in items}
        with self._lock:
            names = set(found) | set(self._objects)
            self._objects = found
        self._synced.set()
        if names:
            self._changed(names)
        return version

    def _take(self, kind: str, item: Object) -> None:
        if kind == "BOOKMARK":
            return
        name = item["metadata"]["name"]
        with self._lock:
            if kind == "DELETED":
                self._objects.pop(name, None)
            else:
                self._objects[name] = item
        self._changed({name})
