"""Whether an extended tokenizer still is the one that the model was trained with.

Responsibility: the gate `tokenizer.match`, and what the new tokens are worth.
Does not know how they were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arriero.dataset.extension import fast, pieces
from arriero.dataset.extension.tokenizer import Additions, BaseTokenizer
from arriero.gates import Gates

__all__ = ["Compression", "judge", "measure", "readable"]

GATE = "tokenizer.match"
_LINES, _NAMED, _SAMPLES, _SHOWN = 1000, 5, 3, 60
# What every tokenizer is compared on, besides the lines that were kept apart.
_PLAIN = (
    "The driver takes a train of pack llamas over the Andes.",
    "Prices rose by 3.14% to 1,234,567.89 dollars in 2024.",
    "words  with   several    spaces, and\ta tab",
    "El pingüino comió piña mañana; ¿quién sabe?",
    "今天天气很好，我们去公园散步吧。",
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    "Smile 🙂 and go 🚀",
)


@dataclass
class Compression:
    """Tokens of the same lines before and after."""

    lines: int = 0
    bytes: int = 0
    before: int = 0
    after: int = 0
    used: set[int] = field(default_factory=set)
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def gain(self) -> float:
        """How many old tokens one token of now stands for."""
        return self.before / self.after if self.after else 1.0

    def to_json(self) -> dict[str, Any]:
        """The figures."""
        return {
            "lines": self.lines,
            "bytes": self.bytes,
            "tokens_before": self.before,
            "tokens_after": self.after,
            "bytes_per_token_before": self.bytes / self.before if self.before else 0.0,
            "bytes_per_token_after": self.bytes / self.after if self.after else 0.0,
            "gain": self.gain,
            "new_tokens_used": len(self.used),
            "samples": self.samples,
        }


def measure(base: BaseTokenizer, directory: Path, lines: Sequence[str]) -> Compression:
    """Tokenize lines both ways."""
    from tokenizers import Tokenizer

    new = Tokenizer.from_file(str(directory / fast.FILE))
    found = Compression()
    before = base.backend.encode_batch(list(lines), add_special_tokens=False)
    after = new.encode_batch(list(lines), add_special_tokens=False)
    for line, old, grown in zip(lines, before, after, strict=True):
        found.lines += 1
        found.bytes += len(line.encode())
        found.before += len(old.ids)
        found.after += len(grown.ids)
        found.used.update(i for i in grown.ids if i >= base.next_id)
        if len(found.samples) < _SAMPLES and len(grown.ids) < len(old.ids):
            found.samples.append(
                {
                    "before": readable(base, base.backend, old.ids[:_SHOWN]),
                    "after": readable(base, new, grown.ids[:_SHOWN]),
                }
            )
    return found


def readable(base: BaseTokenizer, backend: Any, ids: Sequence[int]) -> list[str]:
    """Tokens as people read them; of a character's parts what they are alone, �."""
    if base.fast.byte_level:
        return [str(backend.decode([number], skip_special_tokens=False)) for number in ids]
    return [str(backend.id_to_token(number)) for number in ids]


def judge(
    gates: Gates,
    base: BaseTokenizer,
    directory: Path,
    made: Additions,
    lines: Sequence[str],
    *,
    rows: int,
) -> None:
    """`tokenizer.match`: a row for each token, old ids unchanged, both files alike, nothing lost.

    A line counts only where the old tokenizer did well by itself.
    """
    if not gates.wanted(GATE):
        return
    from tokenizers import Tokenizer

    with gates.timed():
        new = Tokenizer.from_file(str(directory / fast.FILE))
        ids: dict[str, int] = new.get_vocab(with_added_tokens=True)
        old = base.ids
        problems = [
            f"{text!r} had id {number} and now has {ids.get(text)}"
            for text, number in old.items()
            if ids.get(text) != number
        ]
        tokens = max(ids.values()) + 1
        if tokens > rows:
            problems.append(f"{tokens} tokens, but {rows} rows in the embedding")
        problems += [
            f"{text!r} was added as {number} and is read as {found}"
            for text, number in made.tokens.items()
            if (found := new.encode(text, add_special_tokens=False).ids)[-1:] != [number]
        ]
        texts = [*_PLAIN, *lines[:_LINES]]
        problems += _lost(base.backend, new, texts)
        # After a token that is matched as it is, `tokenizers` and llama.cpp put a space
        # before the rest of the text, as before any text; SentencePiece does not.
        plain = [text for text in texts if not any(token in text for token in made.tokens)]
        problems += _differing(base, directory, new, plain)
    gates.judge(
        GATE,
        not problems,
        figure=len(problems),
        threshold=0,
        unit="differences",
        detail=(
            f"{'; '.join(problems[:_NAMED])}"
            + (f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else "")
            if problems
            else f"{len(old)} tokens keep their ids, {len(made)} are new, {rows} rows; "
            f"{len(texts)} texts come back as they were"
        ),
    )


def _lost(old: Any, new: Any, texts: Sequence[str]) -> list[str]:
    """Texts that came back whole from the old tokenizer and do not from the new one."""

    def back(backend: Any, text: str) -> str:
        ids = backend.encode(text, add_special_tokens=False).ids
        return str(backend.decode(ids, skip_special_tokens=False))

    return [
        f"{_short(text)} comes back as {_short(back(new, text))}"
        for text in texts
        if back(old, text) == text and back(new, text) != text
    ]


def _differing(base: BaseTokenizer, directory: Path, new: Any, texts: Sequence[str]) -> list[str]:
    """Texts on which the new files differ, and the old ones did not."""
    if base.sentencepiece is None:
        return []
    import sentencepiece

    before = sentencepiece.SentencePieceProcessor(model_file=str(base.directory / pieces.FILE))
    after = sentencepiece.SentencePieceProcessor(model_file=str(directory / pieces.FILE))

    def same(backend: Any, processor: Any, text: str) -> bool:
        ids = backend.encode(text, add_special_tokens=False).ids
        return bool(ids == list(processor.encode(text)))

    return [
        f"{pieces.FILE} and {fast.FILE} read {_short(text)} differently"
        for text in texts
        if same(base.backend, before, text) and not same(new, after, text)
    ]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")
