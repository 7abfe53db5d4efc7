"""Gate `serve.smoke`: what passes and what does not."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from arriero.gates import GateResult, Mode, Verdict
from arriero.gates.golden import Golden, compare, log_softmax
from arriero.orchestrator.smoke import GATE, Score, judge, limit_of

Values = npt.NDArray[np.float32]


def score(kl: float, top1: float, confident: int, tokens: int = 256) -> Score:
    return Score("r-0", kl, top1, confident, tokens, tokens, seconds=2.0)


@pytest.mark.parametrize(
    ("found", "quant_type", "healthy"),
    [
        (score(0.0005, 0.995, 0), "F16", True),
        (score(0.0017, 0.98, 6), "Q8_0", True),  # the same near-tie again and again
        (score(0.0017, 0.5, 100), "Q8_0", True),
        (score(0.05, 0.93, 1), "Q4_K_M", True),
        (score(0.3, 0.72, 7), "Q4_0", True),  # as bad as healthy ones of a 135M model get
        (score(0.55, 0.29, 3), "Q2_K", True),  # a flat, random model's
        (score(0.12, 0.64, 6), "Q8_0", False),  # another rope base
        (score(0.35, 0.42, 0), "F16", False),  # without its adapter
        (score(0.39, 0.61, 25), "Q4_0", False),  # a tenth of the rows wrong
        (score(3.5, 0.01, 0), "Q2_K", False),  # another model
        (score(float("nan"), 0.0, 0), "Q8_0", False),
        (score(float("nan"), 0.0, 0), "", False),
        # No limit is known.
        (score(0.001, 0.3, 0), "", True),  # flat, so top-1 is rounding
        (score(0.3, 0.72, 7), "", True),
        (score(0.3, 0.9, 20), "", False),  # sure where the trained model was sure of another
        (score(6.0, 0.02, 0), "", False),  # garbage drowns the noise estimate
        (score(0.0, 1.0, 0, tokens=0), "", True),
    ],
)
def test_verdicts(found, quant_type, healthy):
    result = judge([found], {}, limit_of(quant_type))
    assert result.verdict is (Verdict.PASSED if healthy else Verdict.FAILED)
    assert result.gate == GATE
    assert result.figure in (found.kl_divergence, None)


# Logits of models, and of replicas: what the gate makes of real comparisons.


def golden_of(logits: Values) -> Golden:
    """Sequences of one token each, equal where their logits are."""
    _, tokens = np.unique(logits, axis=0, return_inverse=True)
    return Golden(
        tokens.ravel().astype(np.int32),
        np.ones(len(logits), np.int32),
        log_softmax(logits).astype(np.float16),
    )


def judged(logits: Values, replica: Values, quant_type: str) -> GateResult:
    found = compare(golden_of(logits), replica)
    said = Score(
        "r-0",
        found.kl_divergence,
        found.top1_agreement,
        found.confident_disagreements,
        found.tokens,
        found.contexts,
    )
    return judge([said], {}, limit_of(quant_type))


def model(seed: int, scale: float, contexts: int = 256) -> Values:
    """Logits of 256 positions, of which only so many differ; a small scale is a flat model."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((contexts, 384)).astype(np.float32) * np.float32(scale)
    return np.tile(rows, (256 // contexts, 1))


def quantized(logits: Values, seed: int, noise: float) -> Values:
    """With noise of heavy tails, the same wherever the context is the same."""
    random = np.random.default_rng(seed + 1000)
    _, first, back = np.unique(logits, axis=0, return_index=True, return_inverse=True)
    spread = np.exp(0.3 * random.standard_normal((len(first), 1)))
    drawn = random.standard_normal((len(first), logits.shape[1])) * spread * noise
    return (logits + drawn[back.ravel()]).astype(np.float32)


@pytest.mark.parametrize("scale", [0.3, 2.0])
@pytest.mark.parametrize("contexts", [256, 16, 4])
@pytest.mark.parametrize(("quant_type", "noise"), [("Q8_0", 0.03), ("Q4_0", 0.35), ("Q2_K", 0.8)])
def test_healthy_replicas_pass_however_flat_or_repetitive(
    scale: float, contexts: int, quant_type: str, noise: float
) -> None:
    for seed in range(4):
        logits = model(seed, scale, contexts)
        replica = quantized(logits, seed, noise * scale / 2)
        assert judged(logits, replica, quant_type).verdict is Verdict.PASSED


@pytest.mark.parametrize(("quant_type", "noise"), [("Q8_0", 0.03), ("Q4_0", 0.35)])
def test_broken_replicas_do_not(quant_type: str, noise: float) -> None:
    for seed in range(4):
        logits = model(seed, 2.0)
        healthy = quantized(logits, seed, noise)
        tenth = np.random.default_rng(seed).permutation(256)[:26]
        some = healthy.copy()
        some[tenth] = np.roll(healthy, 7, axis=0)[tenth]
        broken = {
            "other model": quantized(model(seed + 99, 2.0), seed, noise),
            "a tenth of the rows": some,
            "shifted by a token": np.roll(healthy, 1, axis=0),
            "other tokens": np.roll(healthy, 1, axis=1),
            "garbage": healthy * 30,
        }
        for name, replica in broken.items():
            assert judged(logits, replica, quant_type).verdict is Verdict.FAILED, (name, seed)


def test_a_cache_may_cost_what_weights_of_its_type_do():
    assert limit_of("Q8_0", ("F16", "BF16")) == limit_of("Q8_0")
    assert limit_of("Q8_0", ("Q8_0", "Q4_0")) == pytest.approx(0.03 + 0.03 + 0.8)
    assert limit_of("IQ1_S", ("Q8_0", "F16")) is None
    assert limit_of("") is None


def test_the_worst_replica_decides_and_is_named():
    good, bad = score(0.05, 0.9, 0), Score("r-1", 5.0, 0.1, 50, 256, 256, 1.0)
    result = judge([good, bad, good], {}, 0.4)
    assert result.verdict is Verdict.FAILED
    assert result.detail.startswith("r-1: KL 5 nats")
    assert "expected a KL of at most 0.4" in result.detail
    assert (result.threshold, result.seconds) == (0.4, 5.0)
    assert "at most 17 confident" in judge([good, bad], {}).detail


def test_the_mode_decides_what_a_failure_means():
    assert judge([score(6, 0, 90)], {GATE: Mode.WARN}).verdict is Verdict.WARNED
