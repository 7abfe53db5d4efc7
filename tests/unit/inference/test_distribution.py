"""Sampling with numpy: the words mean what llama.cpp's samplers do."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from arriero.errors import InvalidArgument
from arriero.inference.distribution import TokenSampler
from arriero.llama.sampler import Sampling

# Probabilities 0.5, 0.25, 0.15, 0.07, 0.03 of tokens 3, 0, 4, 1, 2.
CHANCES = np.array([0.25, 0.07, 0.03, 0.5, 0.15])
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def drawn(prompt: tuple[int, ...] = (), count: int = 400, **sampling: Any) -> Counter[int]:
    options = Sampling(**{**OFF, **sampling})
    found: Counter[int] = Counter()
    for seed in range(count):
        single = Sampling(**{**options.__dict__}) if hasattr(options, "__dict__") else options
        sampler = make(single, prompt, seed)
        found[sampler.sample(np.log(CHANCES).astype(np.float32))] += 1
    return found


def make(sampling: Sampling, prompt: tuple[int, ...] = (), seed: int = 0) -> TokenSampler:
    from dataclasses import replace

    return TokenSampler(replace(sampling, seed=seed), prompt, eog=frozenset({2}), size=5, window=16)


def test_without_cuts_tokens_come_as_often_as_they_are_likely() -> None:
    found = drawn(count=2000)
    for token, chance in enumerate(CHANCES):
        assert found[token] / 2000 == pytest.approx(chance, abs=0.04)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        ({"top_k": 2}, {3, 0}),
        ({"top_p": 0.7}, {3, 0}),
        ({"min_p": 0.2}, {3, 0, 4}),
        ({"typical_p": 0.2}, {0}),  # nearest to the mean surprise
        ({"ignore_eos": True}, {0, 1, 3, 4}),
        ({"logit_bias": {3: -np.inf}, "top_k": 1}, {0}),
        ({"temperature": 0.0}, {3}),
        ({"temperature": 0.05}, {3}),
    ],
)
def test_cuts_leave_what_llama_cpp_leaves(sampling: dict[str, Any], kept: set[int]) -> None:
    assert set(drawn(**sampling)) == kept


def test_penalties_look_back_on_prompt_and_answer() -> None:
    greedy = {"temperature": 0.0, "frequency_penalty": 0.5}
    assert set(drawn((3, 3), count=1, **greedy)) == {0}
    assert set(drawn((3, 3, 1), count=1, repeat_last_n=1, **greedy)) == {3}
    # A negative logit is multiplied, a positive one divided.
    assert set(drawn((3,), count=1, temperature=0.0, repeat_penalty=4.0)) == {0}
    sampler = make(Sampling(**{**OFF, "temperature": 0.0, "presence_penalty": 2.0}))
    logits = np.log(CHANCES).astype(np.float32)
    assert [sampler.sample(logits.copy()) for _ in range(3)] == [3, 0, 4]


def test_log_probabilities_are_those_before_any_sampler() -> None:
    sampler = make(Sampling(**{**OFF, "logprobs": 2, "top_k": 1}))
    found = sampler.logprobs(np.log(CHANCES).astype(np.float32) + 7, 4)
    assert found is not None
    assert found.chosen == pytest.approx(np.log(0.15), abs=1e-5)
    assert [token for token, _ in found.top] == [3, 0]
    assert make(Sampling(**OFF)).logprobs(np.zeros(5, np.float32), 0) is None


@pytest.mark.parametrize("name", ["mirostat", "xtc_probability", "dry_multiplier"])
def test_samplers_that_are_llama_cpps_alone_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument, match="transformers backend"):
        make(Sampling(**{name: 1}))
