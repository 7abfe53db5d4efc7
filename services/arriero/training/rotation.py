"""Rotary position embedding in four kernels, for GPUs.

Responsibility: turn heads by angles, forward and backward. transformers spells it in
slices that autograd follows, which is many small passes more. Does not know attention.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["rotated"]


def rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads turned by their positions (Su et al. 2021, arXiv:2104.09864).

    Args:
        heads: queries or keys, shape (tokens, heads, size).
        cos: shape (tokens, size), its halves equal, as LLaMA lays them out.
        sin: as `cos`.
    """
    out: torch.Tensor = _Rotation.apply(heads, cos, sin)
    return out


class _Rotation(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        half = heads.shape[-1] // 2
        cos, sin = cos[:, None, :half], sin[:, None, :half]
        ctx.save_for_backward(cos, sin)
        return _turned(heads, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(gradients[0], cos, sin, -1), None, None


def _turned(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int
) -> torch.Tensor:
    out = torch.empty_like(heads, memory_format=torch.contiguous_format)
    first, second = heads.chunk(2, dim=-1)
    above, below = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=above)
    above.addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=below)
    below.addcmul_(first, sin, value=direction)
    return out
