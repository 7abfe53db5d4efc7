"""Which rows are kept, in which order, and which are held out.

Responsibility: a shuffle and a split that are the same on every machine and
with every version of every library. Does not know what rows hold.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from arriero.errors import InvalidArgument

# Row numbers: 4 bytes each, since there is one for every row of every source.
Rows = npt.NDArray[np.int32]

_COPY = np.uint64(0x9E3779B97F4A7C15)


def ranks(rows: Rows, seed: int, copy: int = 0) -> npt.NDArray[np.uint64]:
    """A number for each row by which it is shuffled: a hash of row, copy and seed.

    The finalizer of SplitMix64 (Steele, Lea and Flood, 2014), a bijection: no
    two rows of a copy share a rank.
    """
    key = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    start = (int.from_bytes(key, "little") + copy * int(_COPY)) % 2**64
    found: npt.NDArray[np.uint64] = rows.astype(np.uint64)
    found *= _COPY
    found += np.uint64(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        found ^= found >> np.uint64(shift)
        found *= np.uint64(factor)
    found ^= found >> np.uint64(31)
    return found


def shuffled(rows: Rows, seed: int) -> Rows:
    """Row numbers in the order of their ranks."""
    return rows[np.argsort(ranks(rows, seed), kind="stable")]


def mixed(parts: Sequence[Rows], weights: Sequence[float], seed: int) -> Rows:
    """The rows of several sources, each as often as its source's weight says, shuffled.

    A weight of 2.5 takes every row twice, and half of them, by their rank, a
    third time.
    """
    taken, order = [], []
    for rows, weight in zip(parts, weights, strict=True):
        whole = math.floor(weight)
        some = round((weight - whole) * len(rows))
        copies = [rows] * whole + ([shuffled(rows, seed)[:some]] if some else [])
        for copy, items in enumerate(copies):
            taken.append(items)
            order.append(ranks(items, seed, copy))
    if not taken:
        return np.empty(0, dtype=np.int32)
    return np.concatenate(taken)[np.argsort(np.concatenate(order), kind="stable")]


def split(order: Rows, size: float) -> tuple[Rows, Rows]:
    """Rows to train on and rows held out: the first distinct ones, in no copy trained on.

    Raises:
        InvalidArgument: nothing would be left to train on.
    """
    if len(order) == 0 or size == 0:
        return order, order[:0]
    marks = np.zeros(int(order.max()) + 1, dtype=np.bool_)
    marks[order] = True
    distinct = order
    if marks.sum() < len(order):
        _, first = np.unique(order, return_index=True)
        distinct = order[np.sort(first)]
    val = distinct[: held_out(len(distinct), size)]
    marks[:] = False
    marks[val] = True
    return order[~marks[order]], val


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
    if count and count >= rows:
        raise InvalidArgument.field(
            "val_set_size",
            f"{size:g} holds out {count} of {rows} usable rows and leaves none to train on; "
            f"expected less than {rows}",
        )
    return count
