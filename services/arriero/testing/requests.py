"""Requests to the fake API server: what they ask, and how answers go out.

Responsibility: paths, queries, selectors, tokens, errors as `Status`, watches in
chunks. Does not know what is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

__all__ = ["ApiFault", "Asked", "Object", "handler"]

Object = dict[str, Any]

_PATH = re.compile(
    r"/(?P<base>api/v1|apis/[^/]+/[^/]+)/namespaces/(?P<ns>[^/]+)/(?P<plural>[^/]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<sub>[^/]+))?"
)


class ApiFault(Exception):
    """What the server answers instead; `reason` as Kubernetes' own."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason, self.message = code, reason, message

    def status(self) -> Object:
        """A `Status` object."""
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "code": self.code,
            "reason": self.reason,
            "message": self.message,
        }


class Asked:
    """A request's path and query."""

    def __init__(self, target: str) -> None:
        url = urlsplit(target)
        match = _PATH.fullmatch(url.path)
        if match is None:
            raise ApiFault(404, "NotFound", f"the server could not find {url.path}")
        base = match["base"]
        self.group = "" if base == "api/v1" else base.split("/")[1]
        self.namespace, self.plural = match["ns"], match["plural"]
        self.name, self.subresource = unquote(match["name"] or ""), match["sub"] or ""
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}

    @property
    def resource(self) -> str:
        """As roles name it."""
        return f"{self.plural}/{self.subresource}" if self.subresource else self.plural

    def selects(self, item: Object) -> bool:
        """Whether both selectors take an object."""
        labels = item["metadata"].get("labels") or {}
        for part in filter(None, self.query.get("labelSelector", "").split(",")):
            key, equals, value = part.partition("=")
            if key not in labels or (equals and labels[key] != value):
                return False
        for part in filter(None, self.query.get("fieldSelector", "").split(",")):
            key, _, value = part.partition("=")
            found: Any = item
            for step in key.split("."):
                found = (found or {}).get(step)
            if found != value:
                return False
        return True


class Answering(Protocol):
    """What requests are answered by: see `FakeCluster`."""

    unserved: set[str]

    def answer(self, verb: str, path: Asked, body: Object | None) -> Object: ...

    def log(self, path: Asked) -> str: ...

    def watch(self, path: Asked) -> Iterator[Object]: ...


def handler(cluster: Answering) -> type[BaseHTTPRequestHandler]:
    """The HTTP side of a cluster."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer("get")

        def do_POST(self) -> None:
            self._answer("create")

        def do_PUT(self) -> None:
            self._answer("update")

        def do_PATCH(self) -> None:
            self._answer("patch")

        def do_DELETE(self) -> None:
            self._answer("delete")

        def _answer(self, verb: str) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            data = self.rfile.read(length)
            try:
                # In a pod the client writes `bearer`: RFC 9110 has it in any case.
                scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
                if (scheme.lower(), token) != ("bearer", "a-token"):
                    raise ApiFault(401, "Unauthorized", "Unauthorized")
                path = Asked(self.path)
                if path.group in cluster.unserved:  # no `Status`: nobody is there to make one
                    self._send(404, b"404 page not found\n", "text/plain")
                    return
                if path.subresource == "log":
                    self._send(200, cluster.log(path).encode(), "text/plain")
                    return
                if path.query.get("watch") == "true":
                    self._watch(path)
                    return
                if verb == "get" and not path.name:
                    verb = "list"
                answer = cluster.answer(verb, path, json.loads(data) if data else None)
                self._send(201 if verb == "create" else 200, json.dumps(answer).encode())
            except ApiFault as fault:
                self._send(fault.code, json.dumps(fault.status()).encode())
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def _watch(self, path: Asked) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in cluster.watch(path):
                if event:
                    line = json.dumps(event).encode() + b"\n"
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")
            self.wfile.flush()

        def _send(self, code: int, data: bytes, kind: str = "application/json") -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    return Handler
