"""What the chart refuses when it can ask a cluster: Secrets and claims that are missing.

Stands in for a cluster of one namespace, as far as `helm template --dry-run=server` asks.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_KINDS = {
    "serviceaccounts": "ServiceAccount",
    "secrets": "Secret",
    "persistentvolumeclaims": "PersistentVolumeClaim",
}
_THERE: dict[str, dict[str, Any]] = {
    "serviceaccounts/default": {},
    "secrets/half": {"data": {"tls.crt": "eA=="}},
    "persistentvolumeclaims/once": {"spec": {"accessModes": ["ReadWriteOnce"]}},
}
# Values, and what has to be said about them.
_REFUSED = [
    ("auth.existingSecret=nope", "names the Secret nope, which is not in the namespace models"),
    ("tls.enabled=true,tls.existingSecret=half", "no key tls.key; it has: tls.crt"),
    ("imagePullSecrets[0]=nope", "imagePullSecrets names the Secret nope"),
    ("sources.existingSecret=nope", "sources.existingSecret names the Secret nope"),
    ("store.claim.existingClaim=nope", "names the claim nope"),
    ("store.claim.existingClaim=once", "offers ReadWriteOnce only"),
    ("database.sqlite.existingClaim=nope", "database.sqlite.existingClaim names the claim nope"),
]


def wrong(helm: str, chart: Path) -> Iterator[str]:
    """What is accepted, or refused in other words."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cluster = ["--dry-run=server", "--kube-apiserver", f"http://127.0.0.1:{server.server_port}"]
    command = [helm, "template", "arriero", str(chart), "--namespace", "models", *cluster]
    for values, said in _REFUSED:
        ended = subprocess.run([*command, "--set", values], capture_output=True, text=True)
        if said not in ended.stderr:
            yield f"{values}: expected {said!r}, said {ended.stderr.strip()!r}"
    off = [*command, "--set", "auth.existingSecret=nope,checkExisting=false"]
    ended = subprocess.run(off, capture_output=True, text=True)
    if "names the Secret" in ended.stderr:
        yield f"checkExisting=false: {ended.stderr.strip()!r}"
    server.shutdown()
    server.server_close()


class _Api(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        code, answer = self._answer(self.path.partition("?")[0])
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, path: str) -> tuple[int, dict[str, Any]]:
        if path == "/version":
            return 200, {"major": "1", "minor": "36", "gitVersion": "v1.36.0"}
        if path == "/api":
            return 200, {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            return 200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": []}
        if path == "/api/v1":
            made = [
                {"name": plural, "singularName": "", "namespaced": True, "kind": kind}
                | {"verbs": ["get", "list"]}
                for plural, kind in _KINDS.items()
            ]
            return 200, {"kind": "APIResourceList", "groupVersion": "v1", "resources": made}
        key = path.removeprefix("/api/v1/namespaces/models/")
        if key in _THERE:
            plural, _, name = key.partition("/")
            found = {"kind": _KINDS[plural], "apiVersion": "v1", "metadata": {"name": name}}
            return 200, {**found, **_THERE[key]}
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
        return 404, {**status, "reason": "NotFound", "code": 404, "message": f"{path} not found"}
