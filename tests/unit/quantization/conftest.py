"""Stores with a tiny model and its golden logits in them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from arriero.gates.golden import Golden
from arriero.prompts import load
from arriero.store import Artifact, Store
from arriero.store.manifest import ManifestDraft
from arriero.testing.models import CORPUS

Publish = Callable[..., Artifact]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


@pytest.fixture
def publish(store: Store) -> Publish:
    """Publish a copy of a directory as an artifact."""
    count = 0

    def published(source: Path, kind: str, **draft: object) -> Artifact:
        nonlocal count
        count += 1
        staged = store.staging("test", f"e{count}") / "artifact"
        shutil.copytree(source, staged)
        return store.publish(staged, ManifestDraft(kind=kind, **draft))  # type: ignore[arg-type]

    return published


@pytest.fixture(scope="session")
def golden_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's golden logits, computed by transformers in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32).eval()
    sequences = [tokenizer(text)["input_ids"] for text in CORPUS[:5]]
    with torch.inference_mode():
        rows = [
            torch.log_softmax(model(torch.tensor([ids])).logits[0], -1).numpy().astype(np.float16)
            for ids in sequences
        ]
    directory = tmp_path_factory.mktemp("golden")
    Golden(
        tokens=np.concatenate([np.array(ids, dtype=np.int32) for ids in sequences]),
        lengths=np.array([len(ids) for ids in sequences], dtype=np.int32),
        logprobs=np.concatenate(rows),
    ).write(directory)
    return directory


@pytest.fixture
def golden(publish: Publish, golden_dir: Path) -> Artifact:
    return publish(golden_dir, "report", name="tiny", labels={"report": "golden"})


@pytest.fixture
def model(publish: Publish, tiny_llama_dir: Path, golden: Artifact, tmp_path: Path) -> Artifact:
    """The tiny model with the template `alpaca`, as a merge would hand it on."""
    source = tmp_path / "source"
    shutil.copytree(tiny_llama_dir, source)
    load("alpaca").write(source)
    return publish(source, "model", name="tiny", golden=golden.digest)


@pytest.fixture(scope="session")
def write_tokens() -> Callable[..., Path]:
    """Writes a prepared dataset of (ids, labels) into a directory."""
    return _write_tokens


def _write_tokens(directory: Path, rows: list[tuple[list[int], list[int]]]) -> Path:
    column = pa.list_(pa.int32())
    schema = pa.schema([("input_ids", column), ("labels", column)])
    directory.mkdir(exist_ok=True)
    with (
        pa.OSFile(str(directory / "data.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for ids, labels in rows:
            writer.write_batch(pa.record_batch([[ids], [labels]], schema=schema))
    return directory
