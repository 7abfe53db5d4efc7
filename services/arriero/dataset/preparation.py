"""Rows to prepared splits: survey, choose, encode.

Responsibility: the order of the work, and arrays about the rows instead of
rows. Does not know jobs, artifacts or messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt

from arriero.dataset import rows, selection
from arriero.dataset.arrow import Spool
from arriero.dataset.batches import NONE, NOTABLE, Answer, Flag, read
from arriero.dataset.crew import Crew
from arriero.dataset.dedup import Duplicates
from arriero.dataset.formats import ALPACA, AUTO, RowFormat, detect, expected
from arriero.dataset.report import SAMPLES, Findings, Tally
from arriero.dataset.rows import Row
from arriero.dataset.sources import Source
from arriero.errors import FailedPrecondition, InvalidArgument

_BATCH = 512
# Rows of a source by which its format is known.
_HEAD = 100
# Characters of a batch, more or less, where rows are long.
_BATCH_CHARACTERS = 1 << 20

Rows = selection.Rows
Mask = npt.NDArray[np.bool_]
# Called with a phase, rows done and rows in all (0: not known); may raise to stop.
Report = Callable[[str, int, int], None]


@dataclass(slots=True)
class Survey:
    """What the rows are, before any is encoded. They are numbered over all sources, from 0.

    Attributes:
        usable: of each row.
        ends: rows up to the end of each source.
        bad: rows that cannot be used.
        unused: rows by the field that is not read.
        equal, near: how many rows were left out since they are said before.
    """

    usable: Mask = field(default_factory=lambda: np.empty(0, dtype=np.bool_))
    ends: list[int] = field(default_factory=list)
    bad: Findings = field(default_factory=Findings)
    unused: Counter[str] = field(default_factory=Counter)
    equal: int = 0
    near: int = 0

    @property
    def total(self) -> int:
        """Rows of all sources."""
        return len(self.usable)


@dataclass(slots=True)
class Encoded:
    """Samples in the spool, and what was found about the rows that they were made of.

    Attributes:
        counts: samples of each row of the survey; 0 for those that made none.
        tally: figures over all samples.
        long, masked, endless, bos, special, unusable: rows, by what was found.
        straddling: rows with a token across the end of a prompt.
        truncated: rows that lost tokens.
        dropped: rows left out as too long.
        longest: tokens of the longest row before it was cut.
    """

    counts: npt.NDArray[np.int32]
    tally: Tally = field(default_factory=Tally)
    long: Findings = field(default_factory=Findings)
    masked: Findings = field(default_factory=Findings)
    endless: Findings = field(default_factory=Findings)
    bos: Findings = field(default_factory=Findings)
    special: Findings = field(default_factory=Findings)
    unusable: Findings = field(default_factory=Findings)
    straddling: int = 0
    truncated: int = 0
    dropped: int = 0
    longest: int = 0

    @property
    def truncated_share(self) -> float:
        """Share of the rows that made samples and lost tokens, 0..1."""
        rows = int((self.counts > 0).sum())
        return self.truncated / rows if rows else 0.0

    def samples_of(self, chosen: Rows) -> Rows:
        """Positions in the spool of the samples of some rows, in their order."""
        starts = np.cumsum(self.counts, dtype=np.int32)
        starts -= self.counts
        if self.counts.max(initial=0) <= 1:
            return starts[chosen]
        counts = self.counts[chosen]
        within = np.arange(int(counts.sum()), dtype=np.int32)
        within -= np.repeat(np.cumsum(counts, dtype=np.int32) - counts, counts)
        within += np.repeat(starts[chosen], counts)
        return within


def formats_of(sources: Sequence[Source], name: str, columns: dict[str, str]) -> list[RowFormat]:
    """The format of each source's rows; `auto` goes by the first row of each.

    Raises:
        InvalidArgument: a source whose first row is of no known format.
    """
    if name != AUTO:
        return [RowFormat(name, columns)] * len(sources)
    found = []
    for number, source in enumerate(sources):
        # Not the very first alone: it may be one of those that cannot be used.
        head = [row.value for row in islice(source_rows(source), _HEAD)]
        kinds = (detect(value, columns) for value in head)
        kind = next((kind for kind in kinds if kind), None if head else ALPACA)
        if kind is None:
            held = "is no object"
            if isinstance(head[0], dict):
                held = f"has {'the fields ' if head[0] else 'no fields'}{', '.join(head[0])}"
            raise InvalidArgument.field(
                f"sources[{number}]",
                f"the first row of {source.text} {held}; expected one of these formats "
                f"({expected()}): name its fields in columns, such as "
                "columns: {instruction: question, output: answer}",
            )
        found.append(RowFormat(kind, columns))
    return found


def source_rows(source: Source) -> Iterator[Row]:
    """Every row of every file of a source.

    Raises:
        InvalidArgument: a remote source that was not fetched, or as `rows.read`.
    """
    if not source.here:
        raise InvalidArgument.field(
            "sources",
            f"{source.text} is not fetched: only a stage fetches remote sources; expected a path "
            "or what the store holds",
        )
    for file in source.files:
        yield from rows.read(file.path, file.name)


def survey(
    sources: Sequence[Source],
    forms: Sequence[RowFormat],
    report: Report,
    *,
    crew: Crew | None = None,
    duplicates: Duplicates | None = None,
    dedup: tuple[str, float] = (NONE, 1.0),
) -> Survey:
    """Read every row once and find out which can be used."""
    found = Survey()
    usable = bytearray()

    def batches() -> Iterator[tuple[list[Row], RowFormat, list[object]]]:
        total = 0
        for source, form in zip(sources, forms, strict=True):
            for batch in _batched(source_rows(source)):
                total += len(batch)
                yield batch, form, [row.value for row in batch]
            found.ends.append(total)

    answers: Iterator[tuple[list[Row], Answer]]
    if crew is not None:
        answers = crew.read(batches(), *dedup)
    else:
        answers = ((batch, read(form, values, NONE)) for batch, form, values in batches())
    for batch, answer in answers:
        good = bytearray(b"\1" * len(batch))
        for number, problem in sorted(answer["said"].items()):
            found.bad.add(batch[number], problem)
            good[number] = 0
        usable += good
        found.unused.update(answer["unused"])
        if duplicates is not None:
            duplicates.add(answer)
        report("reading", len(usable), 0)
    found.usable = np.frombuffer(usable, dtype=np.bool_).copy()
    if duplicates is not None:
        report("comparing", 0, 0)
        equal, near = duplicates.find(found.usable)
        found.equal, found.near = int(equal.sum()), int(near.sum())
        found.usable &= ~(equal | near)
    return found


def choose(
    found: Survey, *, seed: int, max_rows: int, val_set_size: float, weights: Sequence[float]
) -> Rows:
    """The rows to encode, shuffled; a row may come several times.

    Raises:
        InvalidArgument: there are none, or none would be left to train on.
    """
    if not found.usable.any():
        raise InvalidArgument.field(
            "sources",
            f"none of {found.total} rows can be used: {found.bad}"
            if found.total
            else "the sources hold no rows",
        )
    starts = [0, *found.ends[:-1]]
    parts = [
        (start + np.flatnonzero(found.usable[start:end])).astype(np.int32)
        for start, end in zip(starts, found.ends, strict=True)
    ]
    order = selection.mixed(parts, weights or [1.0] * len(parts), seed)
    order = order[:max_rows] if max_rows else order
    if not len(order):
        raise InvalidArgument.field("source_weights", "they take no row of any source")
    selection.split(order, val_set_size)
    return order


def encode(
    sources: Sequence[Source],
    forms: Sequence[RowFormat],
    found: Survey,
    chosen: Rows,
    crew: Crew,
    spool: Spool,
    *,
    report: Report,
) -> Encoded:
    """Encode the chosen rows into the spool, in the order of the sources."""
    wanted = np.zeros(found.total, dtype=np.bool_)
    wanted[chosen] = True
    total = int(wanted.sum())
    result = Encoded(np.zeros(found.total, dtype=np.int32))
    done = 0

    def batches() -> Iterator[tuple[tuple[Rows, list[Row]], RowFormat, list[object]]]:
        number = 0
        for source, form, end in zip(sources, forms, found.ends, strict=True):
            for batch in _batched(source_rows(source)):
                numbers = np.arange(number, number + len(batch), dtype=np.int32)
                number += len(batch)
                if number > end:
                    raise _changed(source)
                keep = wanted[numbers[0] : number]
                if not keep.all():
                    numbers = numbers[keep]
                    batch = [row for row, kept in zip(batch, keep, strict=True) if kept]
                if batch:
                    yield (numbers, batch), form, [row.value for row in batch]
            if number != end:
                raise _changed(source)

    for (numbers, batch), answer in crew.encode(batches(), SAMPLES):
        lengths = np.frombuffer(answer["lengths"], dtype=np.int32)
        ids = np.frombuffer(answer["ids"], dtype=np.int32)
        result.counts[numbers] = np.frombuffer(answer["counts"], dtype=np.int32)
        spool.extend(ids, lengths)
        result.tally.add(ids, lengths)
        if answer["samples"]:
            result.tally.samples = [
                {"file": row.file, "row": row.number, "text": text}
                for row, text in zip(batch, answer["samples"], strict=False)
            ]
        _note(result, batch, answer)
        done += len(batch)
        report("tokenizing", done, total)
    spool.flush()
    return result


def _note(result: Encoded, batch: Sequence[Row], answer: Answer) -> None:
    flags = np.frombuffer(answer["flags"], dtype=np.uint16)
    tokens = np.frombuffer(answer["tokens"], dtype=np.int64)
    result.straddling += int(((flags & Flag.STRADDLES) != 0).sum())
    result.longest = max(result.longest, int(tokens.max(initial=0)))
    for number in np.flatnonzero(flags & NOTABLE).tolist():
        row, flag = batch[number], Flag(int(flags[number]))
        said = answer["said"].get(number, "")
        if Flag.UNUSABLE in flag:
            result.unusable.add(row, said)
        if Flag.LONG in flag:
            result.long.add(row, f"{tokens[number]} tokens")
            result.truncated += Flag.DROPPED not in flag
            result.dropped += Flag.DROPPED in flag and Flag.MASKED not in flag
        if Flag.MASKED in flag:
            result.masked.add(row, f"its prompt fills the cutoff ({tokens[number]} tokens)")
        if Flag.ENDLESS in flag:
            result.endless.add(row, "its end of turn is not trained")
        if Flag.BOS_TWICE in flag:
            result.bos.add(row, "begins with BOS twice")
        if Flag.NO_BOS in flag:
            result.bos.add(row, "does not begin with BOS")
        if Flag.SPECIAL in flag:
            result.special.add(row, said)


def _batched(items: Iterator[Row]) -> Iterator[list[Row]]:
    """Batches of rows; smaller ones where rows are long."""
    batch: list[Row] = []
    size = 0
    for row in items:
        batch.append(row)
        size += row.size
        if len(batch) == _BATCH or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _changed(source: Source) -> FailedPrecondition:
    return FailedPrecondition(f"{source.text} changed while it was read; start again")
