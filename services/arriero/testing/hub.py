"""A small hub on a port of its own: enough of the Hub's HTTP API to fetch and to push.

Responsibility: repositories in memory, ranges, connections that break, tokens,
the upload of large files by Git LFS and of small ones in the commit. Does not
speak the Xet protocol (set `HF_HUB_DISABLE_XET=1`), nor keep history: the newest
commit is all there is.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import yaml

__all__ = ["COMMIT", "TOKEN", "FakeHub", "Repository", "serving_hub"]

COMMIT = "c" * 40
# What may write, and read what is gated.
TOKEN = "t0ken"
# Files of at least so many bytes go by LFS.
_LARGE = 10_000


@dataclass
class Repository:
    """Files of the newest commit, and what is needed to see and change them."""

    files: dict[str, bytes] = field(default_factory=dict)
    commit: str = COMMIT
    private: bool = False
    gated: bool = False
    message: str = ""


class FakeHub:
    """A hub; a context manager.

    Attributes:
        url: for `HF_ENDPOINT`.
        repositories: by `org/name`.
        token: that may write, and read what is gated.
        break_after: bytes of a file's answer after which the connection breaks; one
            breaks, then they hold.
        hold_after: bytes of a file's answer after which nothing more comes; once, until
            the client is gone. `held` is set then.
        ranges: the `Range` headers of requests for files.
        uploads: sha256 of the objects that came by LFS, each time.
        refuse: answer uploads with this status.
        refuse_reads: answer everything that is read with this status.
    """

    def __init__(self, token: str = TOKEN) -> None:
        self.repositories: dict[str, Repository] = {}
        self.token = token
        self.break_after: int | None = None
        self.hold_after: int | None = None
        self.held = threading.Event()
        self.ranges: list[str] = []
        self.uploads: list[str] = []
        self.refuse = 0
        self.refuse_reads = 0
        self.objects: dict[str, bytes] = {}
        hub = self

        class Handler(_Handler):
            """Of this hub."""

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving_hub(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[str]:
    """A hub's URL, for `HF_ENDPOINT`; models and data sets are served alike.

    Args:
        repositories: files by path, by repository; those whose name begins with
            `gated` want the token.
    """
    with FakeHub() as hub:
        for name, files in repositories.items():
            gated = name.partition("/")[2].startswith("gated")
            hub.repositories[name] = Repository(dict(files), gated=gated)
        yield hub.url


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        """As GET, without the body."""
        self.do_GET()

    def do_GET(self) -> None:
        """What snapshot_download asks for."""
        if self.hub.refuse_reads:
            self._answer(self.hub.refuse_reads, {})
            return
        path = self.path.partition("?")[0].strip("/")
        parts = path.split("/")
        if parts[0] == "datasets":  # served as models are
            parts = parts[1:]
        if path.startswith(("api/models/", "api/datasets/")):
            self._information("/".join(parts[2:4]), parts[4:])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._answer(404, {}, {"X-Error-Code": "RepoNotFound"})

    def _repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self._authorized):
            self._answer(404, {}, {"X-Error-Code": "RepoNotFound"})
            return None
        if found.gated and not self._authorized:
            self._answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            return None
        return found

    @property
    def _authorized(self) -> bool:
        return self.headers.get("authorization") == f"Bearer {self.hub.token}"

    def _information(self, name: str, rest: list[str]) -> None:
        found = self._repository(name)
        if found is None:
            return
        if rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
                for path, data in found.files.items()
            ]
            self._answer(200, tree)
            return
        if rest[:1] == ["revision"] and rest[1:] not in (["main"], [found.commit]):
            self._answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = [
            {"rfilename": path, "size": len(data), "blobId": "0" * 40}
            for path, data in found.files.items()
        ]
        self._answer(
            200,
            {
                "id": name,
                "sha": found.commit,
                "siblings": siblings,
                "tags": [],
                "private": found.private,
            },
        )

    def _file(self, name: str, path: str) -> None:
        found = self._repository(name)
        if found is None:
            return
        data = found.files.get(path)
        if data is None:
            self._answer(404, {}, {"X-Error-Code": "EntryNotFound"})
            return
        start = 0
        wanted = self.headers.get("range", "")
        if self.command == "GET":
            self.hub.ranges.append(wanted)
        if wanted.startswith("bytes="):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        headers = {
            "X-Repo-Commit": found.commit,
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if start else 200, data[start:], headers, breaks=True)

    def do_POST(self) -> None:
        """What create_repo and create_commit send."""
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = self.path.partition("?")[0].strip("/")
        parts = path.split("/")
        if path == "api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif not self._authorized:
            self._answer(401, {"error": "Invalid username or password."})
        elif self.hub.refuse:
            self._answer(self.hub.refuse, {"error": "refused"})
        elif path == "api/repos/create":
            self._create(json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif len(parts) > 5 and parts[4] == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= _LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            self._answer(200, {"files": modes})
        elif len(parts) > 5 and parts[4] == "commit":
            self._commit("/".join(parts[2:4]), body.decode())
        else:
            self._answer(404, {"error": f"no {path}"})

    def _validate(self, card: str) -> None:
        """The front matter of a card must be YAML, and a base a repository's name."""
        errors = []
        try:
            front = yaml.safe_load(card.split("---\n")[1])
            if "/" not in front.get("base_model", "a/b"):
                errors.append({"message": '"base_model" is not a repository'})
        except (yaml.YAMLError, IndexError, AttributeError) as error:
            errors.append({"message": f"not YAML: {error}"})
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{name}", "id": name, "name": name}
        if name in self.hub.repositories:
            self._answer(409, {"error": "You already created this model repo", **url})
            return
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private=bool(private))
        self._answer(200, url)

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for item in wanted["objects"]:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/lfs/{item['oid']}"
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:
        """The content of one large file."""
        data = self.rfile.read(int(self.headers.get("content-length") or 0))
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(data).hexdigest() != oid:
            self._answer(400, {"error": "another sha256"})
            return
        self.hub.objects[oid] = data
        self.hub.uploads.append(oid)
        self._answer(200, {})

    def _commit(self, name: str, body: str) -> None:
        found = self._repository(name)
        if found is None:
            return
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                found.message = value["summary"]
            elif entry["key"] == "file":
                found.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                found.files[value["path"]] = self.hub.objects[value["oid"]]
        content = json.dumps({k: hashlib.sha256(v).hexdigest() for k, v in found.files.items()})
        found.commit = hashlib.sha1(content.encode()).hexdigest()
        url = f"{self.hub.url}/{name}/commit/{found.commit}"
        self._answer(200, {"commitOid": found.commit, "commitUrl": url, "success": True})

    def _answer(self, code: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(
            code,
            json.dumps(value).encode(),
            {"Content-Type": "application/json", **(headers or {})},
        )

    def _send(
        self, code: int, data: bytes, headers: dict[str, str], *, breaks: bool = False
    ) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "GET" and self.command != "POST" and self.command != "PUT":
            return
        limit = self.hub.break_after
        if breaks and limit is not None and len(data) > limit:
            self.hub.break_after = None
            self.wfile.write(data[:limit])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        hold = self.hub.hold_after
        if breaks and hold is not None and len(data) > hold:
            self.hub.hold_after = None
            self.wfile.write(data[:hold])
            self.wfile.flush()
            self.hub.held.set()
            with suppress(ConnectionError):
                self.connection.recv(1)  # until the client is gone
            self.close_connection = True
            return
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Be quiet."""
