"""The hub's client against a small hub of our own, by HF_ENDPOINT, in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from arriero.testing.hub import COMMIT, TOKEN, serving_hub

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


@pytest.fixture
def hub() -> Iterator[str]:
    with serving_hub({"org/name": FILES, "org/gated": FILES}) as url:
        yield url


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
    assert fetch(hub, tmp_path, *arguments, ARRIERO_SECRET_HUB=TOKEN) == COMMIT
