"""Lines of text to learn pieces from, and lines kept apart to judge by.

Responsibility: text out of sources as a stream, split and thinned out evenly,
the same for a seed. Does not know tokenizers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from arriero.dataset import rows
from arriero.dataset.sources import Source

__all__ = ["LONGEST_LINE", "Corpus"]

# Bytes; longer lines are cut at a space near it.
LONGEST_LINE = 16 * 1024
# What is kept apart at most, and at least where the share gives nothing.
_HELD_OUT_BYTES, _HELD_OUT_LINES = 4 * 1024 * 1024, 1


@dataclass(frozen=True)
class Corpus:
    """Text of sources.

    Args:
        sources: in reading order.
        held_out: share of the lines that nothing is learnt from.
        max_bytes: to learn from at most, taken evenly; 0 takes all.
        seed: of both choices.
    """

    sources: Sequence[Source]
    held_out: float
    max_bytes: int
    seed: int

    def lines(self) -> Iterator[str]:
        """Every line that is not blank."""
        for source in self.sources:
            for file in source.files:
                for row in rows.read(file.path, file.name):
                    for text in _texts(row.value):
                        for line in text.splitlines():
                            yield from _parts(line)

    def size(self) -> int:
        """Bytes of all lines."""
        return sum(len(line.encode()) for line in self.lines())

    def training(self, size: int) -> Iterator[str]:
        """The lines to learn from; `size` is what `size()` said."""
        share = min(1.0, self.max_bytes / size) if self.max_bytes and size else 1.0
        thinning = random.Random(f"thin {self.seed}")
        for line, kept_apart in self._split():
            if not kept_apart and (share >= 1.0 or thinning.random() < share):
                yield line

    def held_out_lines(self) -> list[str]:
        """The lines kept apart, at most 4 MiB; empty when all are learnt from."""
        found: list[str] = []
        left = _HELD_OUT_BYTES
        for line, kept_apart in self._split():
            if kept_apart and left > 0:
                found.append(line)
                left -= len(line.encode())
        return found

    def _split(self) -> Iterator[tuple[str, bool]]:
        choice = random.Random(f"hold {self.seed}")
        for line in self.lines():
            yield line, choice.random() < self.held_out


def _parts(text: str) -> Iterator[str]:
    """A line without its end, in parts that are not too long."""
    text = text.strip("\r\n").replace("\0", "")
    while len(text.encode()) > LONGEST_LINE:
        # A character has four bytes at most.
        end = text.rfind(" ", 1, LONGEST_LINE // 4)
        end = end if end > 0 else LONGEST_LINE // 4
        yield text[:end]
        text = text[end:]
    if text.strip():
        yield text


def _texts(value: Any) -> Iterator[str]:
    """Every text in a row, in its order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
