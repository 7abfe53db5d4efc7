"""A SentencePiece BPE as `tokenizer.json`, merge for merge.

Responsibility: the file that makes `tokenizers` read every text as SentencePiece
and llama.cpp do, leading spaces included. Does not know what is new in it.
"""

from __future__ import annotations

from typing import Any

from arriero.dataset.extension import pieces

__all__ = ["convertible", "from_sentencepiece"]

_SPECIAL = (pieces.UNKNOWN, pieces.CONTROL)


def convertible(proto: Any) -> bool:
    """Whether a model reads texts as LLaMA's does: no normalization, a space put before them."""
    normalizer = proto.normalizer_spec
    return bool(
        proto.trainer_spec.model_type == pieces.BPE
        and not normalizer.precompiled_charsmap
        and not normalizer.remove_extra_whitespaces
        and normalizer.add_dummy_prefix
    )


def from_sentencepiece(proto: Any, *, add_bos: bool) -> dict[str, Any]:
    """The parsed `tokenizer.json` of a convertible model."""
    texts = [piece.piece for piece in proto.pieces]
    vocab = {text: i for i, text in enumerate(texts)}
    added = [
        {
            "id": i,
            "content": piece.piece,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            "special": piece.type in _SPECIAL,
        }
        for i, piece in enumerate(proto.pieces)
        if piece.type in (*_SPECIAL, pieces.USER_DEFINED)
    ]
    merges: list[tuple[float, int, int]] = []
    for piece in proto.pieces:
        if piece.type == pieces.NORMAL:
            text = piece.piece
            for cut in range(1, len(text)):
                left, right = vocab.get(text[:cut]), vocab.get(text[cut:])
                if left is not None and right is not None:
                    merges.append((-piece.score, left, right))
    merges.sort()
    begin = texts[proto.trainer_spec.bos_id] if add_bos and proto.trainer_spec.bos_id >= 0 else ""
    head = [{"SpecialToken": {"id": begin, "type_id": 0}}] if begin else []
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    special = {"id": begin, "ids": [vocab[begin]], "tokens": [begin]} if begin else {}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*head, first],
            "pair": [*head, first, *head, second],
            "special_tokens": {begin: special} if begin else {},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": texts[proto.trainer_spec.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bool(proto.trainer_spec.byte_fallback),
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [[texts[left], texts[right]] for _, left, right in merges],
        },
    }
