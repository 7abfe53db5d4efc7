"""Gate `serve.smoke`: what passes and what does not."""

from __future__ import annotations

import pytest

from arriero.gates import Mode, Verdict
from arriero.orchestrator.smoke import GATE, Score, judge


def score(kl: float, top1: float, confident: int, tokens: int = 256) -> Score:
    return Score("r-0", kl, top1, confident, tokens, seconds=2.0)


@pytest.mark.parametrize(
    ("found", "healthy"),
    [
        (score(0.0005, 0.995, 0), True),  # F16 or Q8_0
        (score(0.05, 0.93, 1), True),  # Q4_K_M of a 135M model
        (score(0.3, 0.72, 4), True),  # Q4_0 of one, as bad as healthy ones get
        (score(0.001, 0.3, 0), True),  # a random model: flat, so top-1 is rounding
        (score(0.3, 0.9, 6), False),  # sure where the trained model was sure of another
        (score(6.0, 0.02, 0), False),  # garbage drowns the noise estimate
        (score(float("nan"), 0.0, 0), False),
        (score(0.0, 1.0, 0, tokens=0), True),
    ],
)
def test_verdicts(found, healthy):
    result = judge([found], {})
    assert result.verdict is (Verdict.PASSED if healthy else Verdict.FAILED)
    assert result.gate == GATE
    assert result.figure == pytest.approx(found.confident_disagreements / max(1, found.tokens))


def test_the_worst_replica_decides_and_is_named():
    good, bad = score(0.05, 0.9, 0), Score("r-1", 5.0, 0.1, 50, 256, 1.0)
    result = judge([good, bad, good], {})
    assert result.verdict is Verdict.FAILED
    assert result.detail.startswith("r-1: KL 5 nats")
    assert "expected at most 2%" in result.detail
    assert result.seconds == 5.0


def test_the_mode_decides_what_a_failure_means():
    assert judge([score(6, 0, 90)], {GATE: Mode.WARN}).verdict is Verdict.WARNED
