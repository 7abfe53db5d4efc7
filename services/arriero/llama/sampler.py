"""Choosing the next token: llama.cpp's samplers in its own order, or argmax when greedy.

Responsibility: build the chain, obey a grammar, and tell log-probabilities. Does
not know text, stop conditions or how a JSON schema becomes a grammar.
"""

from __future__ import annotations

import ctypes
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.errors import InvalidArgument
from arriero.llama import library
from arriero.llama.context import Context
from arriero.llama.grammar import LARGEST, nesting
from arriero.llama.model import Model

__all__ = ["DRY_BREAKERS", "Logprobs", "Sampler", "Sampling"]

# common.h of llama.cpp: what ends a sequence that DRY compares.
DRY_BREAKERS = ("\n", ":", '"', "*")
_MIROSTAT_M = 100  # what common_sampler_init passes
# llama.cpp's parser of grammars recurses, and a stack that overflows would end the process,
# with everybody's streams.
_GRAMMAR_NESTING = 4096
_MAX_BIASES = 1024
_MAX_LOGPROBS = 20
_LARGEST_BIAS = float(np.finfo(np.float32).max)

_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


@dataclass(frozen=True, slots=True)
class Sampling:
    """llama.cpp's knobs, by its names and with its defaults.

    Attributes:
        temperature: 0 is greedy.
        top_k: 0 keeps all tokens.
        top_p, typical_p: 1 keeps all tokens.
        min_p: 0 keeps all tokens.
        repeat_penalty: 1 penalises nothing.
        presence_penalty, frequency_penalty: 0 penalise nothing.
        repeat_last_n: tokens that the penalties look back on; -1 for the context, 0 for none.
        mirostat: 0, or version 1 or 2, which take the place of the top_* samplers.
        mirostat_tau, mirostat_eta: target surprise in nats, and learning rate.
        xtc_probability, xtc_threshold: leave out the likeliest tokens; 0 never.
        dry_multiplier: penalise sequences that repeat; 0 never.
        dry_base, dry_allowed_length, dry_penalty_last_n, dry_sequence_breakers: how DRY
            does it; a window of -1 is the context.
        seed: None draws one.
        logit_bias: added to the logits of tokens, by id.
        ignore_eos: never end by an end-of-generation token.
        logprobs: log-probabilities to tell of each token's likeliest alternatives; None
            tells none, 0 only the token's own.
        grammar: GBNF, root rule `root`; empty for none.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: Sequence[str] = DRY_BREAKERS
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    ignore_eos: bool = False
    logprobs: int | None = None
    grammar: str = ""

    def check(self, field: str = "sampling") -> None:
        """Refuse values without meaning.

        Raises:
            InvalidArgument: NaN or out of range; the field is named.
        """
        large = 1 << 30
        rules: tuple[tuple[str, float, float], ...] = (
            ("temperature", 0.0, 100.0),
            ("top_k", 0, large),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("typical_p", 0.0, 1.0),
            ("repeat_penalty", 0.01, 100.0),
            ("presence_penalty", -100.0, 100.0),
            ("frequency_penalty", -100.0, 100.0),
            ("repeat_last_n", -1, large),
            ("mirostat", 0, 2),
            ("mirostat_tau", 0.0, 100.0),
            ("mirostat_eta", 0.0, 1.0),
            ("xtc_probability", 0.0, 1.0),
            ("xtc_threshold", 0.0, 1.0),
            ("dry_multiplier", 0.0, 100.0),
            ("dry_base", 1.0, 100.0),
            ("dry_allowed_length", 0, large),
            ("dry_penalty_last_n", -1, large),
            ("logprobs", 0, _MAX_LOGPROBS),
        )
        for name, low, high in rules:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # also refuses NaN
                raise InvalidArgument.field(
                    f"{field}.{name}", f"{value} is out of range; expected {low} to {high}"
                )
        if len(self.logit_bias) > _MAX_BIASES:
            raise InvalidArgument.field(
                f"{field}.logit_bias", f"{len(self.logit_bias)} tokens; at most {_MAX_BIASES}"
            )
        for token, bias in self.logit_bias.items():
            if not (bias == -math.inf or abs(bias) <= _LARGEST_BIAS):
                raise InvalidArgument.field(
                    f"{field}.logit_bias[{token}]", f"{bias}; expected a float32, or -inf"
                )
        if "\0" in self.grammar:  # C would see a shorter text, or none
            raise InvalidArgument.field(f"{field}.grammar", "holds a NUL character")
        if len(self.grammar.encode()) > LARGEST:
            raise InvalidArgument.field(
                f"{field}.grammar", f"longer than {LARGEST} bytes; write a smaller one"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without mirostat's dice."""
        return self.temperature == 0 and not self.mirostat

    @property
    def penalises(self) -> bool:
        """Whether tokens that were there before count."""
        return bool(
            self.repeat_last_n
            and (
                self.repeat_penalty != 1.0
                or self.presence_penalty != 0
                or self.frequency_penalty != 0
            )
        )


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural log-probabilities of one position, before any sampler.

    Attributes:
        chosen: of the token that was taken.
        top: (token, log-probability) of the likeliest, most likely first.
    """

    chosen: float
    top: list[tuple[int, float]]


class Sampler:
    """Samples for one stream. Free it with `close`.

    Args:
        sampling: checked.
        model: whose tokens are sampled.
        prompt: tokens that the penalties see as said already.
        window: tokens of the context: what a window of -1 means.

    Raises:
        InvalidArgument: a token that does not exist, or a grammar that cannot be compiled.
    """

    def __init__(
        self,
        sampling: Sampling,
        model: Model,
        prompt: Sequence[int] = (),
        *,
        window: int = 4096,
    ) -> None:
        self._c = library.initialize()
        self._chain: Any = None
        self._grammar: Any = None
        self._tells = sampling.logprobs
        self._n_vocab = model.n_vocab
        biases = _biases(sampling, model)
        if sampling.grammar:
            self._grammar = self._compile(sampling.grammar, model)
        # A row of candidates is only needed where the chain is asked about all of them twice.
        self._cells = np.empty(model.n_vocab, _TOKEN_DATA) if self._grammar else None
        self._biased = (
            np.fromiter(biases.keys(), np.int64),
            np.fromiter(biases.values(), np.float32),
        )
        looks_back = sampling.penalises or sampling.dry_multiplier
        if sampling.greedy and not (looks_back or self._grammar):
            return  # the largest logit: llama.cpp's chain would copy the whole vocabulary first
        c = self._c
        self._chain = c.llama_sampler_chain_init(c.llama_sampler_chain_default_params())
        self._build(sampling, model, biases, window)
        if looks_back:
            for token in prompt[-window:]:
                c.llama_sampler_accept(self._chain, token)

    def _build(
        self, sampling: Sampling, model: Model, biases: Mapping[int, float], window: int
    ) -> None:
        """llama.cpp's default order (common_params_sampling.samplers)."""
        c = self._c

        def add(sampler: Any) -> None:
            c.llama_sampler_chain_add(self._chain, sampler)

        def back(tokens: int) -> int:
            # No more than there can be: llama.cpp allocates a window whole.
            return window if tokens < 0 else min(tokens, window)

        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        if biases:
            entries = (c.llama_logit_bias * len(biases))(*biases.items())
            add(c.llama_sampler_init_logit_bias(model.n_vocab, len(biases), entries))
        if sampling.mirostat:
            add(c.llama_sampler_init_temp(sampling.temperature))
            tau, eta = sampling.mirostat_tau, sampling.mirostat_eta
            add(
                c.llama_sampler_init_mirostat(model.n_vocab, seed, tau, eta, _MIROSTAT_M)
                if sampling.mirostat == 1
                else c.llama_sampler_init_mirostat_v2(seed, tau, eta)
            )
            return
        if sampling.penalises:
            add(
                c.llama_sampler_init_penalties(
                    model.n_vocab,
                    back(sampling.repeat_last_n),
                    sampling.repeat_penalty,
                    sampling.frequency_penalty,
                    sampling.presence_penalty,
                )
            )
        if sampling.dry_multiplier:
            breakers = [text.encode() for text in sampling.dry_sequence_breakers]
            add(
                c.llama_sampler_init_dry(
                    model.vocabulary,
                    sampling.dry_multiplier,
                    sampling.dry_base,
                    sampling.dry_allowed_length,
                    back(sampling.dry_penalty_last_n),
                    (ctypes.c_char_p * len(breakers))(*breakers),
                    len(breakers),
                )
            )
        if sampling.greedy:
            add(c.llama_sampler_init_greedy())
            return
        add(c.llama_sampler_init_top_k(sampling.top_k))
        if sampling.typical_p < 1:
            add(c.llama_sampler_init_typical(sampling.typical_p, 1))
        add(c.llama_sampler_init_top_p(sampling.top_p, 1))
        add(c.llama_sampler_init_min_p(sampling.min_p, 1))
        if sampling.xtc_probability:
            add(c.llama_sampler_init_xtc(sampling.xtc_probability, sampling.xtc_threshold, 1, seed))
        add(c.llama_sampler_init_temp(sampling.temperature))
        add(c.llama_sampler_init_dist(seed))

    def _compile(self, grammar: str, model: Model) -> Any:
        if (depth := nesting(grammar)) > _GRAMMAR_NESTING:
            raise InvalidArgument.field(
                "sampling.grammar", f"is nested {depth} deep; expected at most {_GRAMMAR_NESTING}"
            )
        library.take_errors()
        found = self._c.llama_sampler_init_grammar(model.vocabulary, grammar.encode(), b"root")
        if not found:
            why = library.take_errors() or "no reason given"
            raise InvalidArgument.field(
                "sampling.grammar", f"cannot be compiled: {why[:300]}; expected GBNF with a root"
            )
        return found

    def sample(self, context: Context, row: int) -> int:
        """The token that follows a row of the last decode; it is remembered for what follows.

        Raises:
            InvalidArgument: the grammar allows no token at all.
        """
        if self._grammar is not None:
            return self._sample_by_grammar(context.logits(row))
        if self._chain is None:
            return self._largest(context.logits(row))
        return int(self._c.llama_sampler_sample(self._chain, context.handle, row))

    def _largest(self, logits: npt.NDArray[np.float32]) -> int:
        tokens, biases = self._biased
        if not len(tokens):
            return int(logits.argmax())
        kept = logits[tokens]
        logits[tokens] += biases
        token = int(logits.argmax())
        # Log-probabilities are told as the model made them.
        logits[tokens] = kept
        return token

    def logprobs(self, context: Context, row: int, token: int) -> Logprobs | None:
        """Log-probabilities of a row of the last decode; None where nobody asked."""
        if self._tells is None:
            return None
        logits = context.logits(row)
        peak = float(logits.max())
        total = peak + math.log(float(np.exp(logits - peak, dtype=np.float64).sum()))
        top: list[tuple[int, float]] = []
        if self._tells:
            best = np.argpartition(logits, -self._tells)[-self._tells :]
            best = best[np.argsort(-logits[best], kind="stable")]
            top = [(int(i), float(logits[i]) - total) for i in best]
        return Logprobs(float(logits[token]) - total, top)

    def _sample_by_grammar(self, logits: npt.NDArray[np.float32]) -> int:
        """As common_sampler_sample does: ask the grammar about the one token first.

        Most tokens that the chain picks are allowed, and asking about all of a
        vocabulary takes milliseconds.
        """
        token = self._picked(self._candidates(logits))
        if not self._allowed(token):
            candidates = self._candidates(logits)
            self._c.llama_sampler_apply(self._grammar, ctypes.byref(candidates))
            token = self._picked(candidates)
            if not self._allowed(token):
                raise InvalidArgument.field(
                    "sampling.grammar",
                    "allows no token after what was made; every path through it must reach an end",
                )
        self._c.llama_sampler_accept(self._grammar, token)
        self._c.llama_sampler_accept(self._chain, token)
        return token

    def _candidates(self, logits: npt.NDArray[np.float32]) -> Any:
        cells = self._cells
        assert cells is not None
        cells["id"] = np.arange(self._n_vocab, dtype=np.int32)
        cells["logit"] = logits
        cells["p"] = 0
        return self._array(cells)

    def _array(self, cells: npt.NDArray[Any]) -> Any:
        c = self._c
        pointer = ctypes.cast(cells.ctypes.data, ctypes.POINTER(c.llama_token_data))
        return c.llama_token_data_array(data=pointer, size=len(cells), selected=-1, sorted=False)

    def _picked(self, candidates: Any) -> int:
        self._c.llama_sampler_apply(self._chain, ctypes.byref(candidates))
        return int(candidates.data[candidates.selected].id)

    def _allowed(self, token: int) -> bool:
        cell = np.array([(token, 1.0, 0.0)], _TOKEN_DATA)
        one = self._array(cell)
        self._c.llama_sampler_apply(self._grammar, ctypes.byref(one))
        return bool(np.isfinite(cell["logit"][0]))

    def close(self) -> None:
        """Free the samplers; safe to call twice."""
        for name in ("_chain", "_grammar"):
            sampler = getattr(self, name, None)
            if sampler is not None:
                self._c.llama_sampler_free(sampler)
                setattr(self, name, None)

    def __del__(self) -> None:
        self.close()


def _biases(sampling: Sampling, model: Model) -> dict[int, float]:
    for token in sampling.logit_bias:
        if not 0 <= token < model.n_vocab:
            raise InvalidArgument.field(
                f"sampling.logit_bias[{token}]",
                f"there is no such token; expected an id of 0 to {model.n_vocab - 1}",
            )
    biases = dict(sampling.logit_bias)
    if sampling.ignore_eos:
        biases |= dict.fromkeys(model.eog, -math.inf)
    return biases
