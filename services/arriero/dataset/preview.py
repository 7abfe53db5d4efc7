"""What a dataset stage would make of its first rows, in moments.

Responsibility: count and render the first rows of each source as preparing does.
Does not know jobs or messages; stores nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from arriero.dataset import preparation
from arriero.dataset.batches import EXACT, Batches, Flag, Settings, read
from arriero.dataset.encoding import template_of
from arriero.dataset.formats import TEXT, RowFormat
from arriero.dataset.report import Findings
from arriero.dataset.rows import Row
from arriero.dataset.sources import Source
from arriero.dataset.spec import SKIP
from arriero.dataset.vocabulary import Vocabulary
from arriero.store import Artifact

__all__ = ["Preview", "Sample", "preview"]

_BATCH = 256


@dataclass(frozen=True, slots=True)
class Sample:
    """One row as it will be trained on; the lists are as long as each other."""

    row: Row
    truncated: bool
    ids: Sequence[int]
    texts: Sequence[str]
    trained: Sequence[bool]


@dataclass(slots=True)
class Preview:
    """What was seen.

    Attributes:
        rows: looked at; `all_rows` says whether these are all.
        tokens: that would be trained with, `trained_tokens` on.
        truncated: rows longer than `cutoff_len`.
        duplicates: rows that are said before.
        lengths: rows by their tokens before anything is cut.
        bad: rows that cannot be used.
        template: empty where all rows are plain text.
        formats: as they were found.
    """

    template: str
    formats: Sequence[str]
    special: frozenset[int]
    rows: int = 0
    all_rows: bool = True
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    duplicates: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    bad: Findings = field(default_factory=Findings)
    samples: list[Sample] = field(default_factory=list)


def preview(
    spec: Any, tokenizer: Artifact, sources: Sequence[Source], *, samples: int, rows: int
) -> Preview:
    """Look at the first rows of each source, as many of each.

    Args:
        spec: a checked `DatasetSpec` with its defaults.
        tokenizer: of the spec.
        sources: of the spec.
        samples: usable rows to give token by token.
        rows: to look at.

    Raises:
        InvalidArgument: as preparing would, about the template or a format.
        FailedPrecondition: the tokenizer cannot be loaded.
    """
    forms = preparation.formats_of(sources, spec.format, dict(spec.columns))
    vocabulary = Vocabulary.load(tokenizer.path)
    template = None
    if any(form.name != TEXT for form in forms):
        template = template_of(spec.template, tokenizer.path)
        template = template.bind(bos_token=vocabulary.bos, eos_token=vocabulary.eos)
    batches = Batches(
        Settings(
            tokenizer=str(tokenizer.path),
            template=template.to_json() if template else "",
            cutoff_len=spec.cutoff_len,
            train_on_inputs=spec.train_on_inputs,
            add_eos_token=spec.add_eos_token,
            over_length=spec.over_length,
            drop_masked=spec.on_bad_row == SKIP,
        ),
        vocabulary,
    )
    found = Preview(
        template.name if template else "",
        list(dict.fromkeys(form.name for form in forms)),
        frozenset(vocabulary.special),
    )
    each = -(-rows // max(1, len(sources)))
    seen: set[bytes] = set()
    for source, form in zip(sources, forms, strict=True):
        stream = preparation.source_rows(source)
        for batch in _batched(islice(stream, each)):
            _count(found, form, batch, seen)
            _encode(found, batches, form, batch, samples)
        found.all_rows &= next(stream, None) is None
    return found


def _batched(rows: Iterable[Row]) -> Iterator[list[Row]]:
    stream = iter(rows)
    while batch := list(islice(stream, _BATCH)):
        yield batch


def _count(found: Preview, form: RowFormat, batch: list[Row], seen: set[bytes]) -> None:
    """Take out of the batch what cannot be used; count it, and what is said twice."""
    answer = read(form, [row.value for row in batch], EXACT)
    found.rows += len(batch)
    prints, said = answer["prints"], answer["said"]
    for number, row in enumerate(batch):
        if number in said:
            found.bad.add(row, said[number])
            continue
        mark = prints[16 * number : 16 * number + 16]
        found.duplicates += mark in seen
        seen.add(mark)
    batch[:] = [row for number, row in enumerate(batch) if number not in said]


def _encode(
    found: Preview, batches: Batches, form: RowFormat, batch: list[Row], samples: int
) -> None:
    answer = batches.encode(form, [row.value for row in batch])
    flags = np.frombuffer(answer["flags"], dtype=np.uint16)
    counts = np.frombuffer(answer["counts"], dtype=np.int32)
    lengths = np.frombuffer(answer["lengths"], dtype=np.int32)
    marked = np.frombuffer(answer["ids"], dtype=np.int32)
    usable = (flags & Flag.UNUSABLE) == 0
    for number in np.flatnonzero(~usable).tolist():
        found.bad.add(batch[number], answer["said"].get(number, "the template refuses it"))
    found.tokens += len(marked)
    found.trained_tokens += int((marked >= 0).sum())
    found.truncated += int(((flags & Flag.LONG) != 0).sum())
    found.lengths.update(np.frombuffer(answer["tokens"], dtype=np.int64)[usable].tolist())
    ends = np.concatenate(([0], np.cumsum(lengths)))
    firsts = np.cumsum(counts) - counts
    for number in np.flatnonzero(counts).tolist():
        if len(found.samples) >= samples:
            return
        first = int(firsts[number])
        part = marked[ends[first] : ends[first + 1]]
        ids = np.where(part >= 0, part, ~part).tolist()
        found.samples.append(
            Sample(
                batch[number],
                bool(flags[number] & Flag.LONG),
                ids,
                batches.vocabulary.texts(ids),
                (part >= 0).tolist(),
            )
        )
