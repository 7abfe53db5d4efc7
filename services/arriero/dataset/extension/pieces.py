"""SentencePiece models: read, learn, extend.

Responsibility: the file `tokenizer.model`. Does not know `tokenizer.json`, nor
models beyond their pieces.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arriero.dataset.extension.growing import Growth, by_piece, ranked
from arriero.errors import FailedPrecondition

__all__ = ["BPE", "append", "candidates", "find", "growth", "learn", "read"]

FILE = "tokenizer.model"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
BPE = 2
# Below it no merge was learnt: LLaMA's runs of spaces have -1e9.
_NO_SCORE = -1e8
# Texts of special tokens, which some models carry as ordinary pieces.
_SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")


def find(directory: Path) -> Path | None:
    """The SentencePiece model of a directory: `tokenizer.model`, or its only `.model` file."""
    path = directory / FILE
    if path.is_file():
        return path
    others = sorted(directory.glob("*.model"))
    return others[0] if len(others) == 1 else None


def read(path: Path) -> Any:
    """A `ModelProto`.

    Raises:
        FailedPrecondition: it is none.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError, by whichever implementation
        raise FailedPrecondition(f"{path.name} is not a SentencePiece model: {error}") from error
    if not proto.pieces:
        raise FailedPrecondition(f"{path.name} is not a SentencePiece model: it holds no pieces")
    return proto


def growth(proto: Any) -> Growth:
    """What a model's pieces merge into, to grow on.

    Raises:
        FailedPrecondition: not a BPE model.
    """
    if proto.trainer_spec.model_type != BPE:
        raise FailedPrecondition(
            f"{FILE} is not a BPE model, as LLaMA's are; only such ones are extended"
        )
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    return Growth({piece.piece for piece in proto.pieces}, ranked(scores), by_piece, True)


def candidates(proto: Any) -> list[str]:
    """The ordinary pieces of a model, in the order in which it merges them."""
    found = [(-piece.score, i) for i, piece in enumerate(proto.pieces) if piece.type == NORMAL]
    texts = [proto.pieces[i].piece for _, i in sorted(found)]
    return [text for text in texts if not _SPECIAL.fullmatch(text)]


def learn(
    proto: Any,
    lines: Iterable[str],
    *,
    vocab_size: int,
    model_type: str,
    character_coverage: float,
    longest: int,
) -> list[str]:
    """Pieces learnt from text, in the order in which they should be taken.

    The text is cut before learning as the given model has it: the same
    normalization, digits and prefix.

    Args:
        proto: the model that is to be extended.
        lines: of text.
        vocab_size: pieces to learn at most.
        model_type: `bpe` or `unigram`.
        character_coverage: share of the characters that become pieces.
        longest: bytes of the longest line.

    Raises:
        FailedPrecondition: the text is too little to learn from.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    given, normalizer = proto.trainer_spec, proto.normalizer_spec
    made = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=made,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=character_coverage,
            normalization_rule_name=normalizer.name or "identity",
            add_dummy_prefix=normalizer.add_dummy_prefix,
            remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
            split_digits=given.split_digits,
            split_by_unicode_script=given.split_by_unicode_script,
            split_by_number=given.split_by_number,
            split_by_whitespace=given.split_by_whitespace,
            max_sentencepiece_length=given.max_sentencepiece_length or 16,
            byte_fallback=False,
            max_sentence_length=longest,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise FailedPrecondition(
            f"SentencePiece learnt nothing from the corpus: {str(error)[:300]}; give more text"
        ) from error
    learnt = sentencepiece_model_pb2.ModelProto()
    learnt.ParseFromString(made.getvalue())
    found = candidates(learnt)
    # Models list characters last, since they need no merge; without its own piece each
    # of them takes several bytes, so they come first.
    return sorted(found, key=lambda piece: len(piece) > 1)


def append(proto: Any, entries: Sequence[tuple[str, int]]) -> dict[str, float]:
    """Append pieces with their types; scores of the ordinary ones, below all old ones.

    Each gets a score of its own: where scores are equal, SentencePiece, llama.cpp and
    `tokenizers` merge in different orders.
    """
    scores = [p.score for p in proto.pieces if p.type == NORMAL and p.score > _NO_SCORE]
    score = float(int(min(scores, default=0.0)))
    made: dict[str, float] = {}
    for text, kind in entries:
        if kind == NORMAL:
            score -= 1
            made[text] = score
        proto.pieces.add(piece=text, score=score if kind == NORMAL else 0.0, type=kind)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return made


def normal_scores(proto: Any) -> Mapping[str, float]:
    """Scores of the ordinary pieces."""
    return {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
