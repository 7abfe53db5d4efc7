"""Rows out of JSON, one at a time, however large the file is.

Responsibility: read a JSON array or JSON lines as a stream, and say exactly
where what cannot be read begins. Does not know files, or what a row should hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

from arriero.dataset import row
from arriero.dataset.row import Row, malformed, not_utf8
from arriero.errors import InvalidArgument

_CHUNK = 1024 * 1024
# A decoding error this far from what was read so far is an error, not a cut.
_CERTAIN = 64
_NUMBER_TAIL = len("e+")
_SPACE = re.compile(r"[ \t\r\n]*")


def is_array(stream: TextIO, name: str) -> bool:
    """Whether a text begins as an array does; reads on."""
    return _Scanner(stream, name).next_character() == "["


def array(stream: TextIO, name: str) -> Iterator[Row]:
    """The values of a JSON array."""
    scanner = _Scanner(stream, name)
    scanner.next_character()
    yield from _array(scanner)


def lines(stream: TextIO, name: str) -> Iterator[Row]:
    """A JSON value of each line; blank lines are skipped."""
    for number, line, text in row.text_lines(stream, name):
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise malformed(
                name,
                number,
                line,
                f"malformed JSON: {error.msg} (column {error.colno}); expected a JSON array of "
                "rows, or one JSON object per line",
            ) from error
        except (ValueError, RecursionError) as error:
            raise malformed(name, number, line, f"cannot be decoded: {str(error)[:200]}") from error
        yield Row(name, number, line, value, len(text))


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
        return malformed(self.name, self.row, line, found)

    def _fill(self) -> None:
        self._line = self.line
        self._buffer = self._buffer[self._at :]
        self._at = self._counted = 0
        try:
            chunk = self._stream.read(_CHUNK)
        except UnicodeDecodeError as error:
            raise not_utf8(self.name, self.row, self.line, error) from error
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
            if len(self._buffer) - self._at > row.MAX_ROW:
                raise self.problem(
                    f"the row is longer than {row.MAX_ROW} characters; expected a shorter row "
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
