"""Gate `serve.smoke`: does the live replica still say what the trained model said?

Responsibility: from scores to a verdict. Does not know replicas or how they are
asked.

A wrong file, a wrong rope setting, a broken load or a miscompiled kernel shows
as one of two things:
- positions where the trained model was sure (its lead is above what the noise of
  this quantization explains) and the replica says something else. Healthy Q4
  files of a 135M model have none or one in 256; `MAX_CONFIDENT` allows 2%;
- garbage, whose noise is so large that no position counts as sure any more: then
  top-1 agreement is low *and* the divergence is large. Low agreement alone is no
  proof: where the trained model's own distribution is flat, rounding decides.
  Healthy files: agreement 0.7 to 0.95, KL 0.05 to 0.3 nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from arriero.gates import GateResult, Gates, Mode

GATE = "serve.smoke"
MAX_CONFIDENT = 0.02
MIN_TOP1 = 0.5
# Nats per token; below it a low agreement is a flat distribution's.
FLAT_KL = 0.1


@dataclass(frozen=True, slots=True)
class Score:
    """One replica against golden logits; KL in nats per token."""

    replica: str
    kl_divergence: float
    top1_agreement: float
    confident_disagreements: int
    tokens: int
    seconds: float = 0.0

    @property
    def confident_share(self) -> float:
        """Share of positions with a confident disagreement."""
        return self.confident_disagreements / max(1, self.tokens)

    @property
    def healthy(self) -> bool:
        """Whether this replica serves the trained model, as far as quantization lets it."""
        if not self.kl_divergence >= 0:  # NaN: the replica's logits are not numbers
            return False
        garbage = self.top1_agreement < MIN_TOP1 and self.kl_divergence > FLAT_KL
        return self.confident_share <= MAX_CONFIDENT and not garbage


def judge(scores: Sequence[Score], modes: Mapping[str, Mode]) -> GateResult:
    """The verdict about an endpoint's replicas: the worst one decides.

    The figure is its share of confident disagreements.
    """
    gates = Gates(modes)
    worst = max(scores, key=lambda s: (not s.healthy, s.confident_share, s.kl_divergence))
    found = (
        f"{worst.replica}: KL {worst.kl_divergence:.4g} nats per token to the trained model, "
        f"top-1 agreement {worst.top1_agreement:.3f}, {worst.confident_disagreements} confident "
        f"disagreements in {worst.tokens} tokens"
    )
    expected = (
        f"; expected at most {MAX_CONFIDENT:.0%} confident disagreements, and agreement of at "
        f"least {MIN_TOP1} where KL is above {FLAT_KL}. Deploy a larger quant type, check context "
        "and rope settings, or set gates: {serve.smoke: warn}"
    )
    healthy = all(s.healthy for s in scores)
    result = gates.judge(
        GATE,
        healthy,
        figure=worst.confident_share,
        threshold=MAX_CONFIDENT,
        unit="ratio",
        detail=found if healthy else found + expected,
    )
    return GateResult(
        result.gate,
        result.mode,
        result.verdict,
        result.figure,
        result.threshold,
        result.unit,
        result.detail,
        sum(s.seconds for s in scores),
    )
