"""The proof behind `merge.delta`: what was written is what should have been.

Responsibility: read the merged checkpoint back and compare it with base and
adapters in float64. Does not run the model, and shares no arithmetic with `fold`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.weights import MergedWeights, Weights, spacing
from arriero.weights.expected import FLOAT32_ERROR, expected_rows
from arriero.weights.reader import same_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["MAX_ULP", "DeltaProof", "prove_delta"]

Tick = Callable[[int, int], None]
# Rounding to nearest is off by half a unit in the last place; the other half is slack.
MAX_ULP = 1.0
# Elements of one tensor that are recomputed, in evenly spread rows: a wrong scale, sign
# or orientation shows in any row, and damaged bytes are the store's business.
_SAMPLE = 1 << 17


@dataclass(frozen=True, slots=True)
class DeltaProof:
    """What the comparison found.

    Attributes:
        worst_ulp: largest distance from the expected value, in units of the
            output type's last place; infinite where a value is not finite.
        worst_tensor: where.
        merged: tensors with an adapter's delta.
        changed: share of their sampled elements that differ from the base.
        sampled: elements that were recomputed.
        differing: untouched tensors that are not the base's bytes.
        missing: tensors that are not in the merged checkpoint, or too many in it.
    """

    worst_ulp: float
    worst_tensor: str
    merged: int
    changed: float
    sampled: int
    differing: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the merged weights are the expected ones."""
        return self.worst_ulp <= MAX_ULP and not self.differing and not self.missing

    @property
    def detail(self) -> str:
        """For people."""
        if self.missing:
            return (
                f"{len(self.missing)} tensors are missing or too many, such as "
                f"{self.missing[0]}; merge again"
            )
        if self.differing:
            return (
                f"{len(self.differing)} untouched tensors are not the base's, such as "
                f"{self.differing[0]}; the disk or the merge is at fault, merge again"
            )
        found = (
            f"{self.merged} merged tensors, {self.sampled} elements recomputed, "
            f"{self.changed:.1%} of them changed"
        )
        if self.passed:
            return found
        return (
            f"{found}; {self.worst_tensor} is {self.worst_ulp:.3g} units in the last place "
            f"from base + delta, expected at most {MAX_ULP}; merge again, and where the type "
            "is float16 try bfloat16"
        )


def prove_delta(merged: MergedWeights, directory: Path, tick: Tick) -> DeltaProof:
    """Compare a written merge with what it was made of.

    Merged tensors: written - (base + sum of weight · scale · B·A, scaled to DoRA's
    magnitude) in units of the output type's last place, less what float32 sums may
    be off. Untouched ones: byte by byte, or converted where the type changed.

    Args:
        merged: what was written.
        directory: where.
        tick: called with bytes so far and in all.

    Raises:
        DataLoss: the written files are damaged.
    """
    written = Weights.open(directory)
    missing = tuple(
        sorted(
            (merged.keys() ^ written.keys())
            | {n for n in merged.keys() & written.keys() if merged[n].shape != written[n].shape}
        )
    )
    differing: list[str] = []
    worst, where = 0.0, ""
    count = changed = sampled = done = 0
    total = merged.nbytes
    for name, plan in merged.items():
        if name in missing:
            continue
        if merged.parts(name):
            ulp, different, elements = _judge(merged, name, written.tensor(name))
            count += 1
            changed += different
            sampled += elements
            if ulp > worst or not where:
                worst, where = ulp, name
        elif not _same(merged, name, written):
            differing.append(name)
        done += plan.nbytes
        tick(done, total)
    return DeltaProof(
        worst_ulp=worst,
        worst_tensor=where,
        merged=count,
        changed=changed / sampled if sampled else 0.0,
        sampled=sampled,
        differing=tuple(differing),
        missing=missing,
    )


def _judge(merged: MergedWeights, name: str, written: torch.Tensor) -> tuple[float, int, int]:
    """Worst distance in ulp, changed elements and elements, over sampled rows."""
    import torch

    base = merged.base.tensor(merged.source(name))
    step = max(1, math.ceil(written.numel() / _SAMPLE))
    rows = torch.arange(0, written.shape[0], step)
    expected, size = expected_rows(merged, name, base, rows)
    found = written[rows].to(torch.float64)
    if not bool(torch.isfinite(found).all()):
        return math.inf, 0, found.numel()
    off = ((found - expected).abs() - size * FLOAT32_ERROR).clamp_min(0)
    ulp = off / spacing(torch.maximum(expected.abs(), found.abs()), written.dtype)
    old = rows < base.shape[0]  # rows that a resized vocabulary added differ from nothing
    different = int((written[rows[old]] != base[rows[old]].to(written.dtype)).sum())
    different += int((~old).sum()) * written[0].numel()
    return float(ulp.max()), different, found.numel()


def _same(merged: MergedWeights, name: str, written: Weights) -> bool:
    import torch

    if written[name].dtype != merged[name].dtype:
        return False
    raw = merged.raw(name)
    if raw is not None:
        return same_bytes(written.raw(name), raw)
    source = merged.base.tensor(merged.source(name))
    return bool(torch.equal(written.tensor(name), source.to(merged.dtype(name))))
