"""A store, a toy room, and an engine whose jobs are scripted or real."""

import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from arriero.operations import Engine
from arriero.settings import SourceSettings
from arriero.store import Artifact, ManifestDraft, Store

TOYROOM = Path(__file__).parent / "toyroom"
sys.path.insert(0, str(TOYROOM))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


@pytest.fixture
def model(store: Store) -> Artifact:
    source = store.staging("test", "model") / "out"
    source.mkdir()
    (source / "data.txt").write_text("model")
    return store.publish(source, ManifestDraft(kind="model", name="base", licenses=["mit"]))


@pytest.fixture
def toy_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets child processes import the toy room and Arriero."""
    from toyroom_support import python_path

    monkeypatch.setenv("PYTHONPATH", python_path())


@pytest.fixture
async def make_engine(store: Store, toy_path: None) -> AsyncIterator[Callable[..., Engine]]:
    """Makes engines over the test's store; all are closed at its end."""
    from toyroom_service import KINDS

    made: list[Engine] = []

    def make(**settings: Any) -> Engine:
        settings.setdefault("kinds", KINDS)
        settings.setdefault("backoff", lambda attempt: 0.0)
        settings.setdefault("job_grace", 60.0)
        engine = Engine(service="merging", store=store, sources=SourceSettings(), **settings)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        await engine.close()
