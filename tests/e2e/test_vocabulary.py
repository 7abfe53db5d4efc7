"""Extend, continue pre-training, merge, tune, quantize, deploy; then rewrite rows with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

GREEK = (
    "Ο αγωγιάτης οδηγεί ένα καραβάνι από λάμα πάνω από τις Άνδεις.",
    "Κάθε λάμα κουβαλάει μαλλί, αλάτι και καλαμπόκι στην αγορά.",
    "Το καραβάνι περπατάει αργά, και ο αγωγιάτης περπατάει πίσω του.",
)
TRAIN = {
    "max_steps": 3,
    "batch_size": 4,
    "micro_batch_size": 4,
    "learning_rate": 0.01,
    "dtype": "float32",
}
LORA = {"r": 4, "lora_dropout": 0.0, "target_modules": ["all-linear"]}


@pytest.fixture(scope="module")
def run(
    platform: Any,
    tiny_llama_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    write_rows: Callable[..., Path],
) -> dict[str, Any]:
    """The way of Chinese-LLaMA on the tiny model."""
    place = tmp_path_factory.mktemp("vocabulary")
    (place / "corpus.txt").write_text("\n".join(GREEK * 20))
    write_rows(place / "rows.jsonl")
    saved = LORA | {"modules_to_save": ["embed_tokens", "lm_head"]}
    stages = {
        "base": {"import": {"source": str(tiny_llama_dir)}},
        "vocab": {
            "extend_tokenizer": {"model": "base", "corpus": ["corpus.txt"], "vocab_size": 448}
        },
        "text": {
            "dataset": {
                "format": "text",
                "sources": ["corpus.txt"],
                "tokenizer": "vocab",
                "cutoff_len": 64,
            }
        },
        "pt": {"train": {"model": "vocab", "dataset": "text", "lora": saved, **TRAIN}},
        "greek": {"merge": {"model": "vocab", "adapters": ["pt"]}},
        "rows": {"dataset": {"sources": ["rows.jsonl"], "tokenizer": "greek", "cutoff_len": 256}},
        "sft": {"train": {"model": "greek", "dataset": "rows", "lora": LORA, **TRAIN}},
        "quants": {"quantize": {"model": "greek", "adapters": ["sft"], "types": ["Q8_0"]}},
        "live": {"deploy": {"model": "quants.Q8_0", "endpoint": "greek", "context": 512}},
    }
    path = place / "pipeline.yaml"
    body = {"name": "greek", "stages": [{"name": key, **work} for key, work in stages.items()]}
    path.write_text(yaml.safe_dump(body, sort_keys=False, allow_unicode=True))
    ended: dict[str, Any] = platform.json("run", str(path))
    return ended


def test_every_stage_succeeds_and_the_gates_pass(run: dict[str, Any]) -> None:
    assert run["state"] == "RUN_STATE_SUCCEEDED"
    gates = {
        (stage["name"], gate["gate"]): gate["verdict"]
        for stage in run["stages"]
        for gate in stage["metadata"].get("gates", [])
    }
    for gate in (
        ("vocab", "tokenizer.match"),
        ("greek", "merge.delta"),
        ("quants", "gguf.tokens"),
        ("live", "serve.smoke"),
    ):
        assert gates[gate] == "GATE_VERDICT_PASSED", (gate, gates)


def test_rows_are_rewritten_by_the_endpoint_that_was_made(
    platform: Any, run: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"instruction": text}) + "\n" for text in GREEK)
    )
    work = {
        "sources": [str(tmp_path / "rows.jsonl")],
        "endpoint": platform.json("status")["gateway"],
        "model": "greek",
        "prompt": "{{ instruction }}",
        "max_tokens": 8,
        # A random model hardly ever stops by itself.
        "max_failed_share": 1.0,
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(
        yaml.safe_dump({"name": "rewrite", "stages": [{"name": "t", "transform": work}]})
    )
    ended = platform.json("run", str(path), check=False)
    (stage,) = ended["stages"]
    message = stage.get("error", {}).get("message", "")
    assert stage["state"] == "STAGE_STATE_SUCCEEDED" or (
        "3 of 3 rows failed" in message and "cut at max_tokens" in message
    ), message
