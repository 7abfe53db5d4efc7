"""The sums: scale · B·A, and how far apart numbers of a type lie.

Responsibility: the few formulas of a merge that are worth a name. Does not
know files or names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["delta", "spacing"]


def delta(
    left: torch.Tensor, right: torch.Tensor, scale: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """What LoRA adds to a weight: scale · B·A (Hu et al. 2021, arXiv:2106.09685).

    Scaled after the product, in float32, as PEFT does.

    Args:
        left: shape (rows, rank): B, or A transposed.
        right: shape (rank, columns): A, or B transposed.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA, by the adapter's weight.
        out: where to put it; default: new memory.

    Returns:
        float32, shape (rows, columns).
    """
    import torch

    product = torch.mm(left.float(), right.float(), out=out)
    if scale != 1.0:
        product *= scale
    return product


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
