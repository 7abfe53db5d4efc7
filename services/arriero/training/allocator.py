"""The allocators under torch: when they have nothing left, and what they hold on to.

Responsibility: tell that memory ran out from other errors, and make freed memory free.
Does not know what it was for.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc

import torch

__all__ = ["ran_out", "release"]

# What c10's CPU allocator, mmap and oneDNN say; CUDA has a class of its own.
_SIGNS = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory")


def ran_out(error: BaseException) -> bool:
    """Whether an allocation failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def release(device: str) -> None:
    """Give memory that nobody uses any more back: to the driver, or to the kernel.

    glibc keeps what was freed, and after loading or a long row that is gigabytes.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # another C library has no such call
        ctypes.CDLL(None).malloc_trim(0)
