"""Stores in temporary directories, and artifacts to put there."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from arriero.gates import GateResult, Mode, Verdict
from arriero.store import Artifact, ManifestDraft, Store

FILES = {"config.json": b"{}", "sub/weights.bin": b"\x01" * 1000}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What is marked `backends` says how any store behaves."""
    if metafunc.definition.get_closest_marker("backends"):
        metafunc.parametrize("store", ["file", "s3"], indirect=True)


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if getattr(request, "param", "file") == "s3":
        return Store.open(request.getfixturevalue("s3_url"))
    return Store.open(tmp_path / "store")


@pytest.fixture
def fill(store: Store) -> Callable[..., Path]:
    """Makes a staging directory with files."""
    numbers = itertools.count()

    def make(files: Mapping[str, bytes] = FILES, *, service: str = "dataset") -> Path:
        source = store.staging(service, f"execution-{next(numbers)}") / "out"
        for name, data in files.items():
            path = source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return source

    return make


@pytest.fixture
def publish(store: Store, fill: Callable[..., Path]) -> Callable[..., Artifact]:
    """Publishes a model with some files; `n` makes it another one."""

    def make(n: int = 0, *, kind: str = "model", **fields: Any) -> Artifact:
        source = fill({**FILES, "n.txt": str(n).encode()})
        return store.publish(source, ManifestDraft(kind=kind, name="m", **fields))

    return make


@pytest.fixture
def age(store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes artifacts and staging look as if they were made some seconds ago."""
    aged: dict[str, float] = {}

    def make(*artifacts: Artifact, seconds: float = 7200) -> None:
        then = time.time() - seconds
        for artifact in artifacts:
            key = f"manifests/{artifact.digest.removeprefix('sha256:')}.json"
            if store.remote:
                aged[key] = then
            else:
                os.utime(store.root / key, (then, then))
        for base, names, files in os.walk(store.root / "staging"):
            for name in (*names, *files):
                os.utime(os.path.join(base, name), (then, then))

    if store.remote:  # a server does not let anybody set times
        objects = store.objects
        time_ns, write = objects.time_ns, objects.write

        def told(key: str) -> int | None:
            return int(aged[key] * 1e9) if key in aged else time_ns(key)

        def written(key: str, data: bytes, *, durable: bool = True) -> None:
            aged.pop(key, None)
            write(key, data, durable=durable)

        def touched(key: str) -> None:
            aged.pop(key, None)

        monkeypatch.setattr(objects, "time_ns", told)
        monkeypatch.setattr(objects, "write", written)
        monkeypatch.setattr(objects, "touch", touched)
    return make


@pytest.fixture
def failed() -> GateResult:
    return GateResult(
        "merge.delta", Mode.ENFORCE, Verdict.FAILED, float("nan"), 0.1, "ratio", "found NaN"
    )
