"""A byte-level BPE tokenizer, learnt and written without any tokenizer library.

Responsibility: merges from a few lines of text, and the `tokenizer.json` that
transformers and llama.cpp's converter read. Does not know any model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

__all__ = ["SPECIAL", "tokenizer_json"]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tokenizer_json(corpus: Iterable[str], size: int) -> dict[str, Any]:
    """A tokenizer of SmolLM2's kind (digits alone, then GPT-2's bytes and split).

    Args:
        corpus: what merges are learnt from.
        size: entries of the vocabulary, special ones included.
    """
    alphabet = sorted(_alphabet().values())
    merges = _learn(corpus, size - len(SPECIAL) - len(alphabet))
    pieces = [*SPECIAL, *alphabet, *(left + right for left, right in merges)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bytes_ = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, **flags, "special": True} for i, text in enumerate(SPECIAL)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**bytes_, "add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": {**bytes_, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [list(merge) for merge in merges],
        },
    }


def _alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {
        **{byte: chr(byte) for byte in printable},
        **{byte: chr(256 + i) for i, byte in enumerate(rest)},
    }


def _learn(corpus: Iterable[str], count: int) -> list[tuple[str, str]]:
    """The `count` merges that shorten the corpus most, one after the other."""
    stand_in = _alphabet()
    words: Counter[tuple[str, ...]] = Counter()
    for line in corpus:
        for i, part in enumerate(line.split(" ")):
            text = part if i == 0 else f" {part}"
            words[tuple(stand_in[byte] for byte in text.encode())] += 1
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        known = {left + right for left, right in merges}
        best = max((p for p in pairs if "".join(p) not in known), key=lambda p: (pairs[p], p))
        merges.append(best)
        words = Counter({_merged(word, best): times for word, times in words.items()})
    return merges


def _merged(word: Sequence[str], pair: tuple[str, str]) -> tuple[str, ...]:
    made: list[str] = []
    for piece in word:
        if made and (made[-1], piece) == pair:
            made[-1] += piece
        else:
            made.append(piece)
    return tuple(made)
