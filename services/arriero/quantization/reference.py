"""Merge, convert, quantize: one after the other, with llama.cpp's own tools.

Responsibility: the plain chain, for models that the one pass does not know, and
to compare it with. Does not know how tensors are computed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arriero.errors import DataLoss, FailedPrecondition, ResourceExhausted
from arriero.llama import QuantType, Recipe, quantize, read_header
from arriero.operations.job import Job
from arriero.quantization import converter
from arriero.quantization.converter import Conversion
from arriero.weights import MergedWeights, WeightsWriter

# Of the one file of a merged model that is read once and thrown away.
_ONE_SHARD = 1 << 62
# Bytes of a converted file that are looked at together.
_PIECE = 1 << 22
# What the converter writes; numpy has no bfloat16.
_NUMPY: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def run(
    job: Job,
    conversion: Conversion,
    merged: MergedWeights | None,
    kinds: Sequence[QuantType],
    recipe: Recipe,
    paths: Sequence[Path],
    *,
    n_threads: int,
) -> None:
    """Make files by the plain chain.

    What is complete lies among the checkpoints until everything is: an attempt
    after a kill goes on with the type that was being made.

    Args:
        job: for progress, scratch and checkpoints.
        conversion: as for `converter.convert`.
        merged: model and adapters; None where the view holds the weights.
        kinds: one for each path.
        recipe: overrides and importance matrix.
        paths: files to make.
        n_threads: of converter and quantizer.
    """
    master = job.checkpoints / "master.gguf"
    if not master.exists():
        convert(job, conversion, merged, master, n_threads)
    made = [_quantized(job, master, kind, recipe, n_threads) for kind in kinds]
    for kept, path in zip(made, paths, strict=True):
        kept.rename(path)
    master.unlink()


def convert(
    job: Job,
    conversion: Conversion,
    merged: MergedWeights | None,
    target: Path,
    n_threads: int,
) -> None:
    """Make the one lossless GGUF file, after merging where there is something to merge."""
    if merged is not None:
        _write_merged(job, merged, conversion.view)
    total = sum(path.stat().st_size for path in conversion.view.glob("*.safetensors"))

    def written(size: int) -> None:
        job.progress(phase="converting", step=size, total=max(size, total), unit="bytes")

    written(0)
    aside = job.scratch / "master.gguf"
    log = job.scratch / "converter.log"
    try:
        converter.convert(
            conversion,
            aside,
            log=log,
            threads=n_threads,
            on_progress=written,
            check=job.check_preempted,
        )
    except (FailedPrecondition, ResourceExhausted):
        converter.tell(log, job.log, whole=True)
        raise
    _check_finite(aside)
    _keep(aside, target)


def _check_finite(path: Path) -> None:
    """Refuse what most types would take, and make zeros or noise of.

    Raises:
        DataLoss: a tensor holds a NaN or an infinite number.
    """
    data = np.memmap(path, mode="r", dtype=np.uint8)
    header = read_header(path)
    for tensor in header.tensors:
        start = header.data_offset + tensor.offset
        kind = _NUMPY[tensor.type]
        for at in range(start, start + tensor.size, _PIECE):
            raw = data[at : min(at + _PIECE, start + tensor.size)]
            values = raw.view(kind)
            # All bits of the exponent, where numpy does not know the type.
            whole = (values & 0x7F80) != 0x7F80 if kind is np.uint16 else np.isfinite(values)
            if not whole.all():
                raise DataLoss(
                    f"{tensor.name} holds NaN or infinite numbers; fetch or make the model again, "
                    "or look for the adapter that brought them"
                )


def _write_merged(job: Job, merged: MergedWeights, view: Path) -> None:
    """Weights in the place of the view's header without any."""
    done, total = 0, merged.nbytes
    with WeightsWriter(view, list(merged.values()), max_shard_size=_ONE_SHARD) as writer:
        for name, plan in merged.items():
            job.check_preempted()
            job.progress(phase="merging", step=done, total=total, unit="bytes")
            writer.write(name, merged.tensor(name))
            done += plan.nbytes


def _quantized(job: Job, master: Path, kind: QuantType, recipe: Recipe, n_threads: int) -> Path:
    """One type's file."""
    kept = job.checkpoints / f"{kind.name}.gguf"
    if kept.exists():
        return kept
    job.check_preempted()

    def done(step: int, total: int) -> None:
        job.progress(phase=f"quantizing {kind.name}", step=step, total=total, unit="tensors")

    done(0, len(read_header(master).tensors))
    target = job.scratch / f"{kind.name}.gguf"
    quantize(master, target, kind, recipe=recipe, n_threads=n_threads, on_progress=done)
    return _keep(target, kept)


def _keep(made: Path, kept: Path) -> Path:
    """Move a whole file among the checkpoints; a name there means complete bytes."""
    with made.open("rb") as file:
        os.fsync(file.fileno())
    made.rename(kept)
    return kept
