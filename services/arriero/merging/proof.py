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

import numpy as np

from arriero.merging.fold import MergePlan
from arriero.weights import Weights, spacing

if TYPE_CHECKING:
    import torch

__all__ = ["MAX_ULP", "DeltaProof", "prove_delta"]

Tick = Callable[[int, int], None]
# Rounding to nearest is off by half a unit in the last place; the other half is slack.
MAX_ULP = 1.0
# Elements of one tensor that are recomputed, in evenly spread rows: a wrong scale, sign
# or orientation shows in any row, and damaged bytes are the store's business.
_SAMPLE = 1 << 17
# float32's relative error of one operation, doubled.
_FLOAT32_ERROR = 2.0**-23
_COMPARE = 1 << 24


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


def prove_delta(plan: MergePlan, merged: Path, tick: Tick) -> DeltaProof:
    """Compare a written merge with what it was made of.

    Merged tensors: written - (base + sum of weight · scale · B·A) in units of
    the output type's last place, less what float32 sums may be off. Untouched
    ones: byte by byte, or converted where the type changed.

    Args:
        plan: what was merged.
        merged: the written directory.
        tick: called with bytes so far and in all.

    Raises:
        DataLoss: the written files are damaged.
    """
    written = Weights.open(merged)
    missing = tuple(sorted(plan.tensors.keys() ^ written.keys()))
    differing: list[str] = []
    worst, where = 0.0, ""
    count = changed = sampled = done = 0
    total = plan.nbytes
    for name, item in plan.tensors.items():
        if name not in written or written[name].shape != item.shape:
            continue
        if plan.pairs(name):
            ulp, different, elements = _judge(plan, name, written.tensor(name))
            count += 1
            changed += different
            sampled += elements
            if ulp > worst or not where:
                worst, where = ulp, name
        elif not _same(plan, name, written):
            differing.append(name)
        done += item.nbytes
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


def _judge(plan: MergePlan, name: str, written: torch.Tensor) -> tuple[float, int, int]:
    """Worst distance in ulp, changed elements and elements, over sampled rows."""
    import torch

    base = plan.base.tensor(name)
    step = max(1, math.ceil(base.numel() / _SAMPLE))
    rows = torch.arange(0, base.shape[0], step)
    expected = base[rows].to(torch.float64)
    size = expected.abs()
    for blend, pair in plan.pairs(name):
        a, b = (matrix.to(torch.float64) for matrix in blend.adapter.matrices(pair))
        left, right = (a.T[rows], b.T) if blend.adapter.transposed else (b[rows], a)
        factor = blend.weight * pair.scale
        expected += factor * (left @ right)
        # Rounding of a float32 sum of r products grows with their magnitudes.
        size += abs(factor) * pair.rank * (left.abs() @ right.abs())
    found = written[rows].to(torch.float64)
    if not bool(torch.isfinite(found).all()):
        return math.inf, 0, found.numel()
    off = ((found - expected).abs() - size * _FLOAT32_ERROR).clamp_min(0)
    ulp = off / spacing(torch.maximum(expected.abs(), found.abs()), written.dtype)
    different = int((written[rows] != base[rows].to(written.dtype)).sum())
    return float(ulp.max()), different, found.numel()


def _same(plan: MergePlan, name: str, written: Weights) -> bool:
    import torch

    if written[name].dtype != plan.tensors[name].dtype:
        return False
    if written[name].dtype == plan.base[name].dtype:
        # numpy compares many bytes at once, a memoryview one by one.
        ours = np.frombuffer(written.raw(name), dtype=np.uint8)
        theirs = np.frombuffer(plan.base.raw(name), dtype=np.uint8)
        return ours.size == theirs.size and all(
            np.array_equal(ours[i : i + _COMPARE], theirs[i : i + _COMPARE])
            for i in range(0, ours.size, _COMPARE)
        )
    converted = plan.base.tensor(name).to(plan.dtype(name))
    return bool(torch.equal(written.tensor(name), converted))
