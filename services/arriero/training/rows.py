"""Prepared rows, and the order in which they are trained on.

Responsibility: read a dataset artifact memory-mapped, put rows in batches, lay
them out. The order is a pure function of seed and epoch. Does not know models; torch
is imported only to make the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from arriero.errors import DataLoss, FailedPrecondition

if TYPE_CHECKING:
    import torch

DATA_FILE = "data.arrow"
FACTS_FILE = "dataset.json"
PROBE_FILE = "probe.json"
# Label of a token that is not trained on: torch's `ignore_index` by convention.
MASKED = -100
# `group_by_length` sorts within this many batches, so that batches stay random.
_POOL_BATCHES = 50


def read_facts(directory: Path) -> dict[str, Any]:
    """`dataset.json`: counts, special ids, the tokenizer's digest.

    Raises:
        DataLoss: missing, or not what it should be.
    """
    try:
        facts = json.loads((directory / FACTS_FILE).read_text(encoding="utf-8"))
        for key in ("rows", "tokens", "trained_tokens"):
            facts[key] = int(facts[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataLoss(
            f"{FACTS_FILE} of dataset {directory.name[:12]} cannot be read "
            f"({type(error).__name__}: {error}); prepare the dataset again"
        ) from error
    return dict(facts)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One record batch: row i is values[offsets[i]:offsets[i + 1]].

    A packed one has as many `sizes` of samples, in rows of their own offsets.
    """

    offsets: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int32] | None
    size_offsets: npt.NDArray[np.int64] | None


class Rows:
    """Token ids and labels of a dataset artifact, read from the map row by row."""

    def __init__(self, directory: Path) -> None:
        """Open `data.arrow`.

        Raises:
            DataLoss: not an Arrow file with `input_ids` and `labels`, row by row
                of equal length.
        """
        import pyarrow as pa

        try:
            reader = pa.ipc.open_file(pa.memory_map(str(directory / DATA_FILE)))
            parts = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            self._chunks = [_chunk(part) for part in parts]
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataLoss(
                f"{DATA_FILE} of dataset {directory.name[:12]} cannot be read ({error}); "
                "expected an Arrow file with lists of int32 in input_ids and labels"
            ) from error
        lengths = [np.diff(chunk.offsets) for chunk in self._chunks]
        self.lengths: npt.NDArray[np.int64] = (
            np.concatenate(lengths) if lengths else np.empty(0, dtype=np.int64)
        )
        self._ends = np.cumsum([len(part) for part in lengths])

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    def ids(self, row: int) -> npt.NDArray[np.int32]:
        """Token ids of a row."""
        chunk, begin, end = self._place(row)
        return chunk.ids[begin:end]

    def labels(self, row: int) -> npt.NDArray[np.int32]:
        """Labels of a row; `MASKED` where nothing is trained."""
        chunk, begin, end = self._place(row)
        return chunk.labels[begin:end]

    def samples(self, row: int) -> list[tuple[int, int]]:
        """Begin and end of each sample in a row: several in a packed one, else one."""
        number, inside = self._find(row)
        chunk = self._chunks[number]
        if chunk.sizes is None or chunk.size_offsets is None:
            return [(0, int(self.lengths[row]))]
        first, last = chunk.size_offsets[inside], chunk.size_offsets[inside + 1]
        ends = np.cumsum(chunk.sizes[first:last]).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def trained(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> int:
        """Labels of some rows that count in the loss; nothing predicts a sample's first token."""
        total = 0
        for row in rows:
            counted = self.labels(int(row)) != MASKED
            firsts = [begin for begin, _ in self.samples(int(row))]
            total += int(counted.sum() - counted[firsts].sum())
        return total

    def longest(self, count: int) -> tuple[int, ...]:
        """Tokens of the longest rows, longest first."""
        places = np.argpartition(-self.lengths, min(count, len(self)) - 1)[:count]
        return tuple(sorted((int(self.lengths[i]) for i in places), reverse=True))

    @property
    def largest_id(self) -> int:
        """The largest token id of all rows; -1 without any."""
        return max((int(chunk.ids.max(initial=-1)) for chunk in self._chunks), default=-1)

    def _find(self, row: int) -> tuple[int, int]:
        """Record batch of a row, and its number inside."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        return number, row - (int(self._ends[number - 1]) if number else 0)

    def _place(self, row: int) -> tuple[_Chunk, int, int]:
        number, inside = self._find(row)
        chunk = self._chunks[number]
        return chunk, int(chunk.offsets[inside]), int(chunk.offsets[inside + 1])


def _chunk(batch: Any) -> _Chunk:
    """A record batch as arrays over the mapped pages."""
    ids, labels = batch.column("input_ids"), batch.column("labels")
    offsets = ids.offsets.to_numpy().astype(np.int64)
    if not np.array_equal(offsets, labels.offsets.to_numpy()):
        raise ValueError("input_ids and labels differ in length")
    values = [column.values.to_numpy(zero_copy_only=True) for column in (ids, labels)]
    if any(array.dtype != np.int32 for array in values):
        raise TypeError(f"values are {values[0].dtype} and {values[1].dtype}")
    if "lengths" not in batch.schema.names:
        return _Chunk(offsets, values[0], values[1], None, None)
    packed = batch.column("lengths")
    sizes = packed.values.to_numpy(zero_copy_only=True)
    size_offsets = packed.offsets.to_numpy().astype(np.int64)
    sums = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))[size_offsets]
    if sizes.dtype != np.int32 or (sizes < 1).any() or (np.diff(sums) != np.diff(offsets)).any():
        raise ValueError("lengths of samples do not add up to the length of their row")
    return _Chunk(offsets, values[0], values[1], sizes, size_offsets)


def check_ids(rows: Rows, embeddings: int, *, what: str) -> None:
    """Refuse rows that were tokenized for another model.

    Raises:
        FailedPrecondition: an id that has no embedding row.
    """
    largest = rows.largest_id
    if largest >= embeddings:
        raise FailedPrecondition(
            f"{what} holds token id {largest}, the model has {embeddings} embedding rows: the "
            "rows were tokenized for another model; prepare them with this model's tokenizer",
            reason="TOKENIZER_MISMATCH",
        )


def batches(
    lengths: npt.NDArray[np.int64],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    group_by_length: bool = False,
) -> list[npt.NDArray[np.int64]]:
    """The batches of an epoch: every row once, the last batch may be smaller.

    A pure function of its arguments, so that a resumed training goes on with the
    row that it would have seen. Rows of a batch come longest first: micro batches
    then hold rows of similar length, and the sum over the batch stays the same.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch.
        seed: any integer.
        epoch: from 0.
        group_by_length: sort by length within pools of random rows, and shuffle
            the batches that this makes.
    """
    count = len(lengths)
    generator = np.random.default_rng([seed & (2**64 - 1), epoch])
    order = generator.permutation(count)
    if group_by_length:
        pool = batch_size * _POOL_BATCHES
        order = np.concatenate(
            [_longest_first(order[i : i + pool], lengths) for i in range(0, count, pool)]
        )
    cut = [order[i : i + batch_size] for i in range(0, count, batch_size)]
    if group_by_length:
        cut = [cut[i] for i in generator.permutation(len(cut))]
    return [_longest_first(rows, lengths) for rows in cut]


def _longest_first(
    rows: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    return rows[np.argsort(-lengths[rows], kind="stable")]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Samples one after the other, without padding.

    Attributes:
        input_ids: int64, shape (1, tokens).
        position_ids: int64, shape (1, tokens): from 0 in each sample.
        lengths: of the samples, longest first.
        positions: int64, shape (k,): of tokens that predict a trained token, so
            that logits are needed there alone.
        labels: int64, shape (k,): what they must predict.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[int, ...]
    positions: torch.Tensor
    labels: torch.Tensor


def collate(rows: Rows, chosen: Sequence[int] | npt.NDArray[np.int64]) -> MicroBatch:
    """Lay the samples of some rows one after the other.

    Samples of one length become neighbours, which attention computes together.
    """
    import torch

    samples = [
        (rows.ids(int(row))[begin:end], rows.labels(int(row))[begin:end])
        for row in chosen
        for begin, end in rows.samples(int(row))
    ]
    samples.sort(key=lambda sample: -len(sample[0]))
    lengths = tuple(len(ids) for ids, _ in samples)
    labels = np.concatenate([labels for _, labels in samples]).astype(np.int64)
    # A token predicts the next one; nothing predicts a sample's first.
    labels[np.cumsum((0, *lengths[:-1]))] = MASKED
    targets = np.flatnonzero(labels != MASKED)
    return MicroBatch(
        torch.from_numpy(np.concatenate([ids for ids, _ in samples]).astype(np.int64))[None],
        torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        lengths,
        torch.from_numpy(targets - 1),
        torch.from_numpy(labels[targets]),
    )
