"""Prepared samples on disk: a spool while they are made, an Arrow file at the end.

Responsibility: hold token ids outside of memory, and write a split as a
memory-mappable Arrow IPC file. Does not know what the ids mean.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

FILE_NAME = "data.arrow"
# Tokens of a record batch, more or less.
_BATCH_TOKENS = 1 << 19

Ids = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int64]
# Positions in a spool.
Samples = npt.NDArray[np.int32] | npt.NDArray[np.int64]


def marked(ids: Ids, trained: npt.NDArray[np.bool_]) -> Ids:
    """Ids and labels in one array: the id where it is trained on, its complement where not."""
    return np.where(trained, ids, ~ids)


class Spool:
    """Samples of marked token ids in one flat file, in the order of their arrival.

    Memory is 12 bytes a sample, whatever its length. A context manager; samples
    can be read after `flush`. They are read, not mapped: the pages of a large
    file would count as this process's memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb+")
        self._lengths = array("i")
        self._ends: Numbers = np.zeros(1, dtype=np.int64)

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._lengths)

    def extend(self, ids: Ids, lengths: Ids) -> None:
        """Add samples that lie one after the other in `ids`, marked."""
        self._file.write(ids.tobytes())
        self._lengths.frombytes(lengths.tobytes())

    def flush(self) -> None:
        """Make the samples readable."""
        self._file.flush()
        self._ends = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))

    @property
    def lengths(self) -> Ids:
        """Tokens of each sample."""
        return np.frombuffer(self._lengths, dtype=np.int32)

    def gather(self, samples: Samples) -> Ids:
        """Marked ids of some samples, one after the other."""
        starts = (self._ends[samples] * 4).tolist()
        sizes = (self.lengths[samples] * 4).tolist()
        fd = self._file.fileno()
        data = b"".join(os.pread(fd, n, at) for n, at in zip(sizes, starts, strict=True))
        return np.frombuffer(data, dtype=np.int32)

    def ids(self, sample: int) -> list[int]:
        """Token ids of one sample."""
        found = self.gather(np.array([sample]))
        return [int(number) for number in np.where(found < 0, ~found, found)]


class Figures:
    """What `write` wrote: sequences, samples, tokens, trained tokens, longest sequence."""

    def __init__(self) -> None:
        self.rows = self.samples = self.tokens = self.trained_tokens = self.max_length = 0


def write(
    path: Path, spool: Spool, samples: Samples, masked: int, *, counts: Numbers | None = None
) -> Figures:
    """Write samples of a spool as an Arrow IPC file, in batches.

    Columns `input_ids` and `labels`, list<int32> of equal lengths; labels that
    are not trained on are `masked`, and so is the first of each sample, which
    nothing predicts. Packed, a row holds several samples one after the other,
    and column `lengths`, list<int32>, says how long each is.

    Args:
        path: of the file.
        spool: flushed.
        samples: positions in the spool, in the order of writing.
        masked: label of what is not trained on.
        counts: samples of each row, where rows hold several.
    """
    import pyarrow as pa

    column = pa.list_(pa.int32())
    fields = [("input_ids", column), ("labels", column)]
    if counts is not None:
        fields.append(("lengths", column))
    schema = pa.schema(fields)
    figures = Figures()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch, held in _batches(spool, samples, counts):
            lengths = spool.lengths[batch]
            found = spool.gather(batch)
            ids = np.where(found < 0, ~found, found)
            labels = np.where(found < 0, np.int32(masked), found)
            starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
            labels[starts[:-1][lengths > 0]] = masked
            bounds = np.concatenate(([0], np.cumsum(held)))
            ends = starts[bounds]
            columns = [_lists(ends, ids), _lists(ends, labels)]
            if counts is not None:
                columns.append(_lists(bounds, lengths))
            writer.write_batch(pa.record_batch(columns, schema=schema))
            figures.rows += len(held)
            figures.samples += len(batch)
            figures.tokens += len(ids)
            figures.trained_tokens += int((labels != masked).sum())
            figures.max_length = max(figures.max_length, int(np.diff(ends).max()))
    return figures


def _batches(
    spool: Spool, samples: Samples, counts: Numbers | None
) -> Iterator[tuple[Samples, Numbers]]:
    """Runs of whole rows of about `_BATCH_TOKENS` tokens, with the samples of each row."""
    rows = len(samples) if counts is None else len(counts)
    mean = max(1, int(spool.lengths.sum(dtype=np.int64)) // max(1, len(spool)))
    each = max(1, _BATCH_TOKENS // (mean * max(1, len(samples) // max(1, rows))))
    start = 0
    for row in range(0, rows, each):
        held = np.ones(min(each, rows - row), dtype=np.int64)
        if counts is not None:
            held = counts[row : row + each]
        end = start + int(held.sum())
        yield samples[start:end], held
        start = end


def _lists(offsets: Numbers, values: Ids) -> Any:
    import pyarrow as pa

    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), pa.array(values, type=pa.int32())
    )
