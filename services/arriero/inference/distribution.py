"""Choosing the next token from logits, with numpy: llama.cpp's samplers in its order.

Responsibility: sampling where llama.cpp is not what computes. Does not know models,
text or stop conditions. What it has no sampler for it refuses.

The same words mean the same distributions as in `arriero.llama.sampler`; a seed draws
other tokens from them, since the random numbers are others.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from arriero.errors import InvalidArgument
from arriero.llama.sampler import Logprobs, Sampling

Values = npt.NDArray[np.float32]
_NEVER = -np.inf


class TokenSampler:
    """Samples for one request.

    Args:
        sampling: checked.
        prompt: token ids; penalties look back on them too.
        eog: tokens that `ignore_eos` forbids.
        size: of the vocabulary.
        window: tokens of the context, for `repeat_last_n` -1.

    Raises:
        InvalidArgument: a sampler that only llama.cpp has, or a token that is none.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        *,
        eog: frozenset[int],
        size: int,
        window: int,
    ) -> None:
        for name in ("mirostat", "xtc_probability", "dry_multiplier", "grammar"):
            if getattr(sampling, name):
                raise InvalidArgument.field(
                    f"sampling.{name}",
                    "is not available with the transformers backend; serve a gguf file, or leave "
                    "it out",
                )
        for token in sampling.logit_bias:
            if not 0 <= token < size:
                raise InvalidArgument.field(
                    f"sampling.logit_bias[{token}]", f"is no token of this model (0 to {size - 1})"
                )
        self._sampling = sampling
        self._random = np.random.default_rng(
            secrets.randbits(32) if sampling.seed is None else sampling.seed
        )
        last = sampling.repeat_last_n
        self._window = window if last < 0 else last
        self._seen = list(prompt)
        biases = dict(sampling.logit_bias)
        if sampling.ignore_eos:
            biases.update(dict.fromkeys(eog, _NEVER))
        self._biased = np.array(list(biases), dtype=np.int64)
        self._biases = np.array(list(biases.values()), dtype=np.float32)

    @property
    def tells(self) -> bool:
        """Whether log-probabilities were asked for."""
        return self._sampling.logprobs is not None

    def sample(self, logits: Values) -> int:
        """The next token; it counts for penalties from now on.

        Args:
            logits: shape (vocabulary,), float32; changed in place.
        """
        sampling = self._sampling
        if len(self._biased):
            logits[self._biased] += self._biases
        self._penalize(logits)
        if sampling.temperature <= 0:
            token = int(logits.argmax())
        else:
            ids = self._kept(logits)
            weights = _softmax(logits[ids] / np.float32(sampling.temperature))
            token = int(self._random.choice(ids, p=weights / weights.sum()))
        self._seen.append(token)
        return token

    def logprobs(self, logits: Values, token: int) -> Logprobs | None:
        """The token's natural log-probability before any sampler, for those who asked."""
        wanted = self._sampling.logprobs
        if wanted is None:
            return None
        highest = float(logits.max())
        total = np.log(np.exp(logits - highest, dtype=np.float64).sum()) + highest
        ids = np.argsort(-logits, kind="stable")[:wanted]
        top = [(int(i), float(logits[i] - total)) for i in ids]
        return Logprobs(float(logits[token] - total), top)

    def _penalize(self, logits: Values) -> None:
        """llama.cpp's penalties over the last tokens."""
        sampling = self._sampling
        penalties = (
            sampling.repeat_penalty != 1.0,
            sampling.presence_penalty != 0.0,
            sampling.frequency_penalty != 0.0,
        )
        if self._window == 0 or not self._seen or not any(penalties):
            return
        ids, counts = np.unique(
            np.array(self._seen[-self._window :], dtype=np.int64), return_counts=True
        )
        values = logits[ids]
        repeat = np.float32(sampling.repeat_penalty)
        values = np.where(values <= 0, values * repeat, values / repeat)
        values -= counts * np.float32(sampling.frequency_penalty)
        values -= np.float32(sampling.presence_penalty)
        logits[ids] = values

    def _kept(self, logits: Values) -> npt.NDArray[np.int64]:
        """The ids that top_k, typical_p, top_p and min_p leave, in this order."""
        sampling = self._sampling
        count = sampling.top_k if 0 < sampling.top_k < len(logits) else len(logits)
        ids = np.argpartition(-logits, count - 1)[:count]
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        if sampling.typical_p < 1.0:
            chances = _softmax(logits[ids])
            surprise = -np.log(np.maximum(chances, 1e-30))
            apart = np.abs(surprise - (chances * surprise).sum())
            order = np.argsort(apart, kind="stable")
            kept = order[: _enough(chances[order], sampling.typical_p)]
            ids = ids[np.sort(kept)]
        if sampling.top_p < 1.0:
            ids = ids[: _enough(_softmax(logits[ids]), sampling.top_p)]
        if sampling.min_p > 0.0:
            chances = _softmax(logits[ids])
            ids = ids[chances >= sampling.min_p * chances[0]]
        found: npt.NDArray[np.int64] = ids.astype(np.int64)
        return found


def _enough(chances: npt.NDArray[np.float64], share: float) -> int:
    """How many of the first ones reach a share of the probability; at least one."""
    return min(int(np.searchsorted(np.cumsum(chances), share)) + 1, len(chances))


def _softmax(values: Values) -> npt.NDArray[np.float64]:
    grown = np.exp(values.astype(np.float64) - float(values.max()))
    found: npt.NDArray[np.float64] = grown / grown.sum()
    return found
