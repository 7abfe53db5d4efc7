"""A row as it comes out of a file, and what is said about one that does not.

Responsibility: the words that all kinds of files share. Does not know any kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from arriero.errors import InvalidArgument

# Longest row, in characters: a stray quote must not pull a whole file into memory.
MAX_ROW = 16 * 1024 * 1024


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


def malformed(name: str, number: int, line: int, found: str) -> InvalidArgument:
    """What to raise about a row that cannot be read."""
    error = InvalidArgument.field("sources", f"{name}: row {number}, line {line}: {found}")
    error.reason = "MALFORMED_ROW"
    error.metadata |= {"file": name, "row": str(number), "line": str(line)}
    return error


def not_utf8(name: str, number: int, line: int, error: UnicodeDecodeError) -> InvalidArgument:
    """What to raise about text in another encoding."""
    byte = error.object[error.start]
    found = f"in or after this row: byte 0x{byte:02x} is not UTF-8; save it as UTF-8"
    return malformed(name, number, line, found)


def text_lines(stream: TextIO, name: str) -> Iterator[tuple[int, int, str]]:
    """Lines that hold something: their number among these, their line, and their text."""
    number, line = 0, 0
    while True:
        try:
            text = stream.readline(MAX_ROW + 1)
        except UnicodeDecodeError as error:
            raise not_utf8(name, number + 1, line + 1, error) from error
        if not text:
            return
        line += 1
        if not text.strip():
            continue
        number += 1
        if len(text) > MAX_ROW:
            raise malformed(name, number, line, f"the line is longer than {MAX_ROW} characters")
        yield number, line, text.rstrip("\r\n")
