"""Small PEFT LoRA adapters with random values, for any base.

Responsibility: write an adapter directory that PEFT loads. Does not know torch
or PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arriero.weights import TensorInfo, Weights

__all__ = ["tiny_adapter"]


def tiny_adapter(
    directory: Path,
    base: Path | Mapping[str, TensorInfo],
    *,
    r: int = 4,
    alpha: float = 8.0,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    seed: int = 0,
    scale: float = 0.05,
    dtype: str = "float32",
    **config: Any,
) -> Path:
    """Write an adapter for the linear layers of `base` whose names end in `targets`.

    Args:
        directory: created if it is missing.
        base: a model's directory, or its tensors.
        r: rank, unless `rank_pattern` in `config` names the module's last part.
        alpha: `lora_alpha`.
        targets: last parts of module names.
        seed: of the values.
        scale: standard deviation of A and B.
        dtype: numpy's word, `float32` or `float16`.
        config: more of `adapter_config.json`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    from safetensors.numpy import save_file

    tensors = Weights.open(base) if isinstance(base, Path) else base
    random = np.random.default_rng(seed)
    ranks = config.get("rank_pattern") or {}
    values = {}
    for name, info in tensors.items():
        module = name.removesuffix(".weight")
        last = module.rsplit(".", 1)[-1]
        if last not in targets:
            continue
        rank = ranks.get(last, r)
        out, into = info.shape
        for side, shape in (("A", (rank, into)), ("B", (out, rank))):
            values[f"base_model.model.{module}.lora_{side}.weight"] = (
                random.standard_normal(shape) * scale
            ).astype(dtype)
    save_file(values, str(directory / "adapter_model.safetensors"), metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return directory
