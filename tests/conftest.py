"""What every test may use: small real models, and homes of their own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Two cores: a process that takes both slows every other test.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete random LLaMA in an HF directory, read-only by agreement."""
    from arriero.testing.models import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty `ARRIERO_HOME` of this test's own."""
    place = tmp_path / "home"
    monkeypatch.setenv("ARRIERO_HOME", str(place))
    monkeypatch.delenv("ARRIERO_ADDRESS", raising=False)
    monkeypatch.delenv("ARRIERO_STORE", raising=False)
    yield place
