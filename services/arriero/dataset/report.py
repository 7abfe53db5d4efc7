"""What was done to the rows: counts, lengths, samples.

Responsibility: gather the figures of a preparation and give them as JSON.
Does not know how rows are read or encoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.dataset.rows import Row

FORMAT = 1
# Bad rows that are named one by one in a report, and in a message.
NAMED_ROWS = 1000
NAMED_IN_MESSAGE = 20
SAMPLES = 3


@dataclass(frozen=True, slots=True)
class RowProblem:
    """A row that something is wrong with."""

    file: str
    row: int
    line: int
    problem: str

    def __str__(self) -> str:
        return f"{self.file} row {self.row} (line {self.line}): {self.problem}"


@dataclass(slots=True)
class Findings:
    """Rows with something wrong: all are counted, the first ones are named."""

    count: int = 0
    named: list[RowProblem] = field(default_factory=list)

    def add(self, row: Row, problem: str) -> None:
        """Count a row, and name it if not too many are named."""
        self.count += 1
        if len(self.named) < NAMED_ROWS:
            self.named.append(RowProblem(row.file, row.number, row.line, problem))

    def __str__(self) -> str:
        shown = "; ".join(str(item) for item in self.named[:NAMED_IN_MESSAGE])
        more = self.count - min(self.count, NAMED_IN_MESSAGE)
        return shown + (f"; and {more} more, see the report" if more else "")

    def to_json(self) -> dict[str, Any]:
        """Count and named rows."""
        return {
            "count": self.count,
            "named": [
                {"file": item.file, "row": item.row, "line": item.line, "problem": item.problem}
                for item in self.named
            ],
        }


@dataclass(slots=True)
class Tally:
    """Figures over samples."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32]) -> None:
        """Count samples of marked ids."""
        self.rows += len(lengths)
        self.tokens += len(ids)
        self.trained_tokens += int((ids >= 0).sum())
        self.longest = max(self.longest, int(lengths.max(initial=0)))
        values, counts = np.unique(lengths, return_counts=True)
        self.lengths.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    def to_json(self) -> dict[str, Any]:
        """The figures; lengths in buckets up to powers of two."""
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "mean_length": self.tokens / self.rows if self.rows else 0.0,
            "max_length": self.longest,
            "lengths": histogram(self.lengths.items()),
            "samples": self.samples,
        }


def histogram(lengths: Iterable[tuple[int, int]]) -> list[dict[str, int]]:
    """Rows by length in tokens: buckets above the last and up to `up_to`, powers of two."""
    buckets: Counter[int] = Counter()
    for length, count in lengths:
        buckets[1 << max(0, length - 1).bit_length()] += count
    return [{"up_to": bound, "rows": buckets[bound]} for bound in sorted(buckets)]
