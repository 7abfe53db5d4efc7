"""Noise on the embeddings while training (NEFTune, Jain et al. 2023, arXiv:2310.05914).

Responsibility: one hook. Does not know what is trained.
"""

from __future__ import annotations

from typing import Any

import torch


def add_noise(model: Any, alpha: float) -> None:
    """Add uniform noise of at most alpha / sqrt(length * width) to embedded tokens.

    Only in training mode, so that held-out losses and golden logits have none.

    Args:
        model: a transformers model, or one with LoRA on it.
        alpha: 5 to 15 in the paper; 0 leaves the model as it is.
    """
    if alpha <= 0:
        return

    def noisy(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        bound = alpha / (output.size(1) * output.size(2)) ** 0.5
        return output + torch.empty_like(output).uniform_(-bound, bound)

    model.get_input_embeddings().register_forward_hook(noisy)
