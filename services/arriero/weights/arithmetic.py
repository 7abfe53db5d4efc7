"""The sums: base + scale · B·A, rounded once.

Responsibility: LoRA's delta, folding deltas into a weight, and how far apart
numbers of a type lie. Does not know files or names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["delta", "fold", "spacing"]


def delta(
    a: torch.Tensor, b: torch.Tensor, scale: float, *, transposed: bool = False
) -> torch.Tensor:
    """What LoRA adds to a weight: scale · B·A in float32 (Hu et al. 2021, arXiv:2106.09685).

    Args:
        a: shape (rank, in).
        b: shape (out, rank).
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
        transposed: give (in, out) instead.

    Returns:
        float32, shape (out, in).
    """
    product = b.float() @ a.float()
    return (product.T if transposed else product) * scale


def fold(
    weight: torch.Tensor,
    deltas: Iterable[tuple[torch.Tensor, float]],
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """weight + the sum of factor · delta, summed in float32 and rounded once.

    Args:
        weight: of any floating point type; float64 is summed in float64.
        deltas: each of the weight's shape, with its factor.
        dtype: of the result; default the weight's.
    """
    import torch

    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = weight.to(wide, copy=True)
    for change, factor in deltas:
        total += change if factor == 1.0 else change * factor
    return total.to(dtype or weight.dtype)


def spacing(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance to the next larger magnitude in `dtype` (one ulp), in float64.

    Args:
        values: float64, any shape.
        dtype: a floating point type.
    """
    import torch

    info = torch.finfo(dtype)
    # frexp gives x = m * 2**e with 0.5 <= m < 1, so ulp = 2**(e - 1) * eps.
    _, exponent = torch.frexp(values.abs().clamp_min(info.smallest_normal))
    return torch.exp2((exponent - 1).to(torch.float64)) * info.eps
