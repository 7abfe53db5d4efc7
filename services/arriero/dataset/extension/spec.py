"""What an extension spec means: defaults, checks, and what its corpus is.

Responsibility: resolve an `ExtendTokenizerSpec` before any work starts. Does
not know how pieces are learnt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arriero.dataset import sources
from arriero.dataset.extension import embeddings, fast, pieces
from arriero.dataset.spec import check_digests
from arriero.errors import FailedPrecondition, FieldViolation, InvalidArgument
from arriero.gates import check_modes
from arriero.operations.defaults import with_defaults
from arriero.operations.kinds import ResolveContext, Resolved
from arriero.v1 import dataset_pb2
from arriero.weights.reader import Weights

__all__ = ["MEAN", "MEAN_ALL", "SEMANTICS", "check", "located", "model_config", "resolve"]

# Raised by hand when the same spec would give other tokens or rows.
SEMANTICS = 1
MEAN, MEAN_ALL = "mean", "mean_all"
LARGEST = 4_000_000
_LONGEST_TOKEN = 256
_RANGES = (
    ("vocab_size", 0, LARGEST),
    ("character_coverage", 0.9, 1),
    ("pad_to_multiple_of", 1, 1 << 16),
    ("held_out", 0, 0.5),
    ("max_corpus_bytes", 0, 1 << 50),
)
_CHOICES = (("model_type", ("bpe", "unigram")), ("embedding_init", (MEAN, MEAN_ALL)))


def resolve(spec: dataset_pb2.ExtendTokenizerSpec, context: ResolveContext) -> Resolved:
    """Fill in defaults and check everything that can be checked quickly.

    Raises:
        InvalidArgument: a field is wrong, or a source is not allowed.
        NotFound: a source does not exist.
        FailedPrecondition: the model's tokenizer or weights are none that can be extended.
    """
    resolved = with_defaults(spec)
    found = sources.look_up(_check(resolved, context), None, field="corpus")
    directory = context.inputs["model"][0].outline
    weights = _check_model(resolved, directory)
    del resolved.corpus[:]
    resolved.corpus.extend(source.text for source in found)
    digests = check_digests(found, resolved.sha256)
    del resolved.sha256[:]
    resolved.sha256.extend(digests)
    read = sum(source.size for source in found)
    learnt_from = min(read, resolved.max_corpus_bytes or read)
    largest = max((info.nbytes for info in weights.values()), default=0)
    return Resolved(
        spec=resolved,
        fingerprints=sources.identities(found),
        # The model again, and its two largest tensors grown, each once more in a scratch file.
        disk_bytes=weights.nbytes + 8 * largest + (64 << 20),
        # SentencePiece holds its sentences and an index of their symbols.
        memory_bytes=(512 << 20) + 8 * learnt_from,
        # The digests say what the corpus holds; where it lies changes nothing.
        unkeyed=("corpus",),
    )


def check(spec: dataset_pb2.ExtendTokenizerSpec, context: ResolveContext) -> None:
    """Refuse what is wrong whatever the model is; raises as `resolve`."""
    _check(with_defaults(spec), context)


def located(
    spec: dataset_pb2.ExtendTokenizerSpec, store: Any, allowed: Any
) -> list[sources.Source]:
    """The corpus, as files."""
    return [
        sources.locate(text, store=store, allowed=allowed, field=f"corpus[{i}]")
        for i, text in enumerate(spec.corpus)
    ]


def model_config(directory: Path) -> dict[str, Any]:
    """A model's `config.json`.

    Raises:
        FailedPrecondition: missing, or no JSON object.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FailedPrecondition(f"the model's config.json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise FailedPrecondition("the model's config.json is not an object")
    return config


def _check(
    spec: dataset_pb2.ExtendTokenizerSpec, context: ResolveContext
) -> Sequence[sources.Source]:
    check_modes(spec.gates)
    problems: list[FieldViolation] = []

    def refuse(field: str, description: str) -> None:
        problems.append(FieldViolation(field, description))

    if not (spec.corpus or spec.tokens or spec.pieces_from):
        refuse("corpus", "empty, as are tokens and pieces_from; expected one of them")
    learns = spec.corpus and not spec.pieces_from
    if learns and not spec.vocab_size and not spec.tokens:
        refuse("vocab_size", "is not set; expected how many tokens there should be in the end")
    for name, low, high in _RANGES:
        value = getattr(spec, name)
        if not low <= value <= high:
            refuse(name, f"{value:g}; expected {low:g} to {high:g}")
    for name, choices in _CHOICES:
        value = getattr(spec, name)
        if value not in choices:
            refuse(name, f"{value!r} is unknown; expected {' or '.join(choices)}")
    for i, token in enumerate(spec.tokens):
        if not token or len(token) > _LONGEST_TOKEN or any(c.isspace() for c in token):
            refuse(
                f"tokens[{i}]",
                f"{token[:40]!r}; expected text without spaces, of at most {_LONGEST_TOKEN} "
                "characters",
            )
    if problems:
        raise InvalidArgument(
            "; ".join(f"{item.field}: {item.description}" for item in problems),
            violations=problems,
        )
    return located(spec, context.store, context.sources)


def _check_model(spec: dataset_pb2.ExtendTokenizerSpec, directory: Path) -> Weights:
    config = model_config(directory)
    weights = Weights.open(directory)
    names = embeddings.check(weights, tied=bool(config.get("tie_word_embeddings", False)))
    tokens = 0
    if (path := directory / fast.FILE).is_file():
        tokens = fast.Fast.read(path).next_id
    if (path := directory / pieces.FILE).is_file():
        proto = pieces.read(path)
        pieces.growth(proto)
        tokens = max(tokens, len(proto.pieces))
    elif spec.model_type != "bpe":
        raise InvalidArgument.field(
            "model_type", f"{spec.model_type!r} needs a SentencePiece tokenizer; expected bpe"
        )
    for name in names:
        if weights[name].shape[0] < tokens:
            raise FailedPrecondition(
                f"the model's tokenizer has {tokens} tokens, its {name} {weights[name].shape[0]} "
                "rows: they belong to different models, or rows were lost; expected a row for each "
                "token",
                reason="TOKENIZER_MATCH",
            )
    if spec.vocab_size and spec.vocab_size <= tokens:
        raise InvalidArgument.field(
            "vocab_size",
            f"{spec.vocab_size}, but the tokenizer has {tokens} tokens; expected more than that",
        )
    return weights
