"""How fast a GGUF file is on this machine.

Responsibility: time prompts and generation, several files side by side. Does not
know what the files say.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from arriero.llama import Batch, Context, Model

PROMPT_TOKENS = 256
GENERATED_TOKENS = 32
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second of one stream: of a prompt at once, and one after the other."""

    prompt: float
    generation: float


def measure(paths: Sequence[Path], tick: Callable[[], None] = lambda: None) -> list[Speed]:
    """The median of three rounds for each file, in which the files take turns.

    Whatever else the machine does then slows all of them, not one.

    Raises:
        DataLoss: a file is damaged.
    """
    found: list[list[Speed]] = [[] for _ in paths]
    for _ in range(ROUNDS):
        for path, speeds in zip(paths, found, strict=True):
            speeds.append(_once(path))
            tick()
    return [
        Speed(
            prompt=statistics.median(speed.prompt for speed in speeds),
            generation=statistics.median(speed.generation for speed in speeds),
        )
        for speeds in found
    ]


def _once(path: Path) -> Speed:
    with (
        Model(path) as model,
        Context(model, n_ctx=PROMPT_TOKENS + GENERATED_TOKENS, n_batch=PROMPT_TOKENS) as context,
    ):
        batch = Batch(PROMPT_TOKENS)
        ids = [(7 * i + 3) % model.n_vocab for i in range(PROMPT_TOKENS)]
        # Reads the file's pages, which a replica has done long before it is asked.
        _decode(context, batch, ids[:16], start=0)
        context.clear()
        prompt = _decode(context, batch, ids, start=0)
        begin = time.perf_counter()
        for i in range(GENERATED_TOKENS):
            _decode(context, batch, ids[i : i + 1], start=PROMPT_TOKENS + i)
        generation = time.perf_counter() - begin
    return Speed(PROMPT_TOKENS / prompt, GENERATED_TOKENS / generation)


def _decode(context: Context, batch: Batch, ids: Sequence[int], *, start: int) -> float:
    """Seconds that a batch takes, its last logits at hand."""
    begin = time.perf_counter()
    batch.clear()
    rows = batch.extend(ids, start=start, sequence=0)
    context.decode(batch)
    context.logits(rows.stop - 1)
    return time.perf_counter() - begin
