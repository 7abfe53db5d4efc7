"""The gates `gguf.template` and `gguf.rope`: what serving will do, against the training.

Responsibility: judge a file's prompt template by the rows that were trained on, and
its rotary positions by the model's configuration. Does not know conversion.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from arriero.errors import ArrieroError, DataLoss, NotFound
from arriero.gates import Gates
from arriero.gates.golden import Golden
from arriero.llama import Model, read_header
from arriero.prompts import MODEL, Template, load
from arriero.quantization import rope
from arriero.quantization.frames import Frame, Message, first_match, frames_of
from arriero.store import Artifact, Store

TEMPLATE_GATE = "gguf.template"
ROPE_GATE = "gguf.rope"
TEMPLATE_KEY = "arriero.template"

# Of the rows that say anything, the share that may be rendered otherwise: a wrong
# template changes all of them, an exotic character one.
_MOST_DIFFERENT = 0.5
# Tokens at the end of a prompt that may join with what is answered.
_SEAM = 2
# Relative; float32 metadata and factors are exact to 1e-6.
_MOST_TURNED = 1e-3
# In the label `formats` of a dataset.
_PLAIN_TEXT = "text"


@dataclass(frozen=True, slots=True)
class Trained:
    """Rows that were trained on.

    Attributes:
        golden: their first tokens.
        template: name of the template that they were rendered with.
    """

    golden: Golden
    template: str


def trained_rows(store: Store, golden: Artifact | None) -> Trained | None:
    """The rows behind golden logits; None where they were rendered with no template.

    Golden logits that a training took are of rows of its dataset, which is one of
    their parents and says how it was rendered.
    """
    if golden is None:
        return None
    for parent in golden.manifest.parents:
        try:
            manifest = store.manifest(parent)
        except (NotFound, DataLoss):
            continue
        name = manifest.labels.get("template", "")
        formats = manifest.labels.get("formats", "").split(",")
        if manifest.kind == "dataset" and name and formats[0] and _PLAIN_TEXT not in formats:
            return Trained(Golden.read(golden.path), name)
    return None


def prove_template(
    gates: Gates,
    *,
    gguf: Path,
    recorded: Template | None,
    rows: Trained | None,
    log: logging.Logger,
) -> None:
    """Judge `gguf.template`: prompts are rendered and tokenized as the rows were.

    The messages of each row are taken out of its text, rendered with the template
    that the file will be served with, and tokenized by llama.cpp: the result must
    be how the row begins.

    Args:
        gates: where the verdict goes.
        gguf: any file made from the model.
        recorded: the template that the model says it was trained with.
        rows: what was trained on, where that is known.
        log: each row that differs.
    """
    if not gates.wanted(TEMPLATE_GATE):
        return
    with gates.timed(), Model(gguf, vocab_only=True) as file:
        served = _served(file)
        if served is None:
            if rows is None and recorded is None:
                gates.skip(TEMPLATE_GATE, "neither file nor training has a prompt template")
                return
            name = recorded.name if recorded else rows.template if rows else ""
            _fail(gates, f"the file has no prompt template; it was trained with {name!r}")
            return
        if recorded is not None and (words := _renders_otherwise(file, served, recorded)):
            _fail(gates, words)
            return
        if rows is None:
            gates.judge(
                TEMPLATE_GATE, True, detail=f"{served.name!r}; no rows to compare prompts with"
            )
            return
        same, differences = _compare(file, served, rows.golden)
    for words in differences:
        log.warning("%s: %s", TEMPLATE_GATE, words)
    judged = same + len(differences)
    if not judged:
        gates.skip(TEMPLATE_GATE, "no row of the probe is long enough to hold a whole prompt")
        return
    share = len(differences) / judged
    detail = f"prompts of {same} of {judged} rows are rendered with {served.name!r} as trained on"
    if share > _MOST_DIFFERENT:
        detail = (
            f"{len(differences)} of {judged} rows were trained on with {rows.template!r} in "
            f"another form than {served.name!r} gives them in serving; first: {differences[0]}; "
            "quantize the model with the template that it was trained with"
        )
    gates.judge(
        TEMPLATE_GATE,
        share <= _MOST_DIFFERENT,
        figure=share,
        threshold=_MOST_DIFFERENT,
        unit="ratio",
        detail=detail,
    )


def prove_rope(gates: Gates, *, config: Path, gguf: Path) -> None:
    """Judge `gguf.rope`: positions turn as in `config.json`, over the same context.

    Args:
        gates: where the verdict goes.
        config: the model's `config.json`.
        gguf: any file made from it, with its `rope_freqs` where it has some.
    """
    if not gates.wanted(ROPE_GATE):
        return
    with gates.timed():
        try:
            expected = rope.of_config(json.loads(config.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            gates.skip(ROPE_GATE, f"config.json says nothing of rope ({error})")
            return
        found = rope.of_file(gguf, read_header(gguf))
    if not expected.known:
        gates.skip(ROPE_GATE, f"rope type {expected.kind!r} is not known here")
        return
    turned = rope.difference(expected, found)
    problems = []
    if turned > _MOST_TURNED:
        problems.append(
            f"rope is {_words(found)} in the file and {_words(expected)} in config.json: "
            f"frequencies differ by up to {turned:.2%}"
        )
    if expected.context and found.context < expected.context:
        problems.append(
            f"the file's context is {found.context} tokens, config.json's {expected.context}"
        )
    gates.judge(
        ROPE_GATE,
        not problems,
        figure=turned if np.isfinite(turned) else None,
        threshold=_MOST_TURNED,
        unit="ratio",
        detail="; ".join([*problems, "convert it with the converter of the linked llama.cpp"])
        if problems
        else f"{_words(expected)}, context {found.context}",
    )


def _words(found: rope.Rope) -> str:
    attention = f", attention factor {found.attention:.4g}" if found.attention != 1.0 else ""
    return f"{found.kind} of base {found.base:g}{attention}"


def _fail(gates: Gates, words: str) -> None:
    gates.judge(
        TEMPLATE_GATE,
        False,
        figure=1.0,
        threshold=_MOST_DIFFERENT,
        unit="ratio",
        detail=f"{words}; quantize the model with the template that it was trained with",
    )


class _Special(TypedDict):
    """What templates are told of special tokens."""

    bos_token: str | None
    eos_token: str | None


def _special(file: Model) -> _Special:
    """BOS and EOS as a replica gives them to templates."""

    def text(token: int | None) -> str | None:
        return None if token is None else file.token_to_piece(token).decode("utf-8", "replace")

    return {"bos_token": text(file.bos), "eos_token": text(file.eos)}


def _served(file: Model) -> Template | None:
    """The template that a replica chats with."""
    if stored := file.metadata.get(TEMPLATE_KEY):
        return Template.from_json(stored)
    if not file.chat_template:
        return None
    special = _special(file)
    return load(MODEL, file.chat_template).bind(
        bos_token=special["bos_token"], eos_token=special["eos_token"]
    )


_CONVERSATIONS: tuple[Sequence[Message], ...] = (
    ({"role": "user", "content": "What is a gate?"},),
    ({"role": "user", "content": "Translate.", "input": "Good morning!"},),
    (
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "And now?"},
    ),
)


def _renders_otherwise(file: Model, served: Template, recorded: Template) -> str:
    """How two templates differ; empty when they render alike."""
    special = _special(file)
    for messages in _CONVERSATIONS:
        try:
            want = recorded.render(messages, **special, add_generation_prompt=True)
        except ArrieroError:  # no conversation for this template
            continue
        try:
            have = served.render(messages, **special, add_generation_prompt=True)
        except ArrieroError as error:
            return f"the file's template {served.name!r} fails on a conversation: {error}"
        if have != want:
            return (
                f"the file's template {served.name!r} renders {have[:60]!r} where the template "
                f"of the training, {recorded.name!r}, rendered {want[:60]!r}"
            )
    return ""


def _compare(file: Model, served: Template, golden: Golden) -> tuple[int, list[str]]:
    """How many rows begin as they would be served, and the differences of the others."""
    special = _special(file)
    frames = frames_of(served, bos_token=special["bos_token"], eos_token=special["eos_token"])
    same, differences = 0, []
    for sequence in golden.sequences:
        ids = sequence.tolist()
        own = ids[1:] if ids and ids[0] == file.bos else ids
        text = file.detokenize(own, special=True)
        found = _messages(frames, text)
        if not found:
            # The probe's rows are cut; whole ones end with the end of a turn.
            cut = ids[-1] not in file.eog
            if not (cut and any(f.may_begin(t) for f in frames for t in (text, text[1:]))):
                differences.append(f"no prompt of it: {text[:60]!r}")
            continue
        prompts = [_prompt(file, served, messages, special) for messages in found]
        if any(_begins(ids, prompt) for prompt in prompts):
            same += 1
        else:
            differences.append(_difference(ids, prompts[0], text))
    return same, differences


def _messages(frames: Sequence[Frame], text: str) -> list[list[Message]]:
    """What may have been said, without and with the space that SentencePiece puts first."""
    bare = first_match(frames, text[1:]) if text.startswith(" ") else []
    return bare + first_match(frames, text)


def _prompt(
    file: Model, served: Template, messages: Sequence[Message], special: _Special
) -> list[int]:
    text = served.render(messages, **special, add_generation_prompt=True)
    return file.tokenize(text, add_special=not served.writes_bos, parse_special=True)


def _begins(ids: Sequence[int], prompt: Sequence[int]) -> bool:
    return list(ids[: len(prompt) - _SEAM]) == list(prompt[: len(prompt) - _SEAM])


def _difference(ids: Sequence[int], prompt: Sequence[int], text: str) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b),
        min(len(ids), len(prompt)),
    )
    return (
        f"{text[:40]!r}: from token {at} on {list(prompt[at : at + 3])} in serving, trained on "
        f"{list(ids[at : at + 3])}"
    )
