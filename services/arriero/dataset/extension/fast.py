"""`tokenizer.json`: the tokenizer that transformers and this room load.

Responsibility: read a BPE out of it, learn more, and write it with more pieces,
merges and added tokens; everything else in the file stays as it is. Does not
know SentencePiece.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from arriero.dataset.extension.growing import Growth, by_pair
from arriero.errors import FailedPrecondition

__all__ = ["FILE", "Fast"]

FILE = "tokenizer.json"


class Fast:
    """A `tokenizer.json` in memory.

    Args:
        data: the parsed file.

    Attributes:
        vocab: id of each piece of the model, added tokens apart.
        added: id of each added token.

    Raises:
        FailedPrecondition: its model is not a BPE.
    """

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data
        model = data.get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            kind = model.get("type") if isinstance(model, dict) else "nothing"
            raise FailedPrecondition(
                f"{FILE} holds a {kind} model; only BPE vocabularies are extended, as "
                "LLaMA-family models have them"
            )
        self._model = model
        self.vocab: dict[str, int] = model["vocab"]
        self._merges = [
            tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]
        ]
        self.added = {str(token["content"]): int(token["id"]) for token in data["added_tokens"]}

    @classmethod
    def read(cls, path: Path) -> Fast:
        """Read a file.

        Raises:
            FailedPrecondition: it is no tokenizer, or not a BPE.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            data.setdefault("added_tokens", [])
            return cls(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FailedPrecondition(f"{path.name} is not a tokenizer: {error}") from error

    @property
    def ids(self) -> dict[str, int]:
        """Id of every token, added ones included."""
        return {**self.vocab, **self.added}

    @property
    def next_id(self) -> int:
        """The id after the last."""
        return max(self.ids.values(), default=-1) + 1

    def growth(self) -> Growth:
        """What its pieces merge into, to grow on."""
        ranks = {by_pair(*merge): rank for rank, merge in enumerate(self._merges)}
        return Growth(set(self.ids), ranks, by_pair, new_symbols=not self.byte_level)

    @property
    def byte_level(self) -> bool:
        """Whether pieces are written in GPT-2's alphabet of bytes."""
        return '"ByteLevel"' in json.dumps(self._data.get("pre_tokenizer"))

    def learn(self, lines: Iterable[str], vocab_size: int) -> list[str]:
        """Pieces of a BPE learnt from text that is cut as here, in the order of their merges."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        own = Tokenizer.from_str(json.dumps(self._data))
        fresh = Tokenizer(models.BPE())
        if own.normalizer is not None:
            fresh.normalizer = own.normalizer
        # Without cutting whole lines would be words: converted SentencePiece models have
        # none, since their merges never cross a space.
        fresh.pre_tokenizer = own.pre_tokenizer or pre_tokenizers.Split("▁", "merged_with_next")
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if self.byte_level else [],
        )
        fresh.train_from_iterator(lines, trainer)
        learnt = fresh.get_vocab()
        return sorted(learnt, key=lambda piece: learnt[piece])

    def extend(
        self,
        pieces: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        tokens: Mapping[str, int],
    ) -> None:
        """Add pieces, merges behind all others, and tokens that are matched as they are."""
        self.vocab.update(pieces)
        self._merges += merges
        self._add(tokens)

    def extend_scored(
        self,
        pieces: Mapping[str, int],
        scores: Mapping[str, float],
        tokens: Mapping[str, int],
    ) -> None:
        """Add the pieces of a SentencePiece model, with all merges that lead to any piece.

        SentencePiece merges any two symbols whose whole is a piece, by the piece's score;
        new pieces may thus lead to old ones in new ways, which get their piece's rank.

        Args:
            pieces: new ones.
            scores: of all ordinary pieces, the new ones included.
            tokens: to match as they are.
        """
        self.vocab.update(pieces)
        known = set(self._merges)
        found = [
            merge
            for text in scores
            for merge in _splits(text, self.vocab)
            if merge not in known and (text in pieces or not pieces.keys().isdisjoint(merge))
        ]
        found.sort(key=lambda m: (-scores["".join(m)], self.vocab[m[0]], self.vocab[m[1]]))
        old = [-scores.get(left + right, 0.0) for left, right in self._merges]
        if old == sorted(old):
            merged = sorted([*self._merges, *found], key=lambda m: -scores.get("".join(m), 0.0))
            self._merges = merged  # stable: of one piece's merges the old ones come first
        else:
            self._merges += found
        self._add(tokens)

    def _add(self, tokens: Mapping[str, int]) -> None:
        # `tokenizers` counts on from the vocabulary's size for tokens that it does not
        # hold: without their ids in it, new pieces would move old tokens.
        self.vocab.update({**self.added, **tokens})
        for text, number in tokens.items():
            self._data["added_tokens"].append(added_token(text, number))
            self.added[text] = number

    def write(self, path: Path) -> None:
        """Write the file."""
        self._model["merges"] = [list(merge) for merge in self._merges]
        path.write_text(json.dumps(self._data, ensure_ascii=False, indent=1), encoding="utf-8")


def added_token(text: str, number: int | None = None) -> dict[str, Any]:
    """An added token, not special: decoding shows it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    head = {"id": number} if number is not None else {}
    return {**head, "content": text, **flags, "special": False}


def _splits(text: str, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    cuts = ((text[:i], text[i:]) for i in range(1, len(text)))
    return [(left, right) for left, right in cuts if left in vocab and right in vocab]
