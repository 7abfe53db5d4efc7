"""The sum that one merged tensor is, in blocks of rows.

Responsibility: base + what each adapter adds, in float32, in memory that is used
again. Does not know names or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from arriero.weights.arithmetic import delta

if TYPE_CHECKING:
    import torch

    from arriero.weights.lora import LoraPair

__all__ = ["BLOCK", "Room", "Term", "cut", "sum_rows"]

# float32 bytes of a block that is computed at once: small enough for the cache.
BLOCK = 1 << 19
# Columns that are read at once: as many as fill a cache line in any type.
_COLUMNS = 64


class Term:
    """An adapter's share of one tensor: weight · (own - base) + scale · left · right.

    Attributes:
        weight: of the adapter in the merge.
        own: the base's values, or those that the adapter brings whole.
        pair: its LoRA on this tensor.
        left: shape (rows, rank), float32.
        right: shape (rank, columns), float32.
        scale: LoRA's, by the adapter's weight; 1 where `left` is scaled already.
        fused: the product may be summed up where it is added: that saves a pass, and
            rounds as the sum of two does or, by the library, in other last bits.
        magnitude: DoRA's m.
        norms: of the columns, where m scales columns.
    """

    left: torch.Tensor
    right: torch.Tensor
    norms: torch.Tensor

    def __init__(self, weight: float, own: torch.Tensor) -> None:
        """Take what there is without LoRA."""
        self.weight = weight
        self.own = own
        self.pair: LoraPair | None = None
        self.scale = 0.0
        self.fused = False
        self.magnitude: torch.Tensor | None = None

    def add_pair(
        self,
        pair: LoraPair,
        factors: tuple[torch.Tensor, torch.Tensor],
        magnitude: torch.Tensor | None,
        *,
        rounded: bool,
    ) -> None:
        """Take LoRA's matrices; norms of columns are computed here, once.

        Args:
            pair: what it is.
            factors: left and right, as stored.
            magnitude: DoRA's m.
            rounded: the sum is rounded to fewer bits than float32 has.
        """
        self.pair = pair
        self.left, self.right = (factor.float() for factor in factors)
        self.scale = pair.scale * self.weight
        # PEFT scales the product, which is a pass over all of it. Scaling B instead is the
        # same to the last bit for powers of two, and else off by what rounding hides.
        if math.frexp(self.scale)[0] in (0.5, -0.5) or (rounded and not pair.embedding):
            self.left, self.scale = self.left * self.scale, 1.0
        self.fused = rounded and magnitude is None and not pair.embedding
        self.magnitude = None if magnitude is None else magnitude.float()
        if magnitude is not None and pair.transposed:
            self.norms = _column_norms(self)


class Room:
    """Memory for intermediate values, kept: fresh pages would cost more than the sums.

    Attributes:
        used: how many values are in use; setting it to 0 gives all of them back.
    """

    def __init__(self) -> None:
        """Nothing is kept yet."""
        self._kept: list[torch.Tensor] = []
        # Looking up is several times quicker than cutting to shape, block after block.
        self._shaped: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
        self.used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with whatever values."""
        at, self.used = self.used, self.used + 1
        found = self._shaped.get((at, shape))
        if found is None or found.dtype != dtype:
            found = self._shaped[at, shape] = self._shape(at, shape, dtype)
        return found

    def _shape(self, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        import torch

        size = math.prod(shape)
        if at == len(self._kept):
            self._kept.append(torch.empty(size, dtype=dtype))
        elif self._kept[at].numel() < size or self._kept[at].dtype != dtype:
            self._kept[at] = torch.empty(size, dtype=dtype)
            self._shaped = {key: value for key, value in self._shaped.items() if key[0] != at}
        return self._kept[at][:size].view(shape)


def sum_rows(
    base: torch.Tensor, terms: Sequence[Term], start: int, out: torch.Tensor, room: Room
) -> None:
    """Compute as many rows as `out` has, from `start` on, rounded once to its type."""
    import torch

    stop = start + out.shape[0]
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    room.used = 0

    def fresh(source: torch.Tensor) -> torch.Tensor:
        return room.empty(out.shape, wide).copy_(source[start:stop])

    total: torch.Tensor | None = None
    for term in terms:
        if total is None and term.weight == 1.0:
            total = fresh(term.own)
        else:
            total = fresh(base) if total is None else total
            if term.own is not base:
                total += fresh(term.own).sub_(fresh(base)).mul_(term.weight)
        if term.fused:
            total.addmm_(term.left[start:stop], term.right)
        elif term.pair is not None:
            change = room.empty(out.shape, torch.float32)
            delta(term.left[start:stop], term.right, term.scale, out=change)
            if term.pair.embedding and term.magnitude is None:
                change = change.to(out.dtype)  # PEFT rounds it, here alone
            total += change
            if term.magnitude is not None:
                direction = fresh(term.own).add_(change)
                total *= _stretch(term, direction, start, stop)
    assert total is not None, "what is touched has terms"
    out.copy_(total)


def _stretch(term: Term, direction: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """DoRA's m / ||W + scale · B·A||, to multiply rows (or, transposed, columns) by."""
    import torch

    assert term.magnitude is not None
    assert term.pair is not None
    if term.pair.transposed:
        return (term.magnitude / term.norms).view(1, -1)
    return (term.magnitude[start:stop] / torch.linalg.norm(direction, dim=1)).view(-1, 1)


def _column_norms(term: Term) -> torch.Tensor:
    """||W + scale · B·A|| of each column, some columns at once.

    Whole columns, since a sum in parts would round otherwise than PEFT's.
    """
    import torch

    rows, width = term.own.shape
    norms = torch.empty(width)
    step = max(_COLUMNS, BLOCK // (4 * rows) // _COLUMNS * _COLUMNS)
    for start in range(0, width, step):
        some = slice(start, start + step)
        change = delta(term.left, term.right[:, some], term.scale)
        norms[some] = torch.linalg.norm((term.own[:, some].float() + change).T, dim=1)
    return norms


def cut(rows: int, step: int) -> Iterator[tuple[int, int]]:
    """[first, last) of blocks of `step` rows, the last of up to twice as many.

    No block has one row where others have many: a product of a single row is
    computed, and rounded, in another way.
    """
    step = max(1, step)
    first = 0
    while first < rows:
        last = first + step if rows - first >= 2 * step else rows
        yield first, last
        first = last
