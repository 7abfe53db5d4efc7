"""Prepared rows on disk: a spool while they are made, an Arrow file at the end.

Responsibility: hold token ids outside of memory, and write a split as a
memory-mappable Arrow IPC file. Does not know what the ids mean.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

FILE_NAME = "data.arrow"
_BATCH = 1024


class Spool:
    """Rows of token ids in one flat file, in the order of their arrival.

    Memory is 16 bytes a row, whatever its length. A context manager; rows can
    be read after `flush`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._ends = array("q", [0])
        self._trained_from = array("q")
        self._map: npt.NDArray[np.int32] | None = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._map = None
        self._path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._trained_from)

    def append(self, ids: Sequence[int], trained_from: int) -> None:
        """Add a row."""
        self._file.write(np.asarray(ids, dtype=np.int32).tobytes())
        self._ends.append(self._ends[-1] + len(ids))
        self._trained_from.append(trained_from)

    def flush(self) -> None:
        """Make the rows readable."""
        self._file.flush()
        if self._ends[-1]:
            self._map = np.memmap(self._path, dtype=np.int32, mode="r")

    def ids(self, row: int) -> npt.NDArray[np.int32]:
        """Token ids of a row, int32."""
        if self._map is None:
            return np.empty(0, dtype=np.int32)
        return self._map[self._ends[row] : self._ends[row + 1]]

    def trained_from(self, row: int) -> int:
        """Index of the row's first trained token."""
        return self._trained_from[row]

    def length(self, row: int) -> int:
        """Tokens of a row."""
        return self._ends[row + 1] - self._ends[row]

    def trained(self, row: int) -> int:
        """Labels of a row that count in a loss (the first token is never predicted)."""
        return max(0, self.length(row) - max(1, self._trained_from[row]))


def write(path: Path, spool: Spool, rows: Sequence[int], masked: int) -> None:
    """Write rows of a spool as an Arrow IPC file, in batches.

    Columns `input_ids` and `labels`, both list<int32>; labels before a row's
    `trained_from` are `masked`.
    """
    import pyarrow as pa

    column = pa.list_(pa.int32())
    schema = pa.schema([("input_ids", column), ("labels", column)])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(rows), _BATCH):
            batch = rows[start : start + _BATCH]
            writer.write_batch(
                pa.record_batch(
                    [_lists(_ids(spool, batch)), _lists(_labels(spool, batch, masked))],
                    schema=schema,
                )
            )


def _ids(spool: Spool, rows: Iterable[int]) -> list[npt.NDArray[np.int32]]:
    return [spool.ids(row) for row in rows]


def _labels(spool: Spool, rows: Iterable[int], masked: int) -> list[npt.NDArray[np.int32]]:
    labels = []
    for row in rows:
        values = np.array(spool.ids(row), dtype=np.int32)
        values[: spool.trained_from(row)] = masked
        labels.append(values)
    return labels


def _lists(rows: list[npt.NDArray[np.int32]]) -> Any:
    import pyarrow as pa

    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.concatenate(rows) if rows else np.empty(0, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, type=pa.int32()))
