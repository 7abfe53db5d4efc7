"""What was done to the rows: counts, lengths, samples.

Responsibility: gather the figures of a preparation and give them as JSON.
Does not know how rows are read or encoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from arriero.dataset.encoding import EncodedRow, RenderedRow
from arriero.dataset.rows import Row

FORMAT = 1
# Bad rows that are named one by one in a report, and in a message.
NAMED_ROWS = 1000
NAMED_IN_MESSAGE = 20
SAMPLES = 3
# Around what is trained on, in a sample.
OPEN, CLOSE = "⟦", "⟧"


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
    """Figures over encoded rows."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    straddling: int = 0
    longest: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    samples: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: Row, rendered: RenderedRow, encoded: EncodedRow) -> None:
        """Count a row; the first ones become samples."""
        length = len(encoded.ids)
        self.rows += 1
        self.tokens += length
        self.trained_tokens += encoded.trained
        self.truncated += encoded.truncated
        self.straddling += encoded.straddles
        self.longest = max(self.longest, length)
        self.lengths[length] += 1
        if len(self.samples) < SAMPLES:
            self.samples.append(_sample(row, rendered, encoded))

    @property
    def truncated_share(self) -> float:
        """Share of rows that lost tokens, 0..1."""
        return self.truncated / self.rows if self.rows else 0.0

    def to_json(self) -> dict[str, Any]:
        """The figures; lengths in buckets up to powers of two."""
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "mean_length": self.tokens / self.rows if self.rows else 0.0,
            "max_length": self.longest,
            "truncated_rows": self.truncated,
            "truncated_share": self.truncated_share,
            "straddling_rows": self.straddling,
            "lengths": histogram(self.lengths.items()),
            "samples": self.samples,
        }


def histogram(lengths: Iterable[tuple[int, int]]) -> list[dict[str, int]]:
    """Rows by length in tokens: buckets above the last and up to `up_to`, powers of two."""
    buckets: Counter[int] = Counter()
    for length, count in lengths:
        buckets[1 << max(0, length - 1).bit_length()] += count
    return [{"up_to": bound, "rows": buckets[bound]} for bound in sorted(buckets)]


def _sample(row: Row, rendered: RenderedRow, encoded: EncodedRow) -> dict[str, Any]:
    start = 0 if encoded.trained_from == 0 else rendered.prompt_length
    text = rendered.text
    return {
        "file": row.file,
        "row": row.number,
        "tokens": len(encoded.ids),
        "trained_tokens": encoded.trained,
        "truncated": encoded.truncated,
        "text": f"{text[:start]}{OPEN}{text[start:]}{CLOSE}",
    }
