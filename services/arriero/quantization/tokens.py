"""Whether two tokenizers are one: the proof behind the gate `gguf.tokens`.

Responsibility: the texts to compare on, and the comparison. Does not know which
libraries tokenize.

Special tokens that are written in a text are read as such on both sides (a
Hugging Face tokenizer always does, llama.cpp when asked to), and BOS is added by
both or by neither: as the tokenizer is configured for plain text, and not at all
where a template has written it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

# (text, add special tokens) -> ids
Tokenizer = Callable[[str, bool], Sequence[int]]

# What every model is fed: a difference here is a difference in training data.
PLAIN: tuple[str, ...] = (
    "Hello, world! How are you doing today?",
    "The quick brown fox jumps over the lazy dog. It didn't care; they've seen it before.",
    "Prices rose by 3.14% to 1,234,567.89 dollars in 2024, then 10 20 300 4000 more.",
    "E-mail: someone.else+tag@example.org, see https://example.org/a/b?c=d&e=%20f#g",
    "first line\nsecond line\n\nfourth line\n- item one\n- item two\n",
    "Steps:\n\n1. Peel them.\n\n2. Boil for 15 minutes.\n10. Serve, at 7:30.\n\n\n2025",
    "words  with   several    spaces, and\ta tab",
    "Le cœur déçu mais l'âme plutôt naïve, Louÿs rêva de crapaüter en canoë.",
    "El pingüino comió piña mañana; ¿quién sabe? ¡Nadie!",
    "Größe, Straße, übermäßig, Äpfel und Öl.",
    "Съешь ещё этих мягких французских булок.",
    "今天天气很好，我们去公园散步吧。人工智能改变世界。",
    "こんにちは世界、カタカナとひらがな。",
    "안녕하세요 세계",
    "def f(x: int) -> int:\n    if x > 0:\n        return x ** 2  # square\n    return -x\n",
    'for (int i = 0; i < n; ++i) { sum += a[i]; }\n{"key": [1, 2.5, null, true]}',
    "Smile 🙂 and go 🚀, llama 🦙!",
    "### Instruction:\nName three animals.\n\n### Response:\n",
)

# Where tokenizers are known to differ in ways that hardly any text shows:
# leading spaces (transformers 5 keeps one where SentencePiece adds a second),
# invisible and combining characters, control characters.
EXOTIC: tuple[str, ...] = (
    " one leading space",
    "   three leading spaces",
    "\n\nleading newlines",
    "\t\ttabs",
    "trailing spaces   ",
    " ",
    "cafe\u0301 with a combining accent",
    "zero\u200bwidth\u200djoiner \ufeffmark",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽",
    "العربية من اليمين إلى اليسار",
    "हिन्दी में पाठ",
    "ภาษาไทย",
    "\r\nwindows\r\nlines\r\n",
    "bell \x07 and escape \x1b",
    "𝕱𝖗𝖆𝖐𝖙𝖚𝖗 𐍈 Ω≈ç√∫˜µ≤≥÷",
    "a" * 300,
    "▁underscores▁of▁SentencePiece",
)


@dataclass(frozen=True, slots=True)
class Sample:
    """A text to compare on.

    Attributes:
        text: what is tokenized.
        origin: what it is, for messages.
        add_special: whether BOS and the like are added.
        exotic: a difference is only worth a warning.
    """

    text: str
    origin: str
    add_special: bool = True
    exotic: bool = False


@dataclass(slots=True)
class Comparison:
    """What a comparison found; differences in words, one per text."""

    texts: int = 0
    differences: list[str] = field(default_factory=list)
    exotic_differences: list[str] = field(default_factory=list)


def built_in() -> list[Sample]:
    """The texts that every model is compared on."""
    return [
        *(Sample(text, "plain text") for text in PLAIN),
        *(Sample(text, "exotic text", exotic=True) for text in EXOTIC),
    ]


def compare(expected: Tokenizer, found: Tokenizer, samples: Iterable[Sample]) -> Comparison:
    """Tokenize every sample both ways.

    Args:
        expected: the tokenizer that the model was trained with.
        found: the one of the file under test.
        samples: what to tokenize.
    """
    result = Comparison()
    for sample in samples:
        want = list(expected(sample.text, sample.add_special))
        have = list(found(sample.text, sample.add_special))
        result.texts += 1
        if want != have:
            words = f"{sample.origin} {_short(sample.text)}: {_difference(want, have)}"
            (result.exotic_differences if sample.exotic else result.differences).append(words)
    return result


def _short(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else text[:limit] + "…")


def _difference(want: list[int], have: list[int]) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(want, have, strict=False)) if a != b),
        min(len(want), len(have)),
    )
    return (
        f"from token {at} on {_window(have, at)} where the model's tokenizer has "
        f"{_window(want, at)} ({len(have)} and {len(want)} tokens)"
    )


def _window(ids: list[int], at: int) -> str:
    shown = ", ".join(str(i) for i in ids[at : at + 4])
    return f"[{shown}{', …' if len(ids) > at + 4 else ''}]"
