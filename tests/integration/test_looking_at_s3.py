"""Work is checked and priced before its inputs come: a look at a model fetches no weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from arriero.dataset.service import DATASET, EXTEND_TOKENIZER
from arriero.merging.service import KINDS as MERGING
from arriero.operations import intake
from arriero.operations.kinds import WorkKind
from arriero.quantization.kinds import WORK_KINDS as QUANTIZATION
from arriero.settings import SourceSettings
from arriero.store import Artifact, ManifestDraft, Store
from arriero.store.s3 import outline
from arriero.testing.adapters import tiny_adapter
from arriero.training.service import KINDS as TRAINING
from arriero.v1 import dataset_pb2, merging_pb2, quantization_pb2, training_pb2

KINDS: dict[str, WorkKind] = {
    kind.name: kind for kind in (DATASET, EXTEND_TOKENIZER, *MERGING, *QUANTIZATION, *TRAINING)
}


def publish(store: Store, source: Path, kind: str) -> Artifact:
    place = store.staging("test", source.name) / "out"
    shutil.copytree(source, place)
    return store.publish(place, ManifestDraft(kind=kind, name="thing"))


def rows(directory: Path, ids: Sequence[int]) -> Path:
    directory.mkdir()
    kind = pa.list_(pa.int32())
    schema = pa.schema([("input_ids", kind), ("labels", kind)])
    with pa.OSFile(str(directory / "data.arrow"), "wb") as sink, pa.ipc.new_file(sink, schema) as w:
        w.write_batch(pa.record_batch([pa.array([ids], kind)] * 2, schema=schema))
    facts = {"rows": 1, "tokens": len(ids), "trained_tokens": len(ids), "max_length": len(ids)}
    facts |= {"cutoff_len": 64, "pad_token_id": 2}
    (directory / "dataset.json").write_text(json.dumps(facts))
    return directory


def sizes_of(store: Store) -> list[int]:
    """The bytes of each object, or part of one, that is fetched from now on."""
    sizes: list[int] = []
    store._backend._bucket.client.meta.events.register(  # type: ignore[attr-defined]
        "after-call.s3.GetObject", lambda parsed, **_: sizes.append(parsed["ContentLength"])
    )
    return sizes


def test_a_look_at_a_model_in_s3_fetches_no_weights(
    s3_url: str, tmp_path: Path, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Store.open(s3_url)
    model = publish(here, tiny_llama_dir, "model")
    adapter = publish(here, tiny_adapter(tmp_path / "adapter", tiny_llama_dir), "adapter")
    dataset = publish(here, rows(tmp_path / "rows", range(3, 30)), "dataset")
    (tmp_path / "corpus.txt").write_text("alpha beta\n" * 50)
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "input": "", "output": "b"}]')
    work: dict[str, Any] = {
        "train": training_pb2.TrainSpec(model=model.digest, dataset=dataset.digest),
        "merge": merging_pb2.MergeSpec(model=model.digest, adapters=[adapter.digest]),
        "export": merging_pb2.ExportSpec(model=model.digest, format="meta"),
        "quantize": quantization_pb2.QuantizeSpec(
            model=model.digest, adapters=[adapter.digest], types=["Q8_0"]
        ),
        "extend_tokenizer": dataset_pb2.ExtendTokenizerSpec(
            model=model.digest, corpus=[str(tmp_path / "corpus.txt")], vocab_size=400
        ),
        "dataset": dataset_pb2.DatasetSpec(
            tokenizer=model.digest, sources=[str(tmp_path / "rows.json")]
        ),
    }
    monkeypatch.setattr(outline, "HEAD_BYTES", 512)  # the tiny model's header is longer
    [weights] = [e.size for e in model.manifest.files if e.path.endswith(".safetensors")]
    for name, spec in work.items():
        monkeypatch.setenv("ARRIERO_STORE_CACHE", str(tmp_path / name))
        there = Store.open(s3_url)
        fetched = sizes_of(there)
        sources = SourceSettings((tmp_path,))
        found = intake.resolve(KINDS[name], spec, there, sources)
        # As if all were here, where it was published.
        assert found == intake.resolve(KINDS[name], spec, here, sources), name
        assert 0 < sum(fetched) < weights / 4, name
        names = {path.name for path in (there.root / "artifacts").iterdir()}
        assert names <= {dataset.digest.removeprefix("sha256:")}, name
