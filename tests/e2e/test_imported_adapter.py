"""A downloaded adapter, as tutorials have it: imported, merged, quantized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from arriero.testing.adapters import tiny_adapter


def test_an_adapter_with_a_bin_file_is_imported_and_merged(
    platform: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    adapter = tiny_adapter(tmp_path / "downloaded", tiny_llama_dir)
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.unlink()

    brought = platform.json("import", str(adapter), "--tag", "adapter/downloaded:v1")
    assert brought["state"] == "RUN_STATE_SUCCEEDED"
    found = platform.json("artifacts", "get", "adapter/downloaded:v1")
    assert {f["path"] for f in found["files"]} >= {"adapter_model.safetensors"}
    assert {g["gate"]: g["verdict"] for g in found["gates"]} == {
        "adapter.health": "GATE_VERDICT_PASSED"
    }

    pipeline = tmp_path / "merge.yaml"
    stages: list[dict[str, Any]] = [
        {"name": "base", "import": {"source": str(tiny_llama_dir)}},
        {"name": "tuned", "merge": {"model": "base", "adapters": ["adapter/downloaded:v1"]}},
        {"name": "quants", "quantize": {"model": "tuned", "types": ["F16"]}},
        {"name": "best", "evaluate": {"models": "quants", "choose": {"smallest": {}}}},
    ]
    pipeline.write_text(yaml.safe_dump({"name": "imported", "stages": stages}, sort_keys=False))
    run = platform.json("run", str(pipeline))
    assert run["state"] == "RUN_STATE_SUCCEEDED"
    tuned = next(s for s in run["stages"] if s["name"] == "tuned")
    assert [o["name"] for o in tuned["outputs"]] == ["model", "golden"]
    gates = {g["gate"]: g["verdict"] for g in tuned["metadata"]["gates"]}
    assert gates["merge.delta"] == gates["merge.logits"] == "GATE_VERDICT_PASSED"


def test_a_model_that_is_served_as_it_was_found(
    platform: Any, tiny_gguf: Path, wait_until: Callable[..., Any]
) -> None:
    platform.cli("import", str(tiny_gguf), "--tag", "gguf/found:v1")
    platform.cli("endpoints", "create", "found", "gguf/found:v1", "--context", "256")
    shown = platform.json("generate", "found", "Once", "--max-tokens", "3")
    assert shown["text"]
    platform.cli("endpoints", "delete", "found")
