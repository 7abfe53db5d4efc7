"""Base plus adapters into a new checkpoint, tensor by tensor.

Responsibility: plan the merged checkpoint from headers alone, then write it
with one tensor in memory. Does not judge the result (`proof` and `oracle` do).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.errors import FailedPrecondition
from arriero.merging.architecture import CONV1D_TYPES, read_config
from arriero.merging.files import MODEL_EXTRAS, copy_files, matching
from arriero.weights import (
    LoraAdapter,
    LoraPair,
    TensorInfo,
    TensorPlan,
    Weights,
    WeightsWriter,
    dtype_name,
)
from arriero.weights import fold as fold_tensor
from arriero.weights.layout import TORCH_NAMES

if TYPE_CHECKING:
    import torch

__all__ = ["Blend", "MergePlan", "plan_merge", "write_merged"]

Tick = Callable[[int, int], None]
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Blend:
    """An adapter and its weight in the merge."""

    adapter: LoraAdapter
    weight: float


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What a merge will write; made from headers, cheap.

    Attributes:
        base: the base's tensors.
        blends: adapters with their weights, in order.
        tensors: the merged checkpoint, in the base's order.
    """

    base: Weights
    blends: tuple[Blend, ...]
    tensors: Mapping[str, TensorPlan]

    @property
    def nbytes(self) -> int:
        """Bytes of the merged weights."""
        return sum(plan.nbytes for plan in self.tensors.values())

    @property
    def touched(self) -> list[str]:
        """Names of the tensors that an adapter changes, in the base's order."""
        names = {name for blend in self.blends for name in blend.adapter.pairs}
        return [name for name in self.tensors if name in names]

    def pairs(self, name: str) -> list[tuple[Blend, LoraPair]]:
        """What is added to a tensor."""
        return [(b, b.adapter.pairs[name]) for b in self.blends if name in b.adapter.pairs]

    def dtype(self, name: str) -> torch.dtype:
        """torch's word for the type that a merged tensor has."""
        import torch

        dtype: torch.dtype = getattr(torch, TORCH_NAMES[self.tensors[name].dtype])
        return dtype


def plan_merge(
    base: Path, adapters: Sequence[Path], weights: Sequence[float], dtype: str = "auto"
) -> MergePlan:
    """Open everything and see that it fits together.

    Args:
        base: a model's directory.
        adapters: PEFT directories.
        weights: one for each adapter.
        dtype: `auto`, or torch's word for the type of all floating point weights.

    Raises:
        FailedPrecondition: an unsupported adapter, or one that does not fit the base.
        DataLoss: damaged files.
    """
    config = read_config(base)
    if config.get("quantization_config"):
        raise FailedPrecondition(
            "the base is quantized; merge into the model that it was made from"
        )
    tensors = Weights.open(base)
    transposed = config.get("model_type") in CONV1D_TYPES
    blends = []
    for directory, weight in zip(adapters, weights, strict=True):
        adapter = LoraAdapter.open(directory, transposed=transposed)
        adapter.check_base(tensors)
        blends.append(Blend(adapter, weight))
    target = None if dtype == "auto" else dtype_name(dtype)
    plans = {name: _planned(info, target) for name, info in tensors.items()}
    return MergePlan(tensors, tuple(blends), plans)


def _planned(info: TensorInfo, dtype: str | None) -> TensorPlan:
    plan = TensorPlan(info.name, info.dtype, info.shape)
    return replace(plan, dtype=dtype) if dtype and info.dtype in _FLOATS else plan


def write_merged(
    plan: MergePlan, base: Path, target: Path, *, max_shard_size: int, tick: Tick
) -> None:
    """Write the merged checkpoint with the base's configuration and tokenizer.

    Args:
        plan: from `plan_merge`.
        base: the model that the plan was made of.
        target: an empty directory.
        max_shard_size: bytes per safetensors file.
        tick: called with bytes written and in all; what it raises ends the work.
    """
    extras = matching(sorted(base.iterdir()), MODEL_EXTRAS)
    copy_files(extras, target, lambda *_: None)
    done, total = 0, plan.nbytes
    with WeightsWriter(
        target, list(plan.tensors.values()), max_shard_size=max_shard_size
    ) as writer:
        for name, item in plan.tensors.items():
            pairs = plan.pairs(name)
            if pairs:
                changes = [(blend.adapter.delta(pair), blend.weight) for blend, pair in pairs]
                writer.write(name, fold_tensor(plan.base.tensor(name), changes, plan.dtype(name)))
            elif item.dtype == plan.base[name].dtype:
                writer.write_raw(name, plan.base.raw(name))
            else:
                writer.write(name, plan.base.tensor(name).to(plan.dtype(name)))
            done += item.nbytes
            tick(done, total)
    _state_dtype(plan, target)


def _state_dtype(plan: MergePlan, target: Path) -> None:
    """Let `config.json` say the new type where it changed."""
    changed = {
        TORCH_NAMES[item.dtype]
        for name, item in plan.tensors.items()
        if item.dtype != plan.base[name].dtype
    }
    if not changed:
        return
    config = read_config(target)
    # `torch_dtype` until transformers 4, `dtype` since; loaders of both read the file.
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    for key in keys:
        config[key] = next(iter(changed))
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    path = target / "config.json"
    path.unlink()
    path.write_text(text, encoding="utf-8")
