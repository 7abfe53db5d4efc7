"""The hub's client against a small hub of our own, by HF_ENDPOINT, in a process of its own."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "c" * 40
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"weights" * 1000,
    "modeling_evil.py": b"raise SystemExit",
    "LICENSE": b"free",
}
# huggingface_hub reads its settings when it is imported, hence the process.
SCRIPT = """
import sys
from pathlib import Path
from arriero.errors import ArrieroError
from arriero.merging.hub import download_repository
try:
    secret = sys.argv[4] if len(sys.argv) > 4 else None
    print(download_repository(sys.argv[1], sys.argv[2], Path(sys.argv[3]), secret=secret))
except ArrieroError as error:
    print(error.code, error.message)
"""


class Hub(BaseHTTPRequestHandler):
    """What snapshot_download asks for."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/gated") and "Bearer t0ken" not in str(
            self.headers.get("authorization")
        ):
            self.answer(b'{"error": "gated"}', 403, {"X-Error-Code": "GatedRepo"})
        elif path.startswith(("/api/models/org/name/revision/", "/api/models/org/gated/revision/")):
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": "org/name", "sha": COMMIT, "siblings": siblings, "tags": []}
            self.answer(json.dumps(info).encode())
        elif path.endswith(f"/tree/{COMMIT}"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in FILES.items()
            ]
            self.answer(json.dumps(tree).encode(), 200, {"Content-Type": "application/json"})
        elif f"/resolve/{COMMIT}/" in path and path.rpartition("/")[2] in FILES:
            data = FILES[path.rpartition("/")[2]]
            tag = hashlib.sha256(data).hexdigest()
            self.answer(data, 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{tag}"'})
        else:
            self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def answer(self, data: bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def fetch(hub: str, tmp_path: Path, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_ENDPOINT": hub,
            "HF_HOME": str(tmp_path / "hf"),
            **environment,
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_revision_is_fetched_without_code(hub: str, tmp_path: Path) -> None:
    target = tmp_path / "repository"
    assert fetch(hub, tmp_path, "org/name", "main", str(target)) == COMMIT
    found = {path.name for path in target.iterdir() if path.is_file()}
    assert found == {"config.json", "model.safetensors", "LICENSE"}
    for name in found:
        assert (target / name).read_bytes() == FILES[name]


def test_refusals_have_their_codes(hub: str, tmp_path: Path) -> None:
    target = str(tmp_path / "repository")
    assert fetch(hub, tmp_path, "org/none", "main", target).startswith("NOT_FOUND hf://org/none")
    assert fetch(hub, tmp_path, "org/gated", "main", target).startswith("PERMISSION_DENIED")
    away = "http://127.0.0.1:9"
    assert fetch(away, tmp_path, "org/name", "main", target).startswith("UNAVAILABLE")


def test_a_secret_opens_a_gated_repository(hub: str, tmp_path: Path) -> None:
    arguments = ("org/gated", "main", str(tmp_path / "repository"), "ARRIERO_SECRET_HUB")
    assert fetch(hub, tmp_path, *arguments, ARRIERO_SECRET_HUB="t0ken") == COMMIT
