"""Frequent small layers in fewer passes over memory.

Responsibility: replace the `forward` of norms and of LoRA layers in a model by
ones that compute the same with less. Each kind is tried against the original
first. Does not know the loop.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["drawing", "install", "is_fused"]

_BITS = 16
_draws = threading.local()


@contextlib.contextmanager
def drawing(generator: torch.Generator | None) -> Iterator[None]:
    """Draw dropout in this thread from a generator; from torch's own outside of it."""
    _draws.generator = generator
    try:
        yield
    finally:
        _draws.generator = None


def is_fused(module: nn.Module) -> bool:
    """Whether `install` replaced the `forward` of a layer."""
    return "forward" in vars(module)


def install(model: nn.Module) -> int:
    """Replace what can be replaced; the number of layers that were.

    Only frozen weights in ordinary layers are: what is trained, quantized or of
    another kind keeps its own `forward`.
    """
    done = 0
    fits: dict[tuple[type, torch.dtype], bool] = {}
    for module in model.modules():
        if _is_lora(module):
            module.forward = MethodType(_lora_forward, module)  # type: ignore[method-assign]
            done += 1
        elif _looks_like_norm(module):
            kind = (type(module), module.weight.dtype)
            if kind not in fits:
                fits[kind] = _is_norm(module)
            if fits[kind]:
                module.forward = MethodType(_norm_forward, module)  # type: ignore[method-assign]
                done += 1
    return done


# RMSNorm


def _looks_like_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(weight, nn.Parameter)
        and weight.ndim == 1
        and not weight.requires_grad
        and _epsilon(module) is not None
    )


def _epsilon(module: Any) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def _is_norm(module: nn.Module) -> bool:
    """Whether the original gives what ours does: some norms add 1 to their weight."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 8, len(weight), generator=generator).to(weight)
    with torch.no_grad():
        expected, found = module(sample).float(), _norm_forward(module, sample).float()
    close = 1e-5 if weight.dtype == torch.float32 else 1e-2
    return bool(torch.allclose(found, expected, rtol=close, atol=close))


def _norm_forward(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    weight, epsilon = module.weight, _epsilon(module)
    out: torch.Tensor
    if hidden.device.type == "cpu":
        out = _Norm.apply(hidden, weight, epsilon)
    elif hidden.dtype == weight.dtype:
        # One kernel, which sums in float32; autocast would widen what goes in.
        with torch.autocast(hidden.device.type, enabled=False):
            out = functional.rms_norm(hidden, weight.shape, weight, epsilon)
    else:
        out = type(module).forward(module, hidden)
    return out


class _Norm(torch.autograd.Function):  # type: ignore[misc]
    """x / rms(x) * weight (Zhang & Sennrich 2019, arXiv:1910.07467).

    With kernels that are one pass each: batch norm scales a channel by a given
    variance, so tokens are its channels; and layer norm's backward with a mean of
    zero lacks one term.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        length = torch.linalg.vector_norm(flat, dim=-1, dtype=torch.float32)
        square = length.square_().div_(flat.shape[-1])
        none = torch.zeros_like(square)
        scaled = functional.batch_norm(flat[None], none, square, eps=epsilon)
        ctx.save_for_backward(flat, weight, square)
        ctx.epsilon = epsilon
        return scaled.to(weight.dtype).mul_(weight).view(hidden.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = gradients
        flat, weight, square = ctx.saved_tensors
        size = flat.shape[-1]
        grad = grad.reshape(-1, size).to(flat.dtype)
        scale = (square + ctx.epsilon).rsqrt_()[:, None]
        result = torch.ops.aten.native_layer_norm_backward(
            grad,
            flat,
            [size],
            torch.zeros_like(scale),
            scale,
            weight.float(),
            None,
            [True, False, False],
        )[0]
        # It took the mean off, as the derivative of layer norm's mean.
        mean = (grad @ weight.to(grad.dtype)[:, None]).mul_(scale / size)
        return result.add_(mean).view(gradients[0].shape), None, None


# LoRA


def _is_lora(module: Any) -> bool:
    from peft.tuners.lora.layer import Linear

    if type(module) is not Linear or type(module.base_layer) is not nn.Linear:
        return False
    base = module.base_layer
    return (
        list(module.lora_A) == ["default"]
        and not module.lora_variant  # DoRA and its like
        and module.lora_B["default"].bias is None
        and not any(weight.requires_grad for weight in base.parameters())
        and type(module.lora_dropout["default"]) in (nn.Dropout, nn.Identity)
    )


def _lora_forward(module: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if module.disable_adapters or module.merged or args or kwargs:
        plain: torch.Tensor = type(module).forward(module, hidden, *args, **kwargs)
        return plain
    dropout = module.lora_dropout["default"]
    share = dropout.p if module.training and isinstance(dropout, nn.Dropout) else 0.0
    out: torch.Tensor = _Lora.apply(
        hidden,
        module.base_layer.weight,
        module.base_layer.bias,
        module.lora_A["default"].weight,
        module.lora_B["default"].weight,
        module.scaling["default"],
        share,
    )
    return out


class _Lora(torch.autograd.Function):  # type: ignore[misc]
    """x W' + scale * dropout(x) A' B' (Hu et al. 2021, arXiv:2106.09685)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        share: float,
    ) -> torch.Tensor:
        device = hidden.device.type
        casts = torch.is_autocast_enabled(device)
        kind = torch.get_autocast_dtype(device) if casts else hidden.dtype
        flat = hidden.reshape(-1, hidden.shape[-1]).to(kind)
        weight, a, b = weight.to(kind), a.to(kind), b.to(kind)
        keep = None
        seen = flat
        if share > 0:
            keep, share = _keep(flat, share)
            seen = flat * keep
            scale = scale / (1 - share)
        low = seen @ a.t()
        out = functional.linear(flat, weight, None if bias is None else bias.to(kind))
        out.addmm_(low, b.t(), alpha=scale)
        ctx.save_for_backward(flat, weight, a, b, low, keep)
        ctx.scale, ctx.kind = scale, hidden.dtype
        return out.view(*hidden.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = gradients
        flat, weight, a, b, low, keep = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1]).to(flat.dtype)
        d_b = (grad.t() @ low).float().mul_(ctx.scale)
        d_low = (grad @ b).mul_(ctx.scale)
        d_a = (d_low.t() @ (flat if keep is None else flat * keep)).float()
        d_hidden = None
        if ctx.needs_input_grad[0]:
            d_hidden = grad @ weight
            if keep is None:
                d_hidden.addmm_(d_low, a)
            else:
                d_hidden.addcmul_(d_low @ a, keep)
            d_hidden = d_hidden.view(*gradients[0].shape[:-1], -1).to(ctx.kind)
        return d_hidden, None, None, d_a, d_b, None, None


def _keep(like: torch.Tensor, share: float) -> tuple[torch.Tensor, float]:
    """A random mask of ones and zeros, and the share of zeros that it really draws.

    On CPUs four values from one 64-bit word: torch's own draws one word a value and took
    a tenth of a training step. The share is exact to 1 / 65536.
    """
    if like.device.type != "cpu":
        return torch.empty_like(like).bernoulli_(1 - share), share
    words = torch.empty(-(-like.numel() // (64 // _BITS)), dtype=torch.int64)
    generator = getattr(_draws, "generator", None)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: like.numel()]
    dropped = min(round(share * 2**_BITS), 2**_BITS - 1)
    kept = torch.empty_like(like)
    torch.ge(bits.view(like.shape), dropped - 2 ** (_BITS - 1), out=kept)
    return kept, dropped / 2**_BITS
