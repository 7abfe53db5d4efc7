"""Noise on the embeddings while training (NEFTune, Jain et al. 2023, arXiv:2310.05914).

Responsibility: the noise. Does not know when it is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def with_noise(embedded: torch.Tensor, lengths: Sequence[int], alpha: float) -> torch.Tensor:
    """Embedded tokens with uniform noise of at most alpha / sqrt(length * width).

    Args:
        embedded: shape (1, tokens, width), samples one after the other.
        lengths: of the samples; their sum is `tokens`.
        alpha: 5 to 15 in the paper.
    """
    counts = torch.tensor(lengths, device=embedded.device)
    bounds = alpha * (counts * embedded.shape[-1]).rsqrt()
    noise = torch.empty_like(embedded).uniform_(-1, 1)
    each = bounds.repeat_interleave(counts)[None, :, None]
    return embedded + noise * each.to(noise.dtype)
