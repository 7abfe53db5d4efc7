"""Rows out of files, one at a time, however large the file is.

Responsibility: know a file's kind and compression by its name, and open it. Does
not know what a row should hold.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO, Any, TextIO

from arriero.dataset import json_rows, tables
from arriero.dataset.row import Row, text_lines
from arriero.errors import InvalidArgument, NotFound, PermissionDenied

__all__ = ["KINDS", "Row", "is_rows", "is_text", "read"]

_JSON = (".json", ".jsonl", ".ndjson")
_SEPARATED = {".csv": ",", ".tsv": "\t"}
_TEXT, _PARQUET = ".txt", ".parquet"
KINDS = (*_JSON, *_SEPARATED, _PARQUET, _TEXT)
_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
_BROKEN = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, OSError)


def is_rows(name: str) -> bool:
    """Whether a file of that name holds rows."""
    kind, compression = _kind(name)
    return kind in KINDS and not (kind == _PARQUET and compression)


def is_text(name: str) -> bool:
    """Whether a file of that name holds plain text."""
    return _kind(name)[0] == _TEXT


def read(path: Path, name: str = "") -> Iterator[Row]:
    """The rows of a file, by its name's ending: a JSON array, or a row on each line (JSON,
    text), or in a table (CSV, TSV, Parquet); compressed with gzip, bzip2, xz or Zstandard
    where the name says so too. What has another name is read as JSON.

    Args:
        path: UTF-8, with or without a byte order mark.
        name: what errors call the file; default: the path.

    Raises:
        InvalidArgument: not UTF-8, malformed, or not what its name says; names file, row
            and line.
        NotFound, PermissionDenied: the file cannot be opened.
    """
    name = name or str(path)
    kind, compression = _kind(path.name)
    if path.suffix.lower() in _ARCHIVES:
        raise InvalidArgument.field(
            "sources", f"{name} is an archive; unpack it, and name the directory or the files"
        )
    try:
        if kind == _PARQUET:
            if compression:
                raise InvalidArgument.field(
                    "sources", f"{name}: Parquet is compressed inside; unpack the {compression}"
                )
            path.open("rb").close()
            yield from tables.parquet(path, name)
            return
        with _open(path, compression) as stream:
            if kind == _TEXT:
                for number, line, text in text_lines(stream, name):
                    yield Row(name, number, line, text, len(text))
                return
            if kind in _SEPARATED:
                yield from tables.separated(stream, name, _SEPARATED[kind])
                return
            is_array = json_rows.is_array(stream, name)
        with _open(path, compression) as stream:
            yield from (json_rows.array if is_array else json_rows.lines)(stream, name)
    except FileNotFoundError as error:
        raise NotFound(f"{name} does not exist") from error
    except PermissionError as error:
        raise PermissionDenied(f"{name} cannot be read: {error.strerror}") from error
    except IsADirectoryError as error:
        raise InvalidArgument.field("sources", f"{name} is a directory") from error
    except _BROKEN as error:
        if not compression:
            raise
        raise InvalidArgument.field(
            "sources",
            f"{name} cannot be unpacked ({error or type(error).__name__}): it is cut off, "
            f"damaged, or no {compression} file",
        ) from error


def _kind(name: str) -> tuple[str, str]:
    """Suffix and compression's suffix of a name, in small letters."""
    suffixes = [suffix.lower() for suffix in PurePath(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in _COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), compression


def _open(path: Path, compression: str) -> TextIO:
    raw: IO[bytes] | Any
    if compression == ".gz":
        raw = gzip.GzipFile(path)
    elif compression == ".bz2":
        raw = bz2.BZ2File(path)
    elif compression == ".xz":
        raw = lzma.LZMAFile(path)  # noqa: SIM115  (closed by what wraps it)
    elif compression == ".zst":
        import pyarrow as pa

        path.open("rb").close()  # whose errors are Python's own
        raw = io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    else:
        raw = path.open("rb")
    # Line ends are kept as they are: those in quotes belong to a CSV's value.
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="strict", newline="")
