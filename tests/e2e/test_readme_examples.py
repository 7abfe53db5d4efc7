"""The README's programs run as they stand there, against a platform."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Fenced blocks of Python.
_BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)


def program(word: str) -> str:
    """The README's one program that has this word."""
    found = [block for block in _BLOCK.findall((ROOT / "README.md").read_text()) if word in block]
    assert len(found) == 1, word
    return str(found[0])


def run(source: str, platform: Any, directory: Path) -> str:
    """What a program prints."""
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=directory,
        env=platform.env,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def served(
    platform: Any, tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A directory with `my.yaml`, whose pipeline the client's example ran."""
    directory = tmp_path_factory.mktemp("readme")
    tiny_pipeline(directory, name="my-model").rename(directory / "my.yaml")
    # It creates the run, waits, and chats with what was deployed.
    run(program("create_run"), platform, directory)
    return directory


def test_the_clients_example_trains_deploys_and_chats(served: Path, platform: Any) -> None:
    (endpoint,) = platform.json("endpoints", "list")
    assert endpoint["name"] == "my-model"


def test_the_example_of_openais_client_answers(served: Path, platform: Any) -> None:
    gateway = platform.home.running()["gateway"]
    source = program("from openai").replace("http://127.0.0.1:PORT/v1", gateway)
    assert "PORT" not in source
    assert run(source, platform, served)


def test_the_grpc_example_answers(served: Path, platform: Any) -> None:
    (replica,) = platform.json("endpoints", "get", "my-model")["replicas"]
    source = program("InferenceServiceStub").replace("127.0.0.1:PORT", replica["address"])
    assert "PORT" not in source
    assert run(source, platform, served)


def test_an_endpoint_tells_how_near_it_is_and_what_it_was_made_from(
    served: Path, platform: Any
) -> None:
    shown = platform.cli("endpoints", "get", "my-model").stdout
    assert "KL to trained" in shown
    assert re.search(r"\d nats", shown)
    assert "serve.smoke" in shown
    for kind in ("gguf", "model", "adapter", "dataset"):
        assert re.search(rf"^\s*{kind}\b", shown, re.M), kind
