"""Base plus adapters into a new checkpoint, tensor by tensor.

Responsibility: write what `MergedWeights` computes, with the base's
configuration and tokenizer. Does not judge the result (`proof` and `oracle` do).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from arriero.merging.files import MODEL_EXTRAS, copy_files, matching, write_json
from arriero.weights import MergedWeights, WeightsWriter
from arriero.weights.config import read_config
from arriero.weights.sink import BUFFER, Written

__all__ = ["write_merged"]

Tick = Callable[[int, int], None]


def write_merged(
    merged: MergedWeights, base: Path, target: Path, *, max_shard_size: int, tick: Tick
) -> dict[str, Written]:
    """Write the merged checkpoint with the base's configuration and tokenizer.

    Args:
        merged: what to write.
        base: the model that it is made of.
        target: an empty directory.
        max_shard_size: bytes per safetensors file.
        tick: called with bytes written and in all; what it raises ends the work.

    Returns:
        Digests of the weights' files, by name.

    Raises:
        DiskFull: no room, with figures.
    """
    import torch

    extras = matching(sorted(base.iterdir()), MODEL_EXTRAS)
    copy_files(extras, target, lambda *_: None)
    done, total = 0, merged.nbytes
    threads = torch.get_num_threads()
    # Blocks are too small to be worth sharing, and the other cores write and hash.
    torch.set_num_threads(1)
    try:
        with WeightsWriter(target, list(merged.values()), max_shard_size=max_shard_size) as writer:
            for name in writer.order:
                raw = merged.raw(name)
                if raw is not None:
                    writer.copy(name, merged.base[merged.source(name)], raw)
                    done += raw.nbytes
                    tick(done, total)
                    continue
                for first, last in merged.blocks(name, BUFFER):
                    merged.fill(name, first, writer.next_rows(name, last - first))
                done += merged[name].nbytes
                tick(done, total)
    finally:
        torch.set_num_threads(threads)
    _write_config(merged, target)
    return writer.digests


def _write_config(merged: MergedWeights, target: Path) -> None:
    """The merged model's `config.json`, where it is not the base's."""
    if merged.config == read_config(target):
        return
    path = target / "config.json"
    path.unlink()
    write_json(path, merged.config)
