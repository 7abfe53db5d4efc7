"""Do embeddings and output layer of a merged model still belong together?

Responsibility: what the gate `merge.vocab` is judged by, from written files, headers
and adapters. Does not know how a merge is planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arriero.weights import Blend, Weights
from arriero.weights.config import is_tied, read_config
from arriero.weights.merged import HEAD, embeddings_of

__all__ = ["vocabulary_problems"]


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
