"""Several samples to a sequence, so that little of a batch is padding.

Responsibility: which samples share a sequence, and in which order. Does not
know what samples hold; that attention stays within one is the trainer's part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# Samples that are packed among themselves. First-fit-decreasing is close to the
# best packing long before this many, and a window keeps memory and time bounded
# and the shuffle local.
WINDOW = 8192


@dataclass(frozen=True, slots=True)
class Packing:
    """Samples in the order of their sequences.

    Attributes:
        order: int64, shape (samples,): positions in what was packed.
        counts: int64, shape (sequences,): samples of each sequence.
    """

    order: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


def pack(lengths: npt.NDArray[np.int64], capacity: int) -> Packing:
    """Pack samples into sequences of at most `capacity` tokens; deterministic.

    First-fit-decreasing (Johnson, 1973) within windows of `WINDOW` samples.
    Sequences come in the order of their first sample, and so do the samples of
    a sequence: what was shuffled stays so.

    Args:
        lengths: tokens of each sample, none above `capacity`.
        capacity: tokens of a sequence at most.
    """
    orders, counts = [], []
    for start in range(0, len(lengths), WINDOW):
        sequence = _first_fit_decreasing(lengths[start : start + WINDOW], capacity)
        _, first, count = np.unique(sequence, return_index=True, return_counts=True)
        orders.append(start + np.argsort(first[sequence], kind="stable"))
        counts.append(count[np.argsort(first)])
    if not orders:
        return Packing(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    return Packing(np.concatenate(orders), np.concatenate(counts).astype(np.int64))


def _first_fit_decreasing(lengths: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
    """The sequence of each sample: the first that has room, longest samples first."""
    room = np.empty(len(lengths), dtype=np.int64)
    sequence = np.empty(len(lengths), dtype=np.int64)
    opened = 0
    for sample in np.argsort(-lengths, kind="stable"):
        length = lengths[sample]
        place = int((room[:opened] >= length).argmax()) if opened else 0
        if place == opened or room[place] < length:
            place = opened
            room[place] = capacity
            opened += 1
        room[place] -= length
        sequence[sample] = place
    return sequence
