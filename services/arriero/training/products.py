"""Attention on CPUs as plain matrix products, rotary embedding included.

Responsibility: causal attention inside of samples that lie one after the other, with a
backward pass of its own. torch's kernel for that takes three times as long as products
in bfloat16, which the hardware multiplies. Does not know modules or weights.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

__all__ = ["attend"]

# Samples are padded to a multiple of it here: whole tiles, and few shapes, for each of
# which oneDNN compiles a kernel.
_STEP = 32
# Up to so many tokens the probabilities are kept; above they are computed again.
_KEPT = 256

_Span = tuple[int, int]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    angles: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Causal attention within each sample.

    Args:
        query: shape (tokens, heads, size).
        key: shape (tokens, heads of keys, size); heads share them in groups.
        value: as `key`.
        lengths: of the samples; their sum is `tokens`.
        scale: of the products.
        angles: cosines and sines that `query` and `key` are to be rotated by, shape
            (tokens, size) each, the halves of a head being its coordinates (Su et al.
            2021, arXiv:2104.09864, as LLaMA lays them out); none if they are rotated.

    Returns:
        Shape as `query`.
    """
    cos, sin = (None, None) if angles is None else (part.to(value.dtype) for part in angles)
    out: torch.Tensor = _Attention.apply(query, key, value, cos, sin, lengths, scale)
    return out


class _Attention(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor | None,
        sin: torch.Tensor | None,
        lengths: tuple[int, ...],
        scale: float,
    ) -> torch.Tensor:
        groups = query.shape[1] // key.shape[1]
        out = torch.empty(query.shape, dtype=value.dtype)
        kept: list[torch.Tensor | None] = []
        for padded, spans in _runs(lengths):
            q, k = (_gathered(item, padded, spans, value.dtype, cos, sin) for item in (query, key))
            v = _gathered(value, padded, spans, value.dtype)
            weights = None
            if padded <= _KEPT:
                q3, k3, v3 = _products(q, k, v)
                weights = _probabilities(q3, k3, scale, groups)
                found = torch.bmm(weights, v3).view(q.shape)
            else:
                found = functional.scaled_dot_product_attention(
                    q, k, v, is_causal=True, scale=scale, enable_gqa=groups > 1
                )
            _scatter(out, found, spans)
            kept += [q, k, v, weights]
        ctx.save_for_backward(cos, sin, *kept)
        ctx.lengths, ctx.scale = lengths, scale
        ctx.kinds = query.dtype, key.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = gradients
        cos, sin, *kept = ctx.saved_tensors
        tokens, heads, size = grad.shape
        keys = kept[1].shape[1]
        grad = grad.to(kept[2].dtype)
        d_query = torch.empty(grad.shape, dtype=grad.dtype)
        d_key, d_value = (torch.empty((tokens, keys, size), dtype=grad.dtype) for _ in range(2))
        if cos is not None:  # the scale goes along with the rotation
            cos, sin = cos * ctx.scale, sin * ctx.scale
        for number, (padded, spans) in enumerate(_runs(ctx.lengths)):
            q, k, v, weights = kept[4 * number : 4 * number + 4]
            g = _gathered(grad, padded, spans, v.dtype)
            q3, k3, v3 = _products(q, k, v)
            g3 = g.view(q3.shape)
            if weights is None:
                weights = _probabilities(q3, k3, ctx.scale, heads // keys)
            _scatter(d_value, torch.bmm(weights.transpose(1, 2), g3).view(v.shape), spans)
            errors = torch.bmm(g3, v3.transpose(1, 2))
            errors = torch.ops.aten._softmax_backward_data(errors, weights, -1, errors.dtype)
            if cos is None:
                errors.mul_(ctx.scale)
            _scatter(d_query, torch.bmm(errors, k3).view(q.shape), spans, cos, sin)
            _scatter(d_key, torch.bmm(errors.transpose(1, 2), q3).view(k.shape), spans, cos, sin)
        return d_query.to(ctx.kinds[0]), d_key.to(ctx.kinds[1]), d_value, None, None, None, None


@lru_cache(maxsize=256)
def _runs(lengths: tuple[int, ...]) -> list[tuple[int, list[_Span]]]:
    """Samples that are padded to one length, as (begin, end): one product for all."""
    runs: dict[int, list[_Span]] = {}
    begin = 0
    for length in lengths:
        runs.setdefault(-(-length // _STEP) * _STEP, []).append((begin, begin + length))
        begin += length
    return list(runs.items())


def _products(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(samples, heads, padded, size) to a product per head of keys, its queries side by side."""
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    return q.view(-1, rows, q.shape[3]), k.flatten(0, 1), v.flatten(0, 1)


def _probabilities(q: torch.Tensor, k: torch.Tensor, scale: float, groups: int) -> torch.Tensor:
    scores = torch.baddbmm(_future(groups, k.shape[1], q.dtype), q, k.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, dim=-1)


def _future(groups: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """-inf where a query must not look, shape (groups * length, length)."""
    if length > _KEPT:
        return _masked(groups, length, dtype)
    return _short_future(groups, length, dtype)


def _masked(groups: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    mask = torch.full((length, length), -torch.inf, dtype=dtype).triu_(1)
    return mask.repeat(groups, 1)


_short_future = lru_cache(maxsize=64)(_masked)


def _gathered(
    item: torch.Tensor,
    padded: int,
    spans: list[_Span],
    dtype: torch.dtype,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> torch.Tensor:
    """(tokens, heads, size) to (samples, heads, padded, size): rotated, zeros at the end."""
    found = torch.empty((len(spans), item.shape[1], padded, item.shape[2]), dtype=dtype)
    half = item.shape[2] // 2
    for place, (begin, end) in zip(found, spans, strict=True):
        source, target = item[begin:end].transpose(0, 1).to(dtype), place[:, : end - begin]
        if cos is None or sin is None:
            target.copy_(source)
        else:
            c, s = cos[begin:end], sin[begin:end]
            torch.mul(source, c, out=target)
            target[..., :half].addcmul_(source[..., half:], s[:, :half], value=-1)
            target[..., half:].addcmul_(source[..., :half], s[:, half:])
        place[:, end - begin :].zero_()
    return found


def _scatter(
    target: torch.Tensor,
    found: torch.Tensor,
    spans: list[_Span],
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> None:
    """The way back of `_gathered`; with angles it also turns back."""
    half = target.shape[2] // 2
    for source, (begin, end) in zip(found, spans, strict=True):
        part, place = source[:, : end - begin].transpose(0, 1), target[begin:end]
        if cos is None or sin is None:
            place.copy_(part)
            continue
        c, s = cos[begin:end, None], sin[begin:end, None]
        torch.mul(part, c, out=place)
        place[..., :half].addcmul_(part[..., half:], s[..., half:])
        place[..., half:].addcmul_(part[..., :half], s[..., :half], value=-1)
