"""Perplexity beyond the trained context, with and without rope scaling.

    make bench BENCH=long_context ARGS="--model model.gguf --text text.txt"

At 1x, 2x and 4x of the trained context the same tokens are predicted: the last half
of a trained context before each of a few places in the text, with so much of the text
before them. So a column differs from another one only in how much the model sees, and
a row only in how positions are turned. `none` is the model as it is. The scalings are
those of a deploy stage with its defaults: each is computed from the context.

The figures are of the arithmetic alone and do not depend on how busy the machine is.
Attention's cost grows with the square of the window: fewer places are less exact and as
much faster.

The JSON line has `ppl_<scaling>_<n>x`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from arriero.inference.rope import scaled
from arriero.llama import Batch, Context, Model
from arriero.replica import ROPE_TYPES, RopeSettings

BATCH = 512
TIMES = (1, 2, 4)


def main() -> None:
    """Measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="GGUF file")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text, not trained on")
    parser.add_argument("--places", type=int, default=4, help="places in the text")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--times", nargs="+", type=int, default=TIMES, help="trained contexts")
    parser.add_argument("--scalings", nargs="+", choices=ROPE_TYPES, default=ROPE_TYPES)
    arguments = parser.parse_args()
    console = Console()
    with Model(arguments.model) as model:
        trained = model.n_ctx_train
        ids = model.tokenize(arguments.text.read_text(encoding="utf-8"))
        longest = trained * max(arguments.times)
        places = min(arguments.places, len(ids) // longest)
        if places < 1:
            sys.exit(f"{arguments.text} has {len(ids)} tokens; expected at least {longest}")
        ends = [longest + round(i * (len(ids) - longest) / places) for i in range(places)]
        found: dict[str, dict[int, float]] = {}
        started = time.monotonic()
        for times, scaling in itertools.product(sorted(arguments.times), arguments.scalings):
            row = found.setdefault(scaling, {})
            if times == 1 and scaling != arguments.scalings[0]:
                # A factor of 1 is no scaling: the same computation.
                row[1] = found[arguments.scalings[0]][1]
                continue
            losses = losses_of(model, ids, ends, trained, times, scaling, arguments.threads)
            row[times] = math.exp(losses.mean())
            seconds = time.monotonic() - started
            console.print(f"{scaling} {times}x: {row[times]:.2f} ({seconds:.0f} s)", style="dim")
        report(console, found, model, trained, places)


def losses_of(
    model: Model,
    ids: list[int],
    ends: list[int],
    trained: int,
    times: int,
    scaling: str,
    threads: int,
) -> np.ndarray:
    """Nats per token, float64, of the last `trained / 2` tokens before each end."""
    window, scored = trained * times, trained // 2
    losses: list[np.ndarray] = []
    rope = scaled(RopeSettings(scaling), model, window)
    with Context(model, n_ctx=window, n_batch=BATCH, n_threads=threads, rope=rope) as context:
        batch = Batch(BATCH)
        for end in ends:
            context.clear()
            seen = ids[end - window : end]
            # A row predicts the token after it.
            first = window - scored - 1
            for start in range(0, window - 1, BATCH):
                chunk = seen[start : min(start + BATCH, window - 1)]
                batch.clear()
                batch.extend(chunk, start=start, sequence=0, outputs="none")
                wanted = np.arange(start, start + len(chunk)) >= first
                batch.outputs[: len(chunk)] = wanted
                context.decode(batch)
                if count := int(wanted.sum()):
                    logits = context.all_logits(count)
                    targets = np.array(seen[start + 1 : start + 1 + len(chunk)])[wanted]
                    losses.append(cross_entropy(logits, targets))
    return np.concatenate(losses)


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax of the targets, shape (rows,), float64."""
    highest = logits.max(axis=1, keepdims=True)
    log_sums = np.log(np.exp(logits - highest).sum(axis=1, dtype=np.float64)) + highest[:, 0]
    rows = np.arange(len(targets))
    return np.asarray(log_sums - logits[rows, targets], dtype=np.float64)


def report(
    console: Console, found: dict[str, dict[int, float]], model: Model, trained: int, places: int
) -> None:
    """A table for people and a line for machines."""
    table = Table(
        "rope", *(f"{times}x ({trained * times})" for times in next(iter(found.values()))),
        title=f"Perplexity, {model.description}, {places} x {trained // 2} tokens",
    )  # fmt: skip
    for scaling, figures in found.items():
        table.add_row(scaling, *(f"{value:.2f}" for value in figures.values()))
    console.print(table)
    console.print(f"{model.path.name}: trained with {trained} tokens; {platform.machine()}")
    keys = {
        f"ppl_{scaling}_{times}x": round(value, 3)
        for scaling, figures in found.items()
        for times, value in figures.items()
    }
    print(json.dumps(keys))


if __name__ == "__main__":
    main()
