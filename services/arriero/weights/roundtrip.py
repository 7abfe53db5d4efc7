"""A base as it was while an adapter was trained on it: quantized, and back.

Responsibility: give a checkpoint's linear weights the values that bitsandbytes' 4
or 8 bits leave of them. Does not know how the adapter was trained, nor stores
anything quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.errors import FailedPrecondition
from arriero.weights.health import linear_modules
from arriero.weights.reader import Weights

if TYPE_CHECKING:
    import torch

__all__ = ["Packing", "RoundTrip", "packing_of"]

# The largest int8, which LLM.int8() maps each row's largest magnitude to
# (Dettmers et al. 2022, arXiv:2208.07339).
_INT8_MAX = 127.0


@dataclass(frozen=True, slots=True)
class Packing:
    """How linear weights were quantized.

    Attributes:
        kind: `nf4`, `fp4` (Dettmers et al. 2023, arXiv:2305.14314) or `int8`.
        double: the 4-bit scales were quantized too.
        dtype: torch's word for the type that the weights were loaded in before; empty:
            their own.
        whole: endings of the names of modules that were left alone.
    """

    kind: str
    double: bool = False
    dtype: str = ""
    whole: tuple[str, ...] = ()


def packing_of(spec: Mapping[str, Any]) -> Packing | None:
    """What a resolved training spec says about its base; None where it was not quantized."""
    whole = tuple((spec.get("lora") or {}).get("modules_to_save") or ())
    dtype = str(spec.get("dtype") or "")
    dtype = "" if dtype == "auto" else dtype
    if spec.get("load_in_4bit"):
        kind = str(spec.get("bnb_4bit_quant_type") or "nf4")
        return Packing(kind, bool(spec.get("bnb_4bit_use_double_quant")), dtype, whole)
    return Packing("int8", False, dtype, whole) if spec.get("load_in_8bit") else None


class RoundTrip(Weights):
    """A checkpoint whose linear weights went through bitsandbytes' types once.

    A weight is made as a whole when it is asked for; the last one is kept.
    """

    def __init__(self, weights: Weights, packing: Packing) -> None:
        """See what is altered: linear layers, without the output layer and what is left whole."""
        super().__init__(dict(weights))
        self.packing = packing
        self._altered = frozenset(
            f"{module}.weight"
            for module in linear_modules(weights)
            if not any(part in module.split(".") for part in packing.whole)
        )
        self._last: tuple[str, torch.Tensor] | None = None

    @classmethod
    def of(cls, base: Path, packing: Packing) -> RoundTrip:
        """Open a base, as `Weights.open` does.

        Raises:
            FailedPrecondition: no weights, or bitsandbytes is missing.
        """
        if packing.kind != "int8":
            _bitsandbytes()
        return cls(Weights.open(base), packing)

    @property
    def altered(self) -> frozenset[str]:
        """Names of the tensors whose values are not the files'."""
        return self._altered

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, after the round trip where it makes one, in its own type."""
        if name not in self._altered:
            return super().tensor(name)
        last = self._last  # another thread may put its own there
        if last is None or last[0] != name:
            last = self._last = name, _there_and_back(super().tensor(name), self.packing)
        return last[1]


def _there_and_back(weight: torch.Tensor, packing: Packing) -> torch.Tensor:
    import torch

    loaded = weight.to(getattr(torch, packing.dtype)) if packing.dtype else weight
    if packing.kind == "int8":
        # bitsandbytes quantizes float16, by the largest magnitude of each row.
        half = loaded.to(torch.float16).float()
        largest = half.abs().amax(dim=1, keepdim=True)
        steps = torch.round(half * (_INT8_MAX / largest.clamp_min(1e-30)))
        return (steps * largest / _INT8_MAX).to(weight.dtype)
    functional = _bitsandbytes()
    packed, state = functional.quantize_4bit(
        loaded.contiguous(), compress_statistics=packing.double, quant_type=packing.kind
    )
    found: torch.Tensor = functional.dequantize_4bit(packed, state)
    return found.to(weight.dtype)


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional  # type: ignore[import-untyped]
    except Exception as error:  # it loads a library of its own, and fails in its own ways
        raise FailedPrecondition(
            "the adapter was trained on a 4-bit base, whose values bitsandbytes alone knows; it "
            f"cannot be imported here ({type(error).__name__}: {error}): install it, or set "
            "qlora_base: full"
        ) from error
    return functional
