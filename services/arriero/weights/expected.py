"""What rows of a merged tensor should be, in float64, by the formula alone.

Responsibility: the second opinion about the arithmetic of a merge; shares none of
it with `terms`. Does not know what is compared with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from arriero.weights.arithmetic import spacing
from arriero.weights.lora import LoraPair
from arriero.weights.merged import MergedWeights, Part

if TYPE_CHECKING:
    import torch

__all__ = ["FLOAT32_ERROR", "expected_rows"]

# float32's relative error of one operation, doubled.
FLOAT32_ERROR = 2.0**-23
# Elements of a base's rows that are in memory at once.
_BLOCK = 1 << 17


def expected_rows(
    merged: MergedWeights, name: str, base: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows of a merged tensor in float64, and how large the summed numbers were."""
    import torch

    total: torch.Tensor | None = None
    size = torch.zeros((), dtype=torch.float64)
    for part in merged.parts(name):
        whole = part.replaced.get(name)
        own = base if whole is None else part.adapter.tensor(whole)
        theirs = own[rows].to(torch.float64)
        if own.shape != base.shape:
            total = theirs.clone()
        else:
            before = base[rows].to(torch.float64)
            total = before.clone() if total is None else total
            total += part.weight * (theirs - before)
            size = size + before.abs() * (1.0 if whole is None else 1.0 + abs(part.weight))
        size = size + theirs.abs()
        pair = part.adapter.pairs.get(name)
        if pair is None:
            continue
        left, right = (factor.to(torch.float64) for factor in part.adapter.factors(pair))
        factor = part.weight * pair.scale
        change = factor * (left[rows] @ right)
        total += change
        # Rounding of a float32 sum of r products grows with their magnitudes.
        size = size + abs(factor) * pair.rank * (left[rows].abs() @ right.abs())
        if pair.embedding:  # PEFT rounds this delta to the output type before it is added
            size = size + spacing(change, merged.dtype(name)) / (2 * FLOAT32_ERROR)
        if pair.magnitude is not None:
            stretch = _stretch(part, pair, own, theirs + change, rows)
            total *= stretch
            # Norm, quotient and product round as well.
            size = size * stretch.abs() + 4 * total.abs()
    assert total is not None, "a merged tensor has parts"
    return total, size


def _stretch(
    part: Part, pair: LoraPair, own: torch.Tensor, some: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """DoRA's m / ||W + scale · B·A|| in float64, for rows or, transposed, for columns."""
    import torch

    assert pair.magnitude is not None
    magnitude = part.adapter.tensor(pair.magnitude).to(torch.float64)
    if not pair.transposed:
        return (magnitude[rows] / some.norm(dim=1)).view(-1, 1)
    left, right = (factor.to(torch.float64) for factor in part.adapter.factors(pair))
    squares = torch.zeros(own.shape[1], dtype=torch.float64)
    step = max(1, _BLOCK // own.shape[1])
    for start in range(0, own.shape[0], step):
        change = part.weight * pair.scale * (left[start : start + step] @ right)
        squares += (own[start : start + step] + change).square().sum(dim=0)
    return (magnitude / squares.sqrt()).view(1, -1)
