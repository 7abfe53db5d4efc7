"""Choosing the next token: llama.cpp's sampler chain, or argmax when greedy.

Responsibility: build the chain in llama.cpp's own order and sample a row of the
last decode with it. Does not know text or stop conditions.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from arriero.errors import InvalidArgument
from arriero.llama import library
from arriero.llama.context import Context

# llama.cpp's `penalty_last_n` default: how far back repetition is looked for.
_WINDOW = 64


@dataclass(frozen=True, slots=True)
class Sampling:
    """llama.cpp's knobs, by its names and with its defaults.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 keeps all tokens.
        top_p: 1 keeps all tokens.
        min_p: 0 keeps all tokens.
        repeat_penalty: 1 penalises nothing; over the last 64 tokens.
        seed: None draws one.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None

    def check(self, field: str = "sampling") -> None:
        """Refuse values without meaning.

        Raises:
            InvalidArgument: NaN or out of range; the field is named.
        """
        rules = (
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_k", self.top_k, 0, 1 << 30),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repeat_penalty", self.repeat_penalty, 0.01, 100.0),
        )
        for name, value, low, high in rules:
            if not low <= value <= high:  # also refuses NaN
                raise InvalidArgument.field(
                    f"{field}.{name}", f"{value} is out of range; expected {low} to {high}"
                )


class Sampler:
    """Samples for one stream. Free it with `close`."""

    def __init__(self, sampling: Sampling) -> None:
        self._c = library.initialize()
        self._chain: Any = None
        self._greedy = sampling.temperature == 0
        if self._greedy and sampling.repeat_penalty == 1.0:
            return
        c = self._c
        self._chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        add = c.llama_sampler_chain_add
        if sampling.repeat_penalty != 1.0:
            penalties = c.llama_sampler_init_penalties(_WINDOW, sampling.repeat_penalty, 0.0, 0.0)
            add(self._chain, penalties)
        if self._greedy:
            add(self._chain, c.llama_sampler_init_greedy())
            return
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        add(self._chain, c.llama_sampler_init_top_k(sampling.top_k))
        add(self._chain, c.llama_sampler_init_top_p(sampling.top_p, 1))
        add(self._chain, c.llama_sampler_init_min_p(sampling.min_p, 1))
        add(self._chain, c.llama_sampler_init_temp(sampling.temperature))
        add(self._chain, c.llama_sampler_init_dist(seed))

    def sample(self, context: Context, row: int) -> int:
        """The token that follows a row of the last decode; it is remembered for penalties."""
        if self._chain is None:
            return int(context.logits(row).argmax())
        return int(self._c.llama_sampler_sample(self._chain, context.handle, row))

    def close(self) -> None:
        """Free the chain; safe to call twice."""
        if self._chain is not None:
            self._c.llama_sampler_free(self._chain)
            self._chain = None

    def __del__(self) -> None:
        self.close()
