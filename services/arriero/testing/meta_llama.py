"""Tiny LLaMAs in Meta's layout, and the forward pass that defines what they say.

Responsibility: the oracle for layouts. Rotates neighbouring pairs by complex
numbers, as Meta's code does, so that a wrong order of rows in wq or wk shows in
the logits. Does not know the conversion that it judges.
"""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention, silu

# Axis by which the ranks share a tensor; the rest is whole at each.
COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
ROWS = (
    *("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"),
    *("feed_forward.w1.weight", "feed_forward.w3.weight", "output.weight"),
)


def axis_of(name: str, *, vocabulary_rows: bool) -> int | None:
    """The axis that the ranks share; None when each has all of it."""
    if name.startswith("tok_embeddings"):
        return 0 if vocabulary_rows else 1
    if name.endswith(COLUMNS):
        return 1
    return 0 if name.endswith(ROWS) else None


def random_state(
    params: dict[str, Any], inner: int, vocabulary: int, seed: int = 0
) -> dict[str, Any]:
    """A whole float32 state dict of a model with these `params.json`."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    dim, heads = params["dim"], params["n_heads"]
    keys = params.get("n_kv_heads", heads) * (dim // heads)
    state = {"tok_embeddings.weight": matrix(vocabulary, dim) * dim**0.5}
    for i in range(params["n_layers"]):
        state |= {
            f"layers.{i}.attention.wq.weight": matrix(dim, dim),
            f"layers.{i}.attention.wk.weight": matrix(keys, dim),
            f"layers.{i}.attention.wv.weight": matrix(keys, dim),
            f"layers.{i}.attention.wo.weight": matrix(dim, dim),
            f"layers.{i}.feed_forward.w1.weight": matrix(inner, dim),
            f"layers.{i}.feed_forward.w2.weight": matrix(dim, inner),
            f"layers.{i}.feed_forward.w3.weight": matrix(inner, dim),
            f"layers.{i}.attention_norm.weight": 1 + 0.1 * torch.randn(dim, generator=generator),
            f"layers.{i}.ffn_norm.weight": 1 + 0.1 * torch.randn(dim, generator=generator),
        }
    state["norm.weight"] = 1 + 0.1 * torch.randn(dim, generator=generator)
    state["output.weight"] = matrix(vocabulary, dim)
    return state


def save(
    directory: Path,
    params: dict[str, Any],
    state: dict[str, Any],
    *,
    ranks: int = 1,
    vocabulary_rows: bool = False,
) -> None:
    """As Meta ships a checkpoint."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "params.json").write_text(json.dumps(params))
    for rank in range(ranks):
        shard = {}
        for name, tensor in state.items():
            axis = axis_of(name, vocabulary_rows=vocabulary_rows)
            part = tensor if axis is None else tensor.chunk(ranks, axis)[rank]
            shard[name] = part.clone().contiguous()
        shard["rope.freqs"] = torch.ones(4)
        torch.save(shard, directory / f"consolidated.{rank:02d}.pth")


def load(directory: Path, *, vocabulary_rows: bool = False) -> dict[str, Any]:
    """The whole tensors of a checkpoint."""
    shards = [
        torch.load(path, weights_only=True, mmap=True)
        for path in sorted(directory.glob("consolidated.*.pth"))
    ]
    whole = {}
    for name, tensor in shards[0].items():
        axis = axis_of(name, vocabulary_rows=vocabulary_rows)
        whole[name] = tensor if axis is None else torch.cat([s[name] for s in shards], axis)
    return whole


def tiny_ranks(path: Path) -> Path:
    """Write a tiny tiktoken file of 265 ranks: the bytes, and some pairs of them."""
    tokens = [bytes([i]) for i in range(256)]
    for piece in (b"ll", b"am", b"llam", b"llama", b" t", b"he", b" the", b"12", b"123"):
        tokens.append(piece)
    path.write_text(
        "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens))
    )
    return path


def hidden_dim(params: dict[str, Any]) -> int:
    """The width of the feed-forward layers, by Meta's formula."""
    inner = int(2 * (4 * params["dim"]) / 3)
    if "ffn_dim_multiplier" in params:
        inner = int(params["ffn_dim_multiplier"] * inner)
    multiple = int(params["multiple_of"])
    return multiple * ((inner + multiple - 1) // multiple)


def scaled(frequencies: torch.Tensor) -> torch.Tensor:
    """Llama 3.1's scaled rope, with the figures that Meta's code has built in.

    Waves that are long beside the context that was trained on are slowed down by 8,
    short ones stay, and those between are blended.
    """
    turns = 8192 * frequencies / (2 * math.pi)  # in the context that was trained on
    share = ((turns - 1.0) / (4.0 - 1.0)).clamp(0, 1)
    return (1 - share) * frequencies / 8.0 + share * frequencies


def logits(params: dict[str, Any], state: dict[str, Any], ids: list[int]) -> torch.Tensor:
    """float32 logits, one row a token."""
    state = {name: tensor.float() for name, tensor in state.items()}
    dim, heads = params["dim"], params["n_heads"]
    groups, head = params.get("n_kv_heads", heads), dim // heads
    theta = params.get("rope_theta", 10000.0)
    frequencies = 1.0 / theta ** (torch.arange(0, head, 2).float() / head)
    if params.get("use_scaled_rope"):
        frequencies = scaled(frequencies)
    angles = torch.outer(torch.arange(len(ids)).float(), frequencies)
    rotation = torch.polar(torch.ones_like(angles), angles)[:, None, :]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * rotation).flatten(-2)

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weight

    x = state["tok_embeddings.weight"][torch.tensor(ids)]
    for i in range(params["n_layers"]):
        layer = {
            name.removeprefix(f"layers.{i}.").removesuffix(".weight"): tensor
            for name, tensor in state.items()
            if name.startswith(f"layers.{i}.")
        }
        y = norm(x, layer["attention_norm"])
        q = rotate((y @ layer["attention.wq"].T).view(len(ids), heads, head))
        k = rotate((y @ layer["attention.wk"].T).view(len(ids), groups, head))
        v = (y @ layer["attention.wv"].T).view(len(ids), groups, head)
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (k, v))
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + mixed[0].transpose(0, 1).reshape(len(ids), dim) @ layer["attention.wo"].T
        y = norm(x, layer["ffn_norm"])
        gate = silu(y @ layer["feed_forward.w1"].T) * (y @ layer["feed_forward.w3"].T)
        x = x + gate @ layer["feed_forward.w2"].T
    return norm(x, state["norm.weight"]) @ state["output.weight"].T
