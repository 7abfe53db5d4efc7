"""Tokenizers of a base and of adapters, held against each other and the embeddings.

Responsibility: which files a tokenizer is, token ids from them, the gate
`tokenizer.match`. Does not know how anything is tokenized.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arriero.errors import DataLoss
from arriero.gates import Gates

__all__ = ["FILES", "TokenizerProof", "added_tokens", "compare_tokenizers", "token_ids"]

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_SHOWN = 3


def token_ids(directory: Path) -> dict[str, int] | None:
    """Token -> id of `tokenizer.json` and `added_tokens.json`; None without either.

    Raises:
        DataLoss: one of them is damaged.
    """
    found: dict[str, int] = {}
    path = directory
    try:
        path = directory / "tokenizer.json"
        if path.is_file():
            data = json.loads(path.read_text(encoding="utf-8"))
            entries = data["model"].get("vocab", {})
            # Unigram models list [piece, score]; the others map piece to id.
            if isinstance(entries, list):
                entries = {piece: i for i, (piece, _) in enumerate(entries)}
            found |= entries
            found |= {token["content"]: token["id"] for token in data["added_tokens"]}
        path = directory / "added_tokens.json"
        if path.is_file():
            found |= json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataLoss(f"{path.name} is not a tokenizer's file: {error}; fetch it again") from error
    return found or None


def added_tokens(directory: Path) -> dict[str, dict[str, Any]]:
    """Tokens of `tokenizer.json` that its model does not have, by id.

    In the form of `added_tokens_decoder` in `tokenizer_config.json`; empty without the file.

    Raises:
        DataLoss: the file is damaged.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        entries = data["model"].get("vocab", {})
        pieces = {entry[0] for entry in entries} if isinstance(entries, list) else set(entries)
        return {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in data["added_tokens"]
            if token["content"] not in pieces
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataLoss(f"{path.name} is not a tokenizer's file: {error}; fetch it again") from error


class TokenizerProof:
    """Tokenizers of base and adapters, held against the rows of the merged model.

    Attributes:
        problems: what is wrong; empty when nothing.
        rows: of the embeddings.
        tokens: ids of the largest tokenizer, one more than the last.
        extended: the place in `adapters` of the tokenizer that has everything that the
            base's has, and more; None where the base's is to be kept.
    """

    def __init__(self, rows: int) -> None:
        self.problems: list[str] = []
        self.rows = rows
        self.tokens = 0
        self.extended: int | None = None

    def judge(self, gates: Gates) -> None:
        """Judge `tokenizer.match`, where it is wanted."""
        if gates.wanted("tokenizer.match"):
            gates.judge(
                "tokenizer.match",
                not self.problems,
                figure=float(self.tokens),
                threshold=float(self.rows),
                unit="ids",
                detail="; ".join(self.problems),
            )


def compare_tokenizers(base: Path, adapters: Sequence[Path], rows: int) -> TokenizerProof:
    """Hold the adapters' tokenizers against the base's, and all against the embeddings.

    Args:
        base: the base model's directory.
        adapters: PEFT directories, which may bring a tokenizer.
        rows: of the merged model's embeddings.

    Raises:
        DataLoss: a tokenizer's file is damaged.
    """
    proof = TokenizerProof(rows)
    ours = token_ids(base)
    known = ours or {}
    proof.tokens = 1 + max(known.values(), default=-1)
    if proof.tokens > rows:
        proof.problems.append(_too_many("the base's tokenizer", known, rows))
    for number, directory in enumerate(adapters):
        theirs = token_ids(directory)
        if theirs is None:
            continue
        changed = [token for token, i in known.items() if theirs.get(token) != i]
        if changed:
            proof.problems.append(
                f"adapter {number + 1} was trained with another tokenizer: {len(changed)} of "
                f"{len(known)} tokens of the base have other ids or none, such as "
                f"{', '.join(repr(token) for token in changed[:_SHOWN])}; merge it into the model "
                "that it was trained on"
            )
        elif 1 + max(theirs.values()) > rows:
            proof.problems.append(_too_many(f"the tokenizer of adapter {number + 1}", theirs, rows))
        elif len(theirs) > len(known):
            proof.extended, known = number, theirs
        proof.tokens = max(proof.tokens, 1 + max(theirs.values()))
    return proof


def _too_many(whose: str, ids: Mapping[str, int], rows: int) -> str:
    above = sorted(token for token, i in ids.items() if i >= rows)
    return (
        f"{whose} has {1 + max(ids.values())} ids, the embeddings {rows} rows; "
        f"{len(above)} tokens have none, such as {', '.join(map(repr, above[:_SHOWN]))}: save the "
        "resized embeddings with the adapter, or use the tokenizer that belongs to the model"
    )
