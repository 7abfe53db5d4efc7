"""A small hub: what huggingface_hub asks one for, over HTTP.

Responsibility: serve files of repositories at one commit, some behind a token.
Does not know any client.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

__all__ = ["COMMIT", "TOKEN", "serving_hub"]

COMMIT = "c" * 40
# What opens a repository whose name begins with `gated`.
TOKEN = "t0ken"

# Files by path, by repository.
Repositories = Mapping[str, Mapping[str, bytes]]
_API = re.compile(r"/api/(?:models|datasets)/(?P<name>[^/]+/[^/]+)(?P<rest>/.*)?")
_FILE = re.compile(r"/(?:datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.*)")


@contextmanager
def serving_hub(repositories: Repositories) -> Iterator[str]:
    """A hub's URL, for `HF_ENDPOINT`; models and data sets are served alike."""

    class Handler(_Hub):
        held = repositories

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Hub(BaseHTTPRequestHandler):
    held: ClassVar[Repositories] = {}

    def do_HEAD(self) -> None:
        """As GET, without the body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer one request."""
        path = self.path.partition("?")[0]
        found = _API.fullmatch(path) or _FILE.fullmatch(path)
        files = self.held.get(found["name"]) if found else None
        if found is None or files is None:
            return self._answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        bearer = str(self.headers.get("authorization"))
        if found["name"].partition("/")[2].startswith("gated") and bearer != f"Bearer {TOKEN}":
            return self._answer(b'{"error": "gated"}', 403, {"X-Error-Code": "GatedRepo"})
        if found.re is _FILE:
            return self._file(files.get(found["path"]))
        rest = found["rest"] or ""
        if rest.endswith(f"/tree/{COMMIT}"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in files.items()
            ]
            return self._answer(
                json.dumps(tree).encode(), 200, {"Content-Type": "application/json"}
            )
        if rest.startswith("/revision/") and rest.removeprefix("/revision/") not in (
            *("main", COMMIT),
        ):
            return self._answer(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        info = {"id": found["name"], "sha": COMMIT, "siblings": siblings, "tags": []}
        return self._answer(json.dumps(info).encode())

    def _file(self, data: bytes | None) -> None:
        if data is None:
            return self._answer(b"", 404, {"X-Error-Code": "EntryNotFound"})
        tag = hashlib.sha256(data).hexdigest()
        return self._answer(data, 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'})

    def _answer(self, data: bytes, code: int = 200, headers: Mapping[str, str] = {}) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""
