"""Do tokens, embeddings and output layer of a merged model still belong together?

Responsibility: what the gates `merge.vocab` and `tokenizer.match` are judged by, from
written files, headers and adapters. Does not know how a merge is planned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from arriero.errors import DataLoss
from arriero.weights import Blend, Weights
from arriero.weights.config import is_tied, read_config
from arriero.weights.merged import HEAD, embeddings_of

__all__ = ["TokenizerProof", "compare_tokenizers", "token_ids", "vocabulary_problems"]

_SHOWN = 3


def vocabulary_problems(directory: Path, blends: Sequence[Blend]) -> list[str]:
    """What is wrong with embeddings and output layer of a written merge; empty when nothing.

    Rows that an adapter brought must be there, `config.json` must count them, and an
    output layer that was tuned apart must neither be missing nor be called tied.

    Args:
        directory: the merged model.
        blends: the adapters that went in.
    """
    written, config = Weights.open(directory), read_config(directory)
    name = embeddings_of(written)
    if name is None:
        return []
    problems = []
    rows = written[name].shape[0]
    if config.get("vocab_size") != rows:
        problems.append(
            f"config.json says vocab_size {config.get('vocab_size')}, {name} has {rows}"
        )
    if HEAD in written and written[HEAD].shape[0] != rows:
        problems.append(f"{HEAD} has {written[HEAD].shape[0]} rows, {name} has {rows}")
    implied = config.get("model_type") == "gpt2"  # tied without saying so
    if HEAD not in written and not is_tied(config) and not implied:
        problems.append(f"{HEAD} is missing and config.json does not tie it to {name}")
    for blend in blends:
        adapter = blend.adapter
        for target in (name, HEAD):
            brought = adapter.replaced.get(target)
            found = written.get(target, written[name]).shape[0]
            if brought is not None and brought.info.shape[0] != found:
                problems.append(
                    f"the adapter brings {brought.info.shape[0]} rows of {target}, the merged "
                    f"model has {found}"
                )
        tuned = HEAD in adapter.pairs or (
            HEAD in adapter.replaced and adapter.replaced[HEAD].trained
        )
        if tuned and not adapter.settings.keeps_tied and (HEAD not in written or is_tied(config)):
            problems.append(
                "the adapter tuned the output layer, but the merged model ties it to the embeddings"
            )
    return problems


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


class TokenizerProof:
    """Tokenizers of base and adapters, held against the rows of the merged model.

    Attributes:
        problems: what is wrong; empty when nothing.
        tokens: ids of the largest tokenizer, one more than the last.
        extended: the place in `adapters` of the tokenizer that has everything that the
            base's has, and more; None where the base's is to be kept.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.tokens = 0
        self.extended: int | None = None


def compare_tokenizers(base: Path, adapters: Sequence[Path], rows: int) -> TokenizerProof:
    """Hold the adapters' tokenizers against the base's, and all against the embeddings.

    Args:
        base: the base model's directory.
        adapters: PEFT directories, which may bring a tokenizer.
        rows: of the merged model's embeddings.

    Raises:
        DataLoss: a tokenizer's file is damaged.
    """
    proof = TokenizerProof()
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
