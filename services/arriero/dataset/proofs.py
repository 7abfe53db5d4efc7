"""The gates of a preparation, judged.

Responsibility: turn what was found about rows into verdicts, with what was
expected and what to do. Does not know how rows are read or encoded.
"""

from __future__ import annotations

import json
from pathlib import Path

from arriero.dataset.encoding import Encoder
from arriero.dataset.preparation import Encoded, Survey
from arriero.dataset.vocabulary import Vocabulary
from arriero.gates import Gates
from arriero.prompts import Template


def judge_schema(gates: Gates, found: Survey, encoded: Encoded, *, skip: bool) -> None:
    """`dataset.schema`: every row has the fields that its format needs, and can be rendered."""
    parts = [str(item) for item in (found.bad, encoded.unusable) if item.count]
    bad = found.bad.count + encoded.unusable.count
    detail = f"{found.total} rows, all usable"
    if bad:
        detail = f"{bad} of {found.total} rows cannot be used and were left out: {'; '.join(parts)}"
        if not skip:
            detail += ". Expected every row to be usable: mend them, or set on_bad_row: skip"
    gates.judge(
        "dataset.schema",
        skip or not bad,
        figure=bad,
        threshold=None if skip else 0,
        unit="rows",
        detail=detail,
    )


def judge_truncation(gates: Gates, encoded: Encoded, cutoff_len: int, allowed: float) -> None:
    """`dataset.truncation`: no more rows lose tokens at `cutoff_len` than are allowed to."""
    rows = int((encoded.counts > 0).sum())
    cut, share = encoded.truncated, encoded.truncated_share
    detail = f"{cut} of {rows} rows were cut at {cutoff_len} tokens"
    if cut:
        detail += (
            f" ({share:.1%}), the longest has {encoded.longest}: {encoded.long}. Allowed are "
            f"{allowed:.1%}: raise cutoff_len, set over_length: drop, or raise max_truncated_share"
        )
    gates.judge(
        "dataset.truncation",
        share <= allowed,
        figure=round(share, 6),
        threshold=allowed,
        unit="of rows",
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


def judge_bos(gates: Gates, encoded: Encoded, encoder: Encoder, declared: Template | None) -> None:
    """`dataset.bos`: one BOS where one belongs, and the tokenizer's own."""
    vocabulary = encoder.vocabulary
    parts = []
    if declared and declared.writes_bos and vocabulary.bos and not encoder.template.writes_bos:
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


def judge_tokenizer(gates: Gates, vocabulary: Vocabulary, directory: Path) -> None:
    """`tokenizer.match`: the model that came with the tokenizer has a row for every token."""
    embeddings = embedding_rows(directory)
    if embeddings is None:
        gates.skip("tokenizer.match", "the tokenizer came without a model's config.json")
        return
    detail = f"{vocabulary.size} tokens, {embeddings} embedding rows"
    if vocabulary.size > embeddings:
        detail += (
            f": the token {vocabulary.text_of(vocabulary.size - 1)!r} has none. Expected at least "
            "as many rows as tokens: take the tokenizer that belongs to the model, or add rows "
            "with an extend_tokenizer stage"
        )
    gates.judge(
        "tokenizer.match",
        vocabulary.size <= embeddings,
        figure=vocabulary.size,
        threshold=embeddings,
        unit="tokens",
        detail=detail,
    )


def embedding_rows(directory: Path) -> int | None:
    """`vocab_size` of a model's configuration; None when there is none that says so."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        rows = config.get("vocab_size") or config["text_config"]["vocab_size"]
        return int(rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
