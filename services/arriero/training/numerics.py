"""In what numbers, and on what, a training computes.

Responsibility: choose device and types from what was asked and what the machine
has. Does not know models.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.errors import FailedPrecondition

if TYPE_CHECKING:
    import torch

_CPU_INFO = Path("/proc/cpuinfo")
# Instructions with which bfloat16 matrix products beat float32's: Intel's, AMD's, Arm's.
_FAST_BFLOAT16 = {"amx_bf16", "avx512_bf16", "bf16"}
# Dense 16-bit matrix products in FLOP/s, from the vendor's data sheets, by what the
# device's name contains.
_PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "L4": 121e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass(frozen=True, slots=True)
class Numerics:
    """Where and how to compute.

    Attributes:
        device: `cpu` or `cuda`.
        dtype: of the base's weights, which are never trained; matrix products
            run in it too. LoRA's weights, their gradients and moments are float32.
    """

    device: str
    dtype: torch.dtype

    @property
    def scaled(self) -> bool:
        """Whether gradients would underflow without a loss scale."""
        return str(self.dtype) == "torch.float16"

    def autocast(self) -> AbstractContextManager[object]:
        """Around forward passes: products in `dtype`, sums that need it in float32."""
        import torch

        if self.dtype == torch.float32:
            return nullcontext()
        context: AbstractContextManager[object] = torch.autocast(self.device, dtype=self.dtype)
        return context


def choose(dtype: str, *, cpu_info: Path = _CPU_INFO) -> Numerics:
    """Numerics for `auto`, `float32`, `bfloat16` or `float16`.

    `auto` is bfloat16 wherever the hardware multiplies it, otherwise float16 on
    a GPU and float32 on a CPU.

    Raises:
        FailedPrecondition: this machine cannot train in that type.
    """
    import torch

    if torch.cuda.is_available():
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if dtype == "auto":
            dtype = "bfloat16" if bfloat16 else "float16"
        if dtype == "bfloat16" and not bfloat16:
            raise FailedPrecondition(
                f"{torch.cuda.get_device_name()} has no bfloat16; use dtype float16 or auto"
            )
        return Numerics("cuda", getattr(torch, dtype))
    if dtype == "float16":
        raise FailedPrecondition(
            "dtype float16 needs a GPU, and this machine has none that torch can use; use "
            "bfloat16, float32 or auto"
        )
    if dtype == "auto":
        dtype = "bfloat16" if cpu_has_fast_bfloat16(cpu_info) else "float32"
    return Numerics("cpu", getattr(torch, dtype))


def cpu_has_fast_bfloat16(cpu_info: Path = _CPU_INFO) -> bool:
    """Whether the CPU multiplies bfloat16; False where that is not known."""
    try:
        lines = cpu_info.read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        name, _, words = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not _FAST_BFLOAT16.isdisjoint(words.split())
    return False


def peak_flops(numerics: Numerics) -> float | None:
    """What the GPU can do in 16 bits, in FLOP/s; None on a CPU or where it is not known."""
    if numerics.device != "cuda":
        return None
    import torch

    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)
