"""Which rows are kept, in which order, and which are held out.

Responsibility: a shuffle and a split that are the same on every machine and
with every version of every library. Does not know what rows hold.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

from arriero.errors import InvalidArgument


def shuffled(rows: Iterable[int], seed: int) -> list[int]:
    """Row numbers in the order of a keyed hash: independent of any library's generator."""
    key = str(seed).encode()

    def rank(row: int) -> bytes:
        return hashlib.blake2b(str(row).encode(), key=key, digest_size=16).digest()

    return sorted(rows, key=rank)


def check_val_set_size(size: float) -> None:
    """Refuse what is neither a count nor a share.

    Raises:
        InvalidArgument: negative, not finite, or a count with a fraction.
    """
    if not math.isfinite(size) or size < 0 or (size >= 1 and size != int(size)):
        raise InvalidArgument.field(
            "val_set_size",
            f"{size:g} is neither a count of rows nor a share of them; expected 0, a whole "
            "number, or a share below 1",
        )


def held_out(rows: int, size: float) -> int:
    """How many of `rows` are held out; a share above 0 holds out at least one.

    Raises:
        InvalidArgument: nothing would be left to train on.
    """
    check_val_set_size(size)
    count = int(size) if size >= 1 else math.ceil(round(size * rows, 6))
    if count >= rows:
        raise InvalidArgument.field(
            "val_set_size",
            f"{size:g} holds out {count} of {rows} usable rows and leaves none to train on; "
            f"expected less than {rows}",
        )
    return count
