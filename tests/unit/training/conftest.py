"""A store with a tiny model and prepared rows, as the rooms before would leave them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from arriero.operations.kinds import ResolveContext
from arriero.settings import SourceSettings
from arriero.store import Artifact, ManifestDraft, Store
from arriero.testing.models import VOCABULARY, tiny_llama

MASKED = -100


def draw_rows(count: int, seed: int = 0, largest: int = VOCABULARY) -> list[tuple[list[int], int]]:
    """Rows of 4 to 20 ids, each with the place where its answer starts."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = int(random.integers(4, 21))
        ids = [int(i) for i in random.integers(3, largest, length)]
        rows.append((ids, int(random.integers(1, length))))
    return rows


def write_dataset(
    directory: Path,
    rows: list[tuple[list[int], int]],
    tokenizer: str = "",
    chunk: int = 5,
) -> Path:
    """A dataset artifact's files, in several record batches."""
    import pyarrow as pa

    directory.mkdir(parents=True, exist_ok=True)
    labels = [[MASKED] * start + ids[start:] for ids, start in rows]
    kind = pa.list_(pa.int32())
    schema = pa.schema([("input_ids", kind), ("labels", kind)])
    with pa.OSFile(str(directory / "data.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as w:
        for i in range(0, len(rows), chunk):
            columns = [
                pa.array([ids for ids, _ in rows[i : i + chunk]], type=kind),
                pa.array(labels[i : i + chunk], type=kind),
            ]
            w.write_batch(pa.record_batch(columns, schema=schema))
    facts = {
        "rows": len(rows),
        "tokens": sum(len(ids) for ids, _ in rows),
        "trained_tokens": sum(len(ids) - max(1, start) for ids, start in rows),
        "max_length": max((len(ids) for ids, _ in rows), default=0),
        "cutoff_len": 64,
        "tokenizer": tokenizer,
        "pad_token_id": 2,
    }
    (directory / "dataset.json").write_text(json.dumps(facts))
    probe = [ids for ids, _ in rows[:4]]
    (directory / "probe.json").write_text(json.dumps({"sequences": probe}))
    (directory / "arriero-template.json").write_text('{"name": "test"}')
    return directory


@dataclass
class Kit:
    """What a test makes models and datasets with."""

    store: Store

    draw_rows = staticmethod(draw_rows)
    write_dataset = staticmethod(write_dataset)

    def model(
        self, dtype: str = "float32", tweak: Callable[[Path], None] | None = None, **shape: int
    ) -> Artifact:
        """Publish a tiny model."""
        staged = self.store.staging("test", "model") / "files"
        tiny_llama(staged, dtype=dtype, **{"hidden": 32, **shape})  # type: ignore[arg-type]
        if tweak is not None:
            tweak(staged)
        return self.store.publish(
            staged, ManifestDraft(kind="model", name="tiny", licenses=("mit",))
        )

    def dataset(self, rows: list[tuple[list[int], int]], tokenizer: str = "") -> Artifact:
        """Publish rows."""
        staged = self.store.staging("test", "dataset") / "files"
        write_dataset(staged, rows, tokenizer)
        return self.store.publish(staged, ManifestDraft(kind="dataset", name="rows"))

    def context(self, **inputs: Artifact) -> ResolveContext:
        """What a spec is resolved in."""
        fields = {name: [artifact] for name, artifact in inputs.items()}
        return ResolveContext(self.store, fields, SourceSettings())


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(Store.open(tmp_path / "store"))


@pytest.fixture
def model(kit: Kit) -> Artifact:
    return kit.model()


@pytest.fixture
def dataset(kit: Kit, model: Artifact) -> Artifact:
    return kit.dataset(draw_rows(12), model.digest)


@pytest.fixture
def val_dataset(kit: Kit, model: Artifact) -> Artifact:
    return kit.dataset(draw_rows(5, seed=9), model.digest)


@pytest.fixture
def context(kit: Kit, model: Artifact, dataset: Artifact) -> ResolveContext:
    return kit.context(model=model, dataset=dataset)
