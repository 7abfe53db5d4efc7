"""Base plus adapters into a new checkpoint, tensor by tensor.

Responsibility: write what `MergedWeights` computes, with the base's
configuration and tokenizer. Does not judge the result (`proof` and `oracle` do).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from arriero.merging.files import MODEL_EXTRAS, copy_files, matching
from arriero.weights import MergedWeights, WeightsWriter
from arriero.weights.config import read_config

__all__ = ["write_merged"]

Tick = Callable[[int, int], None]


def write_merged(
    merged: MergedWeights, base: Path, target: Path, *, max_shard_size: int, tick: Tick
) -> None:
    """Write the merged checkpoint with the base's configuration and tokenizer.

    Args:
        merged: what to write.
        base: the model that it is made of.
        target: an empty directory.
        max_shard_size: bytes per safetensors file.
        tick: called with bytes written and in all; what it raises ends the work.
    """
    extras = matching(sorted(base.iterdir()), MODEL_EXTRAS)
    copy_files(extras, target, lambda *_: None)
    done, total = 0, merged.nbytes
    with WeightsWriter(target, list(merged.values()), max_shard_size=max_shard_size) as writer:
        for name, plan in merged.items():
            raw = merged.raw(name)
            if raw is not None:
                writer.write_raw(name, raw)
            else:
                writer.write(name, merged.tensor(name))
            done += plan.nbytes
            tick(done, total)
    _write_config(merged, target)


def _write_config(merged: MergedWeights, target: Path) -> None:
    """The merged model's `config.json`, where it is not the base's."""
    if merged.config == read_config(target):
        return
    text = json.dumps(merged.config, indent=2, ensure_ascii=False) + "\n"
    path = target / "config.json"
    path.unlink()
    path.write_text(text, encoding="utf-8")
