"""The two halves of a LLaMA block in fewer passes over memory.

Responsibility: replace the `forward` of attention and feed-forward modules by ones that
compute the same with less. Each kind is tried against the original first. Does not know
what the linear layers inside are: plain, LoRA, quantized, sharded.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from arriero.training.attention import whole_heads

__all__ = ["install"]

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def install(model: nn.Module) -> int:
    """Replace what can be replaced, in a model whose attention knows `sample_lengths`.

    Returns:
        The number of modules that were.
    """
    done = 0
    fits: dict[type, bool] = {}
    for module in model.modules():
        kind = type(module)
        if _looks_like_attention(module):
            if kind not in fits:
                fits[kind] = _is_attention(module)
            if fits[kind]:
                module.forward = MethodType(_attention_forward, module)  # type: ignore[method-assign]
                done += 1
        elif _looks_like_swiglu(module):
            if kind not in fits:
                fits[kind] = _is_swiglu(module)
            if fits[kind]:
                module.forward = MethodType(_swiglu_forward, module)  # type: ignore[method-assign]
                done += 1
    return done


# Attention


def _looks_like_attention(module: Any) -> bool:
    return (
        all(isinstance(getattr(module, name, None), nn.Module) for name in _PROJECTIONS)
        and isinstance(getattr(module, "head_dim", None), int)
        and isinstance(getattr(module, "scaling", None), float)
        and not getattr(module, "attention_dropout", 0.0)
    )


def _window(module: Any) -> int | None:
    owner = module if hasattr(module, "sliding_window") else getattr(module, "config", None)
    window = getattr(owner, "sliding_window", None)
    return window if isinstance(window, int) else None


def _attention_forward(
    module: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    lengths = kwargs.get("sample_lengths")
    angles = kwargs.get("position_embeddings")
    window = _window(module)
    if (
        args
        or lengths is None
        or angles is None
        or kwargs.get("past_key_values") is not None
        or (window is not None and window < max(lengths))
    ):
        found: tuple[torch.Tensor, None] = type(module).forward(
            module, hidden_states, *args, **kwargs
        )
        return found
    query, key, value = (
        getattr(module, name)(hidden_states)[0].unflatten(-1, (-1, module.head_dim))
        for name in ("q_proj", "k_proj", "v_proj")
    )
    cos, sin = angles
    out = whole_heads(query, key, value, tuple(lengths), module.scaling, (cos[0], sin[0]))
    return module.o_proj(out.flatten(1)[None]), None


def _is_attention(module: Any) -> bool:
    """Whether the original gives what ours does: some norm their heads, or turn half of them."""
    lengths = (5, 3)
    hidden, how = _sample(module.q_proj, sum(lengths))
    places = torch.cat([torch.arange(length) for length in lengths])
    half = torch.outer(places.float(), 0.5 ** torch.arange(module.head_dim // 2))
    angles = torch.cat((half, half), dim=-1)[None].to(hidden.device)
    given = {
        "position_embeddings": (angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)),
        "attention_mask": None,
        "position_ids": places[None].to(hidden.device),
        "sample_lengths": lengths,
    }
    return _agree(module, _attention_forward, hidden, how, given)


# SwiGLU


def _looks_like_swiglu(module: Any) -> bool:
    names = dict(module.named_children())
    return set(names) == {*_FEED_FORWARD, "act_fn"} and type(names["act_fn"]).__name__ in (
        "SiLU",
        "SiLUActivation",
    )


def _swiglu_forward(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    inner = _SwiGLU.apply(module.gate_proj(hidden), module.up_proj(hidden))
    out: torch.Tensor = module.down_proj(inner)
    return out


def _is_swiglu(module: Any) -> bool:
    hidden, how = _sample(module.gate_proj, 8)
    return _agree(module, _swiglu_forward, hidden, how, {})


class _SwiGLU(torch.autograd.Function):  # type: ignore[misc]
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202), each of its passes once."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        opened = functional.silu(gate)
        ctx.save_for_backward(gate, up, opened)
        return opened * up

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (grad,) = gradients
        gate, up, opened = ctx.saved_tensors
        d_up = grad * opened
        return torch.ops.aten.silu_backward(grad * up, gate), d_up


# Trials


def _sample(linear: Any, tokens: int) -> tuple[torch.Tensor, torch.dtype]:
    """Inputs for a linear layer, plain or with an adapter around it, and their type."""
    weight = getattr(linear, "base_layer", linear).weight
    kind = weight.dtype if weight.is_floating_point() else torch.float32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, tokens, linear.in_features, generator=generator)
    return hidden.to(weight.device, kind), kind


def _agree(
    module: Any, ours: Any, hidden: torch.Tensor, kind: torch.dtype, given: dict[str, Any]
) -> bool:
    training, device = module.training, hidden.device.type
    module.eval()
    # bitsandbytes needs it on GPUs; on CPUs it would pack weights for good.
    casts = torch.autocast(device, dtype=kind, enabled=device != "cpu" and kind != torch.float32)
    try:
        with torch.no_grad(), casts:
            expected = _first(module(hidden, **given)).float()
            found = _first(ours(module, hidden, **given)).float()
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError):
        return False  # called otherwise than this is
    finally:
        module.train(training)
    size = float(expected.abs().max())
    close = (1e-5 if kind == torch.float32 else 3e-2) * size
    return found.shape == expected.shape and bool(
        torch.allclose(found, expected, rtol=0, atol=close)
    )


def _first(result: Any) -> torch.Tensor:
    found: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return found
