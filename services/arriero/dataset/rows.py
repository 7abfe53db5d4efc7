"""Rows out of JSON files, one at a time, however large the file is.

Responsibility: read a JSON array or JSON lines as a stream, and say exactly
where what cannot be read begins. Does not know what a row should hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from arriero.errors import InvalidArgument, NotFound, PermissionDenied

# Longest row, in characters: a stray quote must not pull a whole file into memory.
MAX_ROW = 16 * 1024 * 1024
_CHUNK = 1024 * 1024
# A decoding error this far from what was read so far is an error, not a cut.
_CERTAIN = 64
_NUMBER_TAIL = len("e+")
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Row:
    """A decoded row: `number` counts from 1 in its file, `line` is where it begins.

    `size` is about how many characters it has.
    """

    file: str
    number: int
    line: int
    value: Any
    size: int = 0


def read(path: Path, name: str = "") -> Iterator[Row]:
    """The rows of a file: a JSON array, or one JSON value per line (blank lines skipped).

    Args:
        path: UTF-8, with or without a byte order mark.
        name: what errors call the file; default: the path.

    Raises:
        InvalidArgument: not UTF-8, or malformed JSON; names file, row and line.
        NotFound, PermissionDenied: the file cannot be opened.
    """
    name = name or str(path)
    try:
        with path.open(encoding="utf-8-sig", errors="strict") as stream:
            scanner = _Scanner(stream, name)
            if scanner.next_character() == "[":
                yield from _array(scanner)
            else:
                stream.seek(0)
                yield from _lines(stream, name)
    except FileNotFoundError as error:
        raise NotFound(f"{name} does not exist") from error
    except PermissionError as error:
        raise PermissionDenied(f"{name} cannot be read: {error.strerror}") from error
    except IsADirectoryError as error:
        raise InvalidArgument.field("sources", f"{name} is a directory") from error


def _malformed(name: str, row: int, line: int, found: str) -> InvalidArgument:
    error = InvalidArgument.field("sources", f"{name}: row {row}, line {line}: {found}")
    error.reason = "MALFORMED_JSON"
    error.metadata |= {"file": name, "row": str(row), "line": str(line)}
    return error


class _Scanner:
    """A window on a stream of JSON text that knows its line."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self.name = name
        self.row = 1
        self._stream = stream
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._at = 0
        self._line = 1  # at self._counted
        self._counted = 0
        self._ended = False

    @property
    def line(self) -> int:
        """The line of the next character."""
        self._line += self._buffer.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._line

    def problem(self, found: str, position: int | None = None) -> InvalidArgument:
        """An error at a position of the window; default: at the next character."""
        line = self.line
        if position is not None and position > self._at:
            line += self._buffer.count("\n", self._at, position)
        return _malformed(self.name, self.row, line, found)

    def _fill(self) -> None:
        self._line = self.line
        self._buffer = self._buffer[self._at :]
        self._at = self._counted = 0
        try:
            chunk = self._stream.read(_CHUNK)
        except UnicodeDecodeError as error:
            raise _not_utf8(self.name, self.row, self.line, error) from error
        self._ended = not chunk
        self._buffer += chunk

    def next_character(self) -> str:
        """The next character that is no space, not consumed; empty at the end."""
        while True:
            found = _SPACE.match(self._buffer, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if self._ended:
                return ""
            self._fill()

    def skip(self) -> None:
        """Consume one character."""
        self._at += 1

    def value(self) -> tuple[Any, int]:
        """Consume and decode the value that begins at the next character; and its size."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
                # A number may be cut before `.5` or `e+5` and still decode.
                if len(self._buffer) - end > _NUMBER_TAIL or self._ended:
                    size, self._at = end - self._at, end
                    return value, size
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string")
                certain = not cut and error.pos + _CERTAIN < len(self._buffer)
                if self._ended or certain:
                    raise self.problem(f"malformed JSON: {error.msg}", error.pos) from error
            except (ValueError, RecursionError) as error:
                raise self.problem(f"cannot be decoded: {str(error)[:200]}") from error
            if len(self._buffer) - self._at > MAX_ROW:
                raise self.problem(
                    f"the row is longer than {MAX_ROW} characters; expected a shorter row "
                    "(is a closing quote missing?)"
                )
            self._fill()


def _array(scanner: _Scanner) -> Iterator[Row]:
    scanner.skip()
    if scanner.next_character() == "]":
        scanner.skip()
    else:
        while True:
            if scanner.next_character() in ("", "]"):
                raise scanner.problem("malformed JSON: expected a row after ','")
            line = scanner.line
            value, size = scanner.value()
            yield Row(scanner.name, scanner.row, line, value, size)
            separator = scanner.next_character()
            if separator not in (",", "]"):
                found = repr(separator) if separator else "the end of the file"
                raise scanner.problem(
                    f"malformed JSON: after this row, expected ',' or ']', found {found}"
                )
            scanner.skip()
            if separator == "]":
                break
            scanner.row += 1
    if scanner.next_character():
        raise scanner.problem("malformed JSON: text after the closing ']' of the array")


def _lines(stream: TextIO, name: str) -> Iterator[Row]:
    number, line = 0, 0
    while True:
        try:
            text = stream.readline(MAX_ROW + 1)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, number + 1, line + 1, error) from error
        if not text:
            return
        line += 1
        if not text.strip():
            continue
        number += 1
        if len(text) > MAX_ROW:
            raise _malformed(name, number, line, f"the line is longer than {MAX_ROW} characters")
        try:
            value = json.loads(text.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            raise _malformed(
                name,
                number,
                line,
                f"malformed JSON: {error.msg} (column {error.colno}); expected a JSON array of "
                "rows, or one JSON object per line",
            ) from error
        except (ValueError, RecursionError) as error:
            raise _malformed(
                name, number, line, f"cannot be decoded: {str(error)[:200]}"
            ) from error
        yield Row(name, number, line, value, len(text))


def _not_utf8(name: str, row: int, line: int, error: UnicodeDecodeError) -> InvalidArgument:
    byte = error.object[error.start]
    return _malformed(
        name, row, line, f"in or after this row: byte 0x{byte:02x} is not UTF-8; save it as UTF-8"
    )
