"""A loss curve in a terminal, of braille dots.

Responsibility: keep the points of one training and draw them. Does not know where
they come from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from rich.text import Text

__all__ = ["Curve"]

# A braille character is two dots wide and four high (Unicode: U+2800 and these bits).
_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BLANK = 0x2800
_LABEL = 8


class Curve:
    """Losses by optimizer step: each one, and smoothed."""

    def __init__(self) -> None:
        """Without points yet."""
        self._points: list[tuple[int, float, float]] = []

    def add(self, step: int, raw: float, smoothed: float) -> None:
        """Take in a step; one that was there already takes back all since (a resume did)."""
        while self._points and self._points[-1][0] >= step:
            self._points.pop()
        if math.isfinite(raw) and math.isfinite(smoothed):
            self._points.append((step, raw, smoothed))

    def __len__(self) -> int:
        """Number of points."""
        return len(self._points)

    def draw(self, width: int = 60, height: int = 8) -> Text:
        """The smoothed loss as a line over the raw losses as dots.

        Args:
            width: in characters, the labels included.
            height: in lines, with one for the steps below.
        """
        columns, rows = max(4, width - _LABEL), max(2, height - 1)
        if not self._points:
            return Text("")
        first, last = self._points[0][0], self._points[-1][0]
        smooth = [item[2] for item in self._points]
        # A few wild steps must not press the rest flat.
        raw = sorted(item[1] for item in self._points)
        low = min(*smooth, raw[len(raw) // 50], smooth[0])
        high = max(*smooth, raw[-1 - len(raw) // 50], smooth[0])
        span = (high - low) or max(abs(high), 1.0) * 1e-3

        def place(step: int, loss: float) -> tuple[int, int]:
            across = (step - first) / max(1, last - first) * (2 * columns - 1)
            down = (high - min(max(loss, low), high)) / span * (4 * rows - 1)
            return round(across), round(down)

        dots = _Canvas(columns, rows)
        line = _Canvas(columns, rows)
        for step, loss, _ in self._points:
            dots.dot(*place(step, loss))
        places = [place(step, loss) for step, _, loss in self._points]
        for start, end in zip(places, places[1:] or places, strict=False):
            line.line(start, end)
        text = Text()
        for row in range(rows):
            label = high if row == 0 else low if row == rows - 1 else None
            text.append(f"{label:>{_LABEL - 2}.3f} " if label is not None else " " * (_LABEL - 1))
            text.append("┤" if label is not None else "│", style="dim")
            cells = zip(line.cells[row], dots.cells[row], strict=True)
            for on_line, run in groupby(cells, key=lambda cell: bool(cell[0])):
                drawn = "".join(chr(_BLANK + (over | under)) for over, under in run)
                text.append(drawn.replace(chr(_BLANK), " "), style="cyan" if on_line else "dim")
            text.append("\n")
        text.append(" " * _LABEL)
        text.append(f"step {first}{last:>{max(1, columns - len(f'step {first}'))}}", style="dim")
        return text


class _Canvas:
    """Dots in cells of 2 by 4."""

    def __init__(self, columns: int, rows: int) -> None:
        self.cells: list[list[int]] = [[0] * columns for _ in range(rows)]

    def dot(self, x: int, y: int) -> None:
        self.cells[y // 4][x // 2] |= _BITS[y % 4][x % 2]

    def line(self, start: Sequence[int], end: Sequence[int]) -> None:
        count = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
        for i in range(count + 1):
            self.dot(
                round(start[0] + (end[0] - start[0]) * i / count),
                round(start[1] + (end[1] - start[1]) * i / count),
            )
