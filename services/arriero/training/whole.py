"""Full fine-tuning: every weight is trained, and a model comes out.

Responsibility: open a model's weights to the optimizer, and write it as the base was
written: names, types, files beside the weights. Does not know how it is trained.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from arriero.errors import FailedPrecondition
from arriero.weights import TensorPlan, Weights, WeightsWriter
from arriero.weights.layout import TORCH_NAMES

# Beside the weights. Code (`*.py`) is never kept: nothing here would run it.
_BESIDE = ("*.json", "*.jinja", "*.txt", "tokenizer.model", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*")
_INDEX = ".safetensors.index.json"


def unfreeze(model: Any, base: Weights) -> Any:
    """Train every weight, in float32.

    Args:
        model: as transformers loaded it.
        base: the tensors that it came from, and whose names it will be saved under.

    Raises:
        FailedPrecondition: transformers holds the weights otherwise than the files do.
    """
    model.float().requires_grad_(True)
    state = model.state_dict()
    strange = [
        name
        for name, info in base.items()
        if name not in state or tuple(state[name].shape) != info.shape
    ]
    if strange:
        raise FailedPrecondition(
            f"method full cannot save this model: transformers rearranges {len(strange)} of its "
            f"{len(base)} tensors, such as {strange[0]}; use method lora"
        )
    return model


def save(model: Any, base: Weights, source: Path, directory: Path) -> None:
    """Write a trained model: each tensor in the type in which the base stores it.

    Args:
        model: from `unfreeze`.
        base: the base's tensors.
        source: the base's directory; what lies beside the weights is copied.
        directory: empty.
    """
    import torch

    for pattern in _BESIDE:
        for path in source.glob(pattern):
            if not path.name.endswith(_INDEX):
                shutil.copyfile(path, directory / path.name)
    state = model.state_dict()
    plan = [TensorPlan(name, info.dtype, info.shape) for name, info in base.items()]
    with WeightsWriter(directory, plan) as writer:
        for name, info in base.items():
            stored: torch.dtype = getattr(torch, TORCH_NAMES[info.dtype])
            writer.write(name, state[name].detach().to("cpu", stored))
