"""Rows out of tables: CSV and Parquet, read in pieces.

Responsibility: make an object of each row, by the names of the columns. Does
not know what a row should hold.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from arriero.dataset import row
from arriero.dataset.row import Row, malformed, not_utf8

# Rows of a Parquet file that are decoded together.
_BATCH = 1024


def separated(stream: TextIO, name: str, delimiter: str) -> Iterator[Row]:
    """The rows of a file of separated values; the first line names the columns.

    Quoting as in RFC 4180: a value in quotes may hold separators and line ends.
    """
    csv.field_size_limit(row.MAX_ROW)
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    number, line = 0, 1
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except UnicodeDecodeError as error:
            raise not_utf8(name, number + 1, line, error) from error
        except csv.Error as error:
            raise malformed(
                name, number + 1, line, f"malformed CSV: {error}; is a closing quote missing?"
            ) from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = _header(cells, name, line)
            continue
        number += 1
        if len(cells) != len(header):
            raise malformed(
                name,
                number,
                line,
                f"malformed CSV: {len(cells)} values, but {len(header)} columns; quote values "
                f"that hold {delimiter!r}",
            )
        size = sum(map(len, cells))
        yield Row(name, number, line, dict(zip(header, cells, strict=True)), size)


def _header(cells: list[str], name: str, line: int) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({item for item in names if names.count(item) > 1})
    if twice:
        raise malformed(name, 0, line, f"the header names {', '.join(map(repr, twice))} twice")
    return names


def parquet(path: Path, name: str) -> Iterator[Row]:
    """The rows of a Parquet file; `line` is the row's number."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        # Buffered: a row group is read as it is needed, not at once.
        with ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_BATCH, use_threads=False):
                size = batch.nbytes // max(1, batch.num_rows)
                for value in batch.to_pylist():
                    number += 1
                    yield Row(name, number, number, value, size)
    except pa.ArrowException as error:
        found = str(error).splitlines()[0]
        raise malformed(name, number + 1, number + 1, f"no readable Parquet: {found}") from error
