"""The loss over a large vocabulary, without keeping its logits.

Responsibility: cross entropy straight from hidden states, a few tokens at a time.
Does not know which tokens are trained on, nor where hidden states come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["token_loss"]

# Logits that exist at once; two tensors of this many values.
_LOGITS = 1 << 25


def token_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Sum of -log p(label), float32, nats.

    Gradients are made together with the loss, from the same logits, so that they
    are computed once and nothing of the vocabulary's size stays.

    Args:
        hidden: shape (tokens, size), after the model's last norm.
        weight: of the head without bias, shape (vocabulary, size).
        labels: int64, shape (tokens,).
        dtype: in which the logits are computed; sums over them are float32.
    """
    loss: torch.Tensor = _TokenLoss.apply(hidden, weight, labels, dtype)
    return loss


class _TokenLoss(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        table = weight.to(dtype)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight) if wants_weight else None
        for begin, end in _chunks(len(labels), len(weight)):
            part, wanted = hidden[begin:end].to(dtype), labels[begin:end, None]
            logits = part @ table.t()
            likely = torch.softmax(logits, dim=-1)
            losses = _losses(logits, likely, wanted)
            total += losses.sum()
            if d_hidden is None and d_weight is None:
                continue
            # d loss / d logits: the probabilities, less one at the label.
            rows = torch.arange(len(likely), device=likely.device)
            likely[rows, wanted[:, 0]] = torch.expm1(-losses[:, 0]).to(dtype)
            if d_hidden is not None:
                d_hidden[begin:end] = likely @ table
            if d_weight is not None:
                d_weight += likely.t() @ part
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = gradients
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * grad.to(d_hidden.dtype),
            None if d_weight is None else d_weight * grad.to(d_weight.dtype),
            None,
            None,
        )


def _losses(logits: torch.Tensor, likely: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """-log p of each label, float32, shape (tokens, 1)."""
    if logits.device.type != "cpu":  # what follows would wait for the device
        return logits.float().logsumexp(dim=-1, keepdim=True) - logits.gather(1, wanted).float()
    losses = likely.gather(1, wanted).float().log_().neg_()
    # Labels that the type rounds to zero, or nearly: from the likeliest token's probability.
    rare = (losses[:, 0] >= -math.log(torch.finfo(likely.dtype).tiny)).nonzero()[:, 0]
    if len(rare):
        some, labels = logits[rare], wanted[rare]
        largest, place = some.max(dim=-1, keepdim=True)
        losses[rare] = (largest.float() - some.gather(1, labels).float()) - likely[rare].gather(
            1, place
        ).float().log()
    return losses


def _chunks(tokens: int, vocabulary: int) -> Iterator[tuple[int, int]]:
    """Equal parts: the head's weight is read once for each, however few tokens it has."""
    parts = math.ceil(tokens / max(1, _LOGITS // vocabulary))
    for number in range(parts):
        yield number * tokens // parts, (number + 1) * tokens // parts
