"""Rows to prepared splits: survey, choose, encode, judge.

Responsibility: the order of the work and the proofs about it. Does not know
jobs, artifacts or messages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from arriero.dataset import alpaca, rows, selection
from arriero.dataset.arrow import Spool, marked
from arriero.dataset.encoding import EncodedRow, Encoder, RenderedRow
from arriero.dataset.report import Findings, Tally
from arriero.dataset.rows import Row
from arriero.dataset.sources import Source
from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.gates import Gates
from arriero.prompts import Template

_BATCH = 256

# Called with a phase, rows done and rows in all (0: not known); may raise to stop.
Report = Callable[[str, int, int], None]


@dataclass(slots=True)
class Survey:
    """What the rows are, before any is encoded. Row numbers count over all files, from 0."""

    total: int = 0
    usable: list[int] = field(default_factory=list)
    bad: Findings = field(default_factory=Findings)
    unused: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Encoded:
    """Rows in the spool, and what was found about them.

    `places` is the spool's row by the row number of the survey.
    """

    places: dict[int, int] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    masked: Findings = field(default_factory=Findings)
    endless: Findings = field(default_factory=Findings)
    bos: Findings = field(default_factory=Findings)
    special: Findings = field(default_factory=Findings)


def read_all(sources: Sequence[Source]) -> Iterator[tuple[int, Row]]:
    """Every row of every file, numbered over all of them."""
    number = 0
    for source in sources:
        for file in source.files:
            for row in rows.read(file.path, file.name):
                yield number, row
                number += 1


def survey(sources: Sequence[Source], report: Report) -> Survey:
    """Read every row once and find out which can be used."""
    found = Survey()
    for number, row in read_all(sources):
        found.total += 1
        example = alpaca.parse(row.value)
        if isinstance(example, str):
            found.bad.add(row, example)
        else:
            found.usable.append(number)
        found.unused.update(alpaca.unused(row.value))
        if found.total % 1000 == 0:
            report("reading", found.total, 0)
    return found


def choose(found: Survey, *, seed: int, max_rows: int, val_set_size: float) -> list[int]:
    """The rows to encode, shuffled.

    Raises:
        InvalidArgument: there are none, or none would be left to train on.
    """
    if not found.usable:
        raise InvalidArgument.field(
            "sources",
            f"none of {found.total} rows can be used: {found.bad}"
            if found.total
            else "the sources hold no rows",
        )
    order = selection.shuffled(found.usable, seed)
    order = order[:max_rows] if max_rows else order
    selection.held_out(len(order), val_set_size)
    return order


def encode(
    sources: Sequence[Source],
    chosen: Sequence[int],
    encoder: Encoder,
    spool: Spool,
    *,
    drop_masked: bool,
    report: Report,
) -> Encoded:
    """Encode the chosen rows into the spool, in the files' order."""
    result = Encoded()
    wanted = set(chosen)
    batch: list[tuple[int, Row, RenderedRow]] = []
    specials = sorted(filter(None, encoder.vocabulary.special.values()))

    def flush() -> None:
        encoded = encoder.encode([rendered for _, _, rendered in batch])
        for (number, row, rendered), ids in zip(batch, encoded, strict=True):
            _inspect(result, row, ids, encoder)
            if ids.trained == 0:
                result.masked.add(row, f"its prompt fills all {len(ids.ids)} tokens")
                if drop_masked:
                    continue
            result.tally.add(row, rendered, ids)
            result.places[number] = len(spool)
            values = np.array(ids.ids, dtype=np.int32)
            trained = np.arange(len(values)) >= ids.trained_from
            spool.extend(marked(values, trained), np.array([len(values)], dtype=np.int32))
        batch.clear()
        report("tokenizing", len(spool), len(chosen))

    for number, row in read_all(sources):
        if number not in wanted:
            continue
        example = alpaca.parse(row.value)
        if isinstance(example, str):  # only if the file changed between the two readings
            raise FailedPrecondition(f"{row.file} changed while it was read; start again")
        if hits := _specials_in(example, specials):
            result.special.add(row, f"its text holds {', '.join(hits)}")
        batch.append((number, row, encoder.render(example)))
        if len(batch) == _BATCH:
            flush()
    if batch:
        flush()
    spool.flush()
    return result


def _inspect(result: Encoded, row: Row, encoded: EncodedRow, encoder: Encoder) -> None:
    bos = encoder.vocabulary.bos_id
    ids = encoded.ids
    if bos is not None:
        expected = encoder.template.writes_bos or encoder.vocabulary.adds_bos
        if ids[:2] == [bos, bos]:
            result.bos.add(row, "begins with BOS twice")
        elif expected and ids[:1] != [bos]:
            result.bos.add(row, "does not begin with BOS")
    if encoder.add_eos_token and not encoded.truncated and not encoded.ends_turn:
        result.endless.add(row, "its end of turn is not trained")


def _specials_in(example: alpaca.Example, specials: Sequence[str]) -> list[str]:
    text = f"{example.system}\n{example.instruction}\n{example.input}\n{example.output}"
    return [token for token in specials if token in text]


def judge_schema(gates: Gates, found: Survey, *, skip: bool) -> None:
    """`dataset.schema`: every row has the fields that its format needs."""
    bad = found.bad
    detail = f"{found.total} rows, all usable"
    if bad.count:
        detail = f"{bad.count} of {found.total} rows cannot be used and were left out: {bad}"
        if not skip:
            detail += ". Expected every row to be usable: mend them, or set on_bad_row: skip"
    gates.judge(
        "dataset.schema",
        skip or not bad.count,
        figure=bad.count,
        threshold=None if skip else 0,
        unit="rows",
        detail=detail,
    )


def judge_labels(gates: Gates, encoded: Encoded, encoder: Encoder, *, skip: bool) -> None:
    """`dataset.labels`: every row trains something, and learns where to stop."""
    masked, endless = encoded.masked, encoded.endless
    refused = (0 if skip else masked.count) + endless.count
    parts = []
    if masked.count:
        advice = "were dropped" if skip else "raise cutoff_len, or set on_bad_row: skip"
        parts.append(
            f"{masked.count} rows have no trained token within {encoder.cutoff_len} tokens "
            f"({masked}): {advice}"
        )
    if endless.count:
        end = encoder.template.end_text(encoder.vocabulary.eos)
        parts.append(
            f"{endless.count} rows do not train the end of turn {end!r}, which is "
            f"{encoder.vocabulary.count(end)} tokens here ({endless}); expected one special "
            "token: choose a template that fits the tokenizer, or set add_eos_token: false"
        )
    gates.judge(
        "dataset.labels",
        refused == 0,
        figure=refused,
        threshold=0,
        unit="rows",
        detail="; ".join(parts)
        or f"{encoded.tally.trained_tokens} of {encoded.tally.tokens} tokens are trained",
    )


def judge_bos(gates: Gates, encoded: Encoded, encoder: Encoder, declared: Template) -> None:
    """`dataset.bos`: one BOS where one belongs, and the tokenizer's own."""
    vocabulary = encoder.vocabulary
    parts = []
    if declared.writes_bos and vocabulary.bos and not encoder.template.writes_bos:
        parts.append(
            f"template {declared.name!r} says that it writes BOS, but what it renders does not "
            f"begin with the tokenizer's {vocabulary.bos!r}: use bos_token in the template"
        )
    if encoded.bos.count:
        parts.append(
            f"{encoded.bos.count} rows are wrong ({encoded.bos}); expected exactly one "
            f"{vocabulary.bos!r} at the beginning: take it out of the rows or the template"
        )
    who = "the template" if encoder.template.writes_bos else "the tokenizer"
    fine = f"one {vocabulary.bos!r} by {who}" if vocabulary.bos else "the tokenizer has no BOS"
    if vocabulary.bos and not (encoder.template.writes_bos or vocabulary.adds_bos):
        fine = "neither template nor tokenizer begins rows with BOS"
    gates.judge(
        "dataset.bos",
        not parts,
        figure=encoded.bos.count,
        threshold=0,
        unit="rows",
        detail="; ".join(parts) or fine,
    )
