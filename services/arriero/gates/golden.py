"""Golden logits: the tuned model's own word, which every later stage is held to.

Responsibility: store log-probabilities of a model on fixed tokens and compare
other logits with them. numpy and safetensors only; does not know who computes
logits, or with what.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.errors import DataLoss, FailedPrecondition

FILE_NAME = "golden.safetensors"
# Tokens of the probe; 25 MB in fp16 for a vocabulary of 49k.
TOKENS = 256


@dataclass(frozen=True, slots=True)
class Golden:
    """Log-probabilities of a model after each token of some sequences.

    Attributes:
        tokens: int32, shape (n,): the sequences, one after the other.
        lengths: int32, shape (s,): length of each sequence, summing to n. Each
            is evaluated alone, from position 0.
        logprobs: float16, shape (n, vocabulary): row i is the distribution of
            the token that follows tokens[i] in its sequence, in nats.
    """

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float16]

    @property
    def sequences(self) -> list[npt.NDArray[np.int32]]:
        """The token ids of each sequence."""
        return np.split(self.tokens, np.cumsum(self.lengths)[:-1])

    def write(self, directory: Path) -> Path:
        """Write `golden.safetensors` into a directory."""
        from safetensors.numpy import save_file

        path = directory / FILE_NAME
        save_file(
            {"tokens": self.tokens, "lengths": self.lengths, "logprobs": self.logprobs}, str(path)
        )
        return path

    def write_report(self, directory: Path, *, made_by: str, **facts: Any) -> None:
        """Write `golden.safetensors`, and `report.json` that says what it is of.

        Args:
            directory: of the report.
            made_by: `merge` or `quantize`.
            facts: more for the report.
        """
        self.write(directory)
        report = {
            "report": "golden",
            "made_by": made_by,
            "tokens": int(self.tokens.size),
            "sequences": int(self.lengths.size),
            "vocabulary": int(self.logprobs.shape[1]),
            **facts,
        }
        text = json.dumps(report, indent=2) + "\n"
        (directory / "report.json").write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Golden:
        """Read what `write` wrote.

        Raises:
            FailedPrecondition: the directory holds no golden logits.
            DataLoss: it does not hold what it should.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = directory / FILE_NAME
        if not path.is_file():
            raise FailedPrecondition(
                f"{directory.name} holds no golden logits ({FILE_NAME} is missing); "
                "expected the report that a training or a merge made"
            )
        try:
            data = load_file(str(path))
            return cls(data["tokens"], data["lengths"], data["logprobs"])
        except (SafetensorError, KeyError) as error:
            raise DataLoss(f"golden logits in {directory.name} are damaged: {error}") from error


def probe_sequences(
    rows: Sequence[Sequence[int]], tokens: int = TOKENS, longest: int = 128
) -> list[list[int]]:
    """Cut rows to sequences of at most `longest` ids that hold `tokens` ids in all.

    Fewer when the rows have fewer. Sequences shorter than two ids are left out.
    """
    sequences: list[list[int]] = []
    left = tokens
    for row in rows:
        ids = list(row[: min(longest, left)])
        if left - len(ids) == 1:  # one id alone is no sequence: leave two
            ids.pop()
        if len(ids) < 2:
            continue
        sequences.append(ids)
        left -= len(ids)
        if left == 0:
            break
    return sequences


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Log-probabilities in nats along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far logits are from golden ones.

    Attributes:
        kl_divergence: mean over positions of KL(golden || other), nats per token.
        kl_max: its largest value.
        top1_agreement: share of positions with the same most likely token.
        confident_disagreements: of `contexts` those where top-1 differs although
            golden prefers its own to the other's choice by more than `noise`.
        noise: four times the mean absolute difference of log-probabilities over
            golden's 16 likeliest tokens: what differences of this size explain.
        tokens: positions compared.
        contexts: of these those that no earlier position has the same tokens as up to
            it: where sequences begin alike, one disagreement is not many.
    """

    kl_divergence: float
    kl_max: float
    top1_agreement: float
    confident_disagreements: int
    noise: float
    tokens: int
    contexts: int


def compare(golden: Golden, logits: npt.NDArray[np.float32]) -> Comparison:
    """Compare logits of shape (n, vocabulary or wider) with golden ones.

    Wider logits (padded vocabularies) are cut to golden's width.

    Raises:
        FailedPrecondition: another number of positions, or a narrower vocabulary.
    """
    rows, width = golden.logprobs.shape
    if logits.shape[0] != rows or logits.shape[1] < width:
        raise FailedPrecondition(
            f"logits of shape {logits.shape} cannot be compared with golden logits of shape "
            f"{golden.logprobs.shape}: another tokenizer or model"
        )
    kl = np.empty(rows, dtype=np.float64)
    noise = np.empty(rows, dtype=np.float64)
    preference = np.empty(rows, dtype=np.float64)
    same = np.empty(rows, dtype=bool)
    for i in range(rows):  # row by row: a whole (256, 150k) float32 would be 150 MB, twice
        p = golden.logprobs[i].astype(np.float32)
        q = log_softmax(logits[i, :width].astype(np.float32))
        # NaN stays NaN: Python's max would make 0 of it.
        kl[i] = np.maximum(0.0, np.sum(np.exp(p) * (p - q), dtype=np.float64))
        top = np.argpartition(p, -16)[-16:] if width > 16 else np.arange(width)
        top = top[np.argsort(p[top])[::-1]]
        noise[i] = float(np.abs(p[top] - q[top]).mean())
        preference[i] = float(p[top[0]] - p[int(np.argmax(q))])
        # fp16 rounds near-equal log-probabilities to ties: any of the tied is right.
        same[i] = preference[i] <= 0
    level = 4.0 * float(noise.mean())
    first = _first_of_contexts(golden)
    return Comparison(
        kl_divergence=float(kl.mean()),
        kl_max=float(kl.max()),
        top1_agreement=float(same.mean()),
        confident_disagreements=int(np.sum(first & ~same & (preference > level))),
        noise=level,
        tokens=rows,
        contexts=int(first.sum()),
    )


def _first_of_contexts(golden: Golden) -> npt.NDArray[np.bool_]:
    """Whether each position is the first whose sequence has these tokens up to it."""
    seen: set[bytes] = set()
    first = []
    for ids in golden.sequences:
        for end in range(1, len(ids) + 1):
            context = ids[:end].tobytes()
            first.append(context not in seen)
            seen.add(context)
    return np.array(first, dtype=bool)
