"""Perplexity, and KL divergence to a reference model, over windows of tokens.

Responsibility: run a GGUF file over windows and sum up what it says of them. Does
not know where windows come from, nor artifacts.

Formulas: perplexity is exp of the mean negative log-likelihood of the scored
tokens; KL divergence is the mean over them of sum p (ln p - ln q), p being the
reference's distribution of the next token and q the file's. Nothing is cut off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from arriero.errors import FailedPrecondition
from arriero.gates.golden import log_softmax
from arriero.llama import Batch, Context, Model
from arriero.quantization.windows import UNSCORED, Window

# Tokens evaluated at once: logits of a vocabulary of 150k take 77 MB.
_CHUNK = 128

Logprobs = npt.NDArray[np.float32]


@dataclass(slots=True)
class Score:
    """Sums over scored tokens; add the score of further windows with `+=`.

    Attributes:
        tokens: scored.
        nll, nll_squares: of their negative log-likelihoods, in nats.
        kl, kl_max: KL divergence to the reference; the largest of one token.
        same_top: tokens where both have the same likeliest token.
        compared: tokens that were compared with a reference.
    """

    tokens: int = 0
    nll: float = 0.0
    nll_squares: float = 0.0
    kl: float = 0.0
    kl_max: float = 0.0
    same_top: int = 0
    compared: int = 0

    def __iadd__(self, other: Score) -> Score:
        self.tokens += other.tokens
        self.nll += other.nll
        self.nll_squares += other.nll_squares
        self.kl += other.kl
        self.kl_max = max(self.kl_max, other.kl_max)
        self.same_top += other.same_top
        self.compared += other.compared
        return self

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(min(self.nll / self.tokens, 700.0)) if self.tokens else math.nan

    @property
    def perplexity_error(self) -> float:
        """Its standard error, by the spread of the tokens' negative log-likelihoods."""
        if self.tokens < 2:
            return 0.0
        mean = self.nll / self.tokens
        variance = max(0.0, self.nll_squares / self.tokens - mean * mean)
        return self.perplexity * math.sqrt(variance / (self.tokens - 1))

    @property
    def kl_divergence(self) -> float:
        """Mean KL(reference || file), nats per token."""
        return self.kl / self.compared if self.compared else math.nan

    @property
    def top1_agreement(self) -> float:
        """Share of tokens with the same likeliest token as the reference."""
        return self.same_top / self.compared if self.compared else math.nan


def score(
    path: Path,
    windows: Sequence[Window],
    *,
    keep: Logprobs | None = None,
    against: Logprobs | None = None,
    tick: Callable[[int], None] = lambda tokens: None,
) -> Score:
    """Evaluate a GGUF file over windows.

    Args:
        path: of the file.
        windows: each is evaluated alone.
        keep: filled with the file's log-probabilities, shape (scored tokens,
            vocabulary), to be given as `against` for other files.
        against: the reference's.
        tick: told, window by window, how many tokens were evaluated; may raise.

    Raises:
        DataLoss: the file is damaged.
        FailedPrecondition: ids outside of the file's vocabulary, or a reference
            of another vocabulary.
    """
    result = Score()
    longest = max(len(window.tokens) for window in windows)
    with (
        Model(path) as model,
        Context(model, n_ctx=longest, n_batch=min(_CHUNK, longest)) as context,
    ):
        check_ids(windows, model.n_vocab, path.name)
        if against is not None and against.shape[1] != model.n_vocab:
            raise FailedPrecondition(
                f"{path.name} has {model.n_vocab} tokens and the reference {against.shape[1]}: "
                "another tokenizer; expected a file of the same model",
                reason="OTHER_VOCABULARY",
            )
        done = 0
        for window in windows:
            for logits, targets in _scored(context, window):
                rows = slice(done, done + len(targets))
                done += len(targets)
                logprobs = log_softmax(logits)
                nll = -logprobs[np.arange(len(targets)), targets].astype(np.float64)
                result.tokens += len(targets)
                result.nll += float(nll.sum())
                result.nll_squares += float((nll * nll).sum())
                if keep is not None:
                    keep[rows] = logprobs
                if against is not None:
                    _compare(result, against[rows], logprobs)
            tick(len(window.tokens))
    return result


def check_ids(windows: Sequence[Window], n_vocab: int, name: str) -> None:
    """Refuse windows that another tokenizer made.

    Raises:
        FailedPrecondition: an id outside of the vocabulary.
    """
    largest = max(int(window.tokens.max()) for window in windows)
    if largest >= n_vocab:
        raise FailedPrecondition(
            f"token {largest} is outside of the vocabulary of {name}, which has {n_vocab} tokens: "
            "the rows were made with another tokenizer; prepare them with this model's",
            reason="OTHER_VOCABULARY",
        )


def _scored(context: Context, window: Window) -> Iterator[tuple[Logprobs, npt.NDArray[np.int32]]]:
    """Logits of the scored positions with their targets, a chunk at a time."""
    batch = Batch(min(_CHUNK, context.n_batch))
    context.clear()
    for start in range(0, len(window.tokens), batch.capacity):
        ids = window.tokens[start : start + batch.capacity]
        targets = window.targets[start : start + batch.capacity]
        wanted = targets != UNSCORED
        batch.clear()
        batch.extend(ids.tolist(), start=start, sequence=0, outputs="none")
        batch.outputs[: len(ids)] = wanted
        context.decode(batch)
        count = int(wanted.sum())
        if count:
            yield context.all_logits(count), targets[wanted]


def _compare(result: Score, reference: Logprobs, logprobs: Logprobs) -> None:
    """Add KL divergence and agreement, row by row: two rows of a vocabulary in memory."""
    for p, q in zip(reference, logprobs, strict=True):
        kl = max(0.0, float(np.sum(np.exp(p) * (p - q), dtype=np.float64)))
        result.kl += kl
        result.kl_max = max(result.kl_max, kl)
        result.same_top += int(p.argmax() == q.argmax())
        result.compared += 1
