"""How much room there is.

Responsibility: free space, the quota, and refusing early with the figures.
Does not know who asks.
"""

from __future__ import annotations

import os
from pathlib import Path

from arriero.errors import DiskFull, InvalidArgument
from arriero.store.files import free_bytes, tree_size

QUOTA_VARIABLE = "ARRIERO_STORE_QUOTA_BYTES"


def quota() -> int | None:
    """The bytes that the store may hold, from the environment; None for no limit.

    Raises:
        InvalidArgument: not a count of bytes.
    """
    text = os.environ.get(QUOTA_VARIABLE, "").strip()
    if not text:
        return None
    if not text.isdecimal():
        raise InvalidArgument.field(QUOTA_VARIABLE, f"{text!r}: expected a count of bytes")
    return int(text)


def room(root: Path) -> tuple[int, str]:
    """Bytes that may still be written below `root`, and what limits them."""
    free = free_bytes(root)
    limit = quota()
    if limit is not None:
        left = max(0, limit - tree_size(root))
        if left < free:
            return left, f"the store's quota of {shown(limit)} ({QUOTA_VARIABLE})"
    return free, f"the filesystem of {root}"


def preflight(root: Path, needed: int) -> None:
    """Refuse work that will not fit.

    Args:
        needed: bytes that the work is going to write.

    Raises:
        DiskFull: with needed and free bytes.
    """
    _refuse(needed, *room(root))


def preflight_disk(directory: Path, needed: int) -> None:
    """Refuse work that will not fit the disk of a directory, whatever the store's quota is.

    Raises:
        DiskFull: with needed and free bytes.
    """
    _refuse(needed, free_bytes(directory), f"the filesystem of {directory}")


def _refuse(needed: int, free: int, limit: str) -> None:
    if needed > free:
        raise DiskFull(
            f"{shown(needed)} needed ({needed} bytes), {shown(free)} free ({free} bytes) within "
            f"{limit}; free some (`arriero artifacts gc`), or give the store more room",
            needed=needed,
            free=free,
        )


def check_quota(limit: int, size: int, others: int) -> None:
    """Refuse to publish `size` bytes where `others` are in the store, and `limit` may be.

    Raises:
        DiskFull: with needed and free bytes.
    """
    free = max(0, limit - others)
    if size > free:
        raise DiskFull(
            f"publishing needs {shown(size)} ({size} bytes), {shown(free)} free ({free} bytes) "
            f"within the store's quota of {shown(limit)} ({QUOTA_VARIABLE}); free some "
            "(`arriero artifacts gc`), or raise it",
            needed=size,
            free=free,
        )


def shown(count: int) -> str:
    """Bytes as people read them, in powers of 1024."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
