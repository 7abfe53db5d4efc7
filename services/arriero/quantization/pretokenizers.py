"""Which of llama.cpp's pre-tokenizers a BPE tokenizer splits text with.

Responsibility: recognize the rules in a `tokenizer.json`. Does not know
vocabularies or merges: rules stay the same when a vocabulary grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The words of a LLaMA 3 tokenizer; Qwen 2 takes digits one by one.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Rules -> names in `tokenizer.ggml.pre`. llama.cpp's names stand for the regular
# expressions in its llama-vocab.cpp; several names may stand for the same ones.
_NAMES: Mapping[tuple[str, ...], str] = {
    ("bytes: words",): "gpt-2",
    ("digits: single", "bytes: words"): "smollm",
    ("split: " + _WORDS % "{1,3}", "bytes"): "llama-bpe",
    ("split: " + _WORDS % "", "bytes"): "qwen2",
}
# Only this one takes a whole word that is in the vocabulary without merging it.
_IGNORES_MERGES = frozenset({"llama-bpe"})


def recognize(tokenizer: Mapping[str, Any]) -> str | None:
    """The name for `tokenizer.ggml.pre`, or None where no known rules are found.

    Args:
        tokenizer: a whole `tokenizer.json`.
    """
    model = tokenizer.get("model") or {}
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if model.get("type") != "BPE" or normalizer not in (None, "NFC"):
        return None
    name = _NAMES.get(tuple(_rules(tokenizer.get("pre_tokenizer") or {})))
    # qwen2 normalizes nothing in llama.cpp; texts are nearly always in NFC already.
    if name is None or (normalizer is not None and name != "qwen2"):
        return None
    if bool(model.get("ignore_merges")) != (name in _IGNORES_MERGES):
        return None
    return name


def _rules(step: Mapping[str, Any]) -> list[str]:
    kind = step.get("type")
    if kind == "Sequence":
        return [rule for inner in step.get("pretokenizers", ()) for rule in _rules(inner)]
    if kind == "Digits" and step.get("individual_digits"):
        return ["digits: single"]
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return ["bytes: words" if step.get("use_regex", True) else "bytes"]
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return [f"split: {(step.get('pattern') or {}).get('Regex')}"]
    return [f"unknown: {kind}"]
