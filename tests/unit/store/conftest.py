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


@pytest.fixture
def store(tmp_path: Path) -> Store:
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
def age(store: Store) -> Callable[..., None]:
    """Makes artifacts and staging look as if they were made some seconds ago."""

    def make(*artifacts: Artifact, seconds: float = 7200) -> None:
        then = time.time() - seconds
        for artifact in artifacts:
            hexadecimal = artifact.digest.removeprefix("sha256:")
            os.utime(store.root / "manifests" / f"{hexadecimal}.json", (then, then))
        for base, names, files in os.walk(store.root / "staging"):
            for name in (*names, *files):
                os.utime(os.path.join(base, name), (then, then))

    return make


@pytest.fixture
def failed() -> GateResult:
    return GateResult(
        "merge.delta", Mode.ENFORCE, Verdict.FAILED, float("nan"), 0.1, "ratio", "found NaN"
    )
