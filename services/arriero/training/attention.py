"""Attention inside of samples that lie one after the other, without padding.

Responsibility: an attention function that transformers' LLaMA-like models call
by name, told by `sample_lengths` where samples begin and end. No token sees
another sample, and no mask is made for that. Does not know layers or weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from arriero.training.products import attend

__all__ = ["NAME", "register", "sample_attention"]

NAME = "arriero_samples"


def register() -> str:
    """Make the function known to transformers; its name, for `set_attn_implementation`."""
    AttentionInterface.register(NAME, _interface)
    return NAME


def _interface(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    sample_lengths: Sequence[int] | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: heads before tokens in, tokens before heads out."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if sample_lengths is None:  # not from here: each row of the batch is one sample
        whole = (query.shape[2],)
        rows = zip(query.split(1), key.split(1), value.split(1), strict=True)
        outs = [_attend(q, k, v, whole, scale, dropout, sliding_window) for q, k, v in rows]
        return torch.cat(outs).transpose(1, 2), None
    out = _attend(query, key, value, tuple(sample_lengths), scale, dropout, sliding_window)
    return out.transpose(1, 2), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    if sliding_window is not None and sliding_window >= max(lengths):
        sliding_window = None
    # Weights in float32 under autocast: rotating by float32 angles widens these two.
    query, key = query.to(value.dtype), key.to(value.dtype)
    plain = sliding_window is None and not dropout and query.shape[-1] == value.shape[-1]
    if query.device.type == "cpu" and plain:
        q, k, v = (item[0].transpose(0, 1) for item in (query, key, value))
        return attend(q, k, v, lengths, scale).transpose(0, 1)[None]
    return sample_attention(query, key, value, lengths, scale, dropout, sliding_window)


def sample_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    scale: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Causal attention within each sample.

    Args:
        query: shape (1, heads, tokens, size).
        key: shape (1, heads of keys, tokens, size); heads share them in groups.
        value: as `key`.
        lengths: of the samples; their sum is `tokens`.
        scale: of the products.
        dropout: of the probabilities.
        sliding_window: tokens that a token sees at most, itself included.

    Returns:
        Shape as `query`.
    """
    parts = []
    for begin, count, length in _runs(lengths):
        q, k, v = (_batched(item, begin, count, length) for item in (query, key, value))
        mask = None
        if sliding_window is not None and sliding_window < length:
            ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
            mask = ones.tril() & ones.triu(1 - sliding_window)
        out = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        parts.append(out.transpose(0, 1).reshape(1, query.shape[1], count * length, -1))
    return torch.cat(parts, dim=2)


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first token, samples, tokens of each) of neighbours of one length: one product for all."""
    begin = 0
    for length, same in groupby(lengths):
        count = sum(1 for _ in same)
        yield begin, count, length
        begin += count * length


def _batched(item: torch.Tensor, begin: int, count: int, length: int) -> torch.Tensor:
    """(1, heads, tokens, size) to (samples, heads, length, size) of one run."""
    part = item[0, :, begin : begin + count * length]
    return part.unflatten(1, (count, length)).transpose(0, 1)
