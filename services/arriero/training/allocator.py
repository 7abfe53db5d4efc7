"""The allocators under torch: when they have nothing left, and what they hold on to.

Responsibility: tell that memory ran out from other errors, and make freed memory free.
Does not know what it was for. torch is imported only where its words are needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import time
from collections.abc import Callable

__all__ = ["Tidy", "ran_out", "release", "settle"]

# What c10's CPU allocator, mmap and oneDNN say; CUDA has a class of its own.
_SIGNS = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")


# oneDNN keeps a compiled primitive for each shape that it has seen, 1,024 by default. With
# rows of many lengths these grew to 0.7 GB in 20 steps of a 135M model; 128 of them held
# 0.2 GB and cost no time (4.3 s of CPU a step with either).
_PRIMITIVES = "128"
_TIDY_SECONDS = 10.0


# glibc's mallopt: freed memory below its limit stays with the process, as the next micro
# batch takes it again; otherwise each page comes back by a fault, a sixth of a step's time.
# All threads use one arena, as those of others are cut into pieces of 64 MB.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_MALLOC = {
    _M_TRIM_THRESHOLD: (1 << 31) - 1,
    _M_TOP_PAD: 1 << 26,
    _M_MMAP_THRESHOLD: 1 << 25,  # the most that it takes
    _M_ARENA_MAX: 1,
}


# Where a layer's activations are freed and computed again, they leave gaps between the
# few that stay: of 20 layers a process took 3.5 GB, and 1.2 GB where blocks of this size
# go back to the kernel when they are freed.
_SPARING_BYTES = 1 << 20


def settle(*, sparing: bool = False) -> None:
    """Set the allocators up for training; before torch is imported.

    Bounds what oneDNN keeps, unless the environment says how much, and lets glibc keep
    what is freed (`Tidy` and `release` give it back).

    Args:
        sparing: memory matters more than time, as with gradient checkpointing: large
            blocks that are freed are not kept.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", _PRIMITIVES)
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such call
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in _MALLOC.items():
            mallopt(name, value)
        if sparing:
            mallopt(_M_MMAP_THRESHOLD, _SPARING_BYTES)


def ran_out(error: BaseException) -> bool:
    """Whether an allocation failed."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def release(device: str) -> None:
    """Give memory that nobody uses any more back: to the driver, or to the kernel.

    glibc keeps what was freed, and after loading or a long row that is gigabytes.
    """
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
    _trim()


class Tidy:
    """Gives freed memory of the host back every few seconds; called after each step.

    Each time costs some tenths of a second, as pages come back by faults.
    """

    def __init__(self, device: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._wanted, self._clock = device == "cpu", clock
        self._last = clock()

    def __call__(self) -> None:
        """Trim, if it is time."""
        if self._wanted and self._clock() - self._last >= _TIDY_SECONDS:
            _trim()
            self._last = self._clock()


def _trim() -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such call
        ctypes.CDLL(None).malloc_trim(0)
