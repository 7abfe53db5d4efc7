"""Attention inside of samples that lie one after the other, without padding.

Responsibility: an attention function that transformers' LLaMA-like models call
by name, told by `sample_lengths` where samples begin and end. No token sees
another sample, and no mask is made for that. Does not know layers or weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch 2.10 brought it
    varlen_attn = None

from arriero.training.products import attend
from arriero.training.rotation import rotated

__all__ = ["register", "sample_attention", "whole_heads"]

NAME = "arriero_samples"

# FlashAttention's (Dao 2023, arXiv:2307.08691): GPUs since Ampere, 16 bits, heads up to 256.
_FLASH_CAPABILITY, _FLASH_SIZE = (8, 0), 256
_FLASH_TYPES = {torch.float16, torch.bfloat16}


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
    if not dropout and sliding_window is None and query.shape[-1] == value.shape[-1]:
        q, k, v = (item[0].transpose(0, 1) for item in (query, key, value))
        return whole_heads(q, k, v, lengths, scale).transpose(0, 1)[None]
    return sample_attention(query, key, value, lengths, scale, dropout, sliding_window)


def whole_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """As `products.attend`, by what the device has for it."""
    if query.device.type == "cpu":
        return attend(query, key, value, lengths, scale, angles)
    if angles is not None:
        query, key = (rotated(item, *angles).to(value.dtype) for item in (query, key))
    if _flashes(query):
        bounds, most = _bounds(lengths, query.device), max(lengths)
        # torch 2.13 wants to be told what the kernel always could.
        shared = {"enable_gqa": query.shape[1] != key.shape[1]} if _tells_groups() else {}
        out: torch.Tensor = varlen_attn(
            query,
            key,
            value,
            bounds,
            bounds,
            most,
            most,
            scale=scale,
            window_size=(-1, 0),
            **shared,
        )
        return out
    q, k, v = (item.transpose(0, 1)[None] for item in (query, key, value))
    return sample_attention(q, k, v, lengths, scale)[0].transpose(0, 1)


def _flashes(query: torch.Tensor) -> bool:
    """Whether one kernel takes all samples of a row."""
    return (
        varlen_attn is not None
        and query.device.type == "cuda"
        and query.dtype in _FLASH_TYPES
        and query.shape[-1] <= _FLASH_SIZE
        and torch.cuda.get_device_capability(query.device) >= _FLASH_CAPABILITY
    )


@lru_cache(maxsize=1)
def _tells_groups() -> bool:
    return "enable_gqa" in inspect.signature(varlen_attn).parameters


@lru_cache(maxsize=8)
def _bounds(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Where samples begin and end, on the device: every layer asks for the same."""
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return bounds.pin_memory().to(device, non_blocking=True)


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
