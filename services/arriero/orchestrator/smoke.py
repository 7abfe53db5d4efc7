"""Gate `serve.smoke`: does the live replica still say what the trained model said?

Responsibility: from scores to a verdict. Does not know replicas or how they are
asked.

A wrong file, a wrong rope setting, a broken load or a miscompiled kernel shows as
one of three things:
- a KL divergence that the file's quant type, and that of its KV cache, cannot explain
  (`gates.limits`, the same limits as the file's own gate has);
- more positions than chance allows where the trained model clearly preferred another
  token: by more than four times the mean noise of this comparison. Noise has tails:
  healthy replicas have up to `CONFIDENT_RATE` of them. Near-ties of a flat model are
  among them, and cost next to no divergence: so they count above `MIN_KL` alone;
- garbage, where no limit is known (no quant type is, or rope scaling makes another
  function of the model): low top-1 agreement *and* a large divergence. Low agreement
  alone is no proof: where the trained model's own distribution is flat, rounding decides.

Decision 0100 has the counts on healthy and broken replicas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from arriero.gates import GateResult, Gates, Mode
from arriero.gates.limits import LIMITS

GATE = "serve.smoke"
# Most that was seen of healthy replicas, 7 of 256, and how improbable more must be.
CONFIDENT_RATE = 0.03
CHANCE = 1e-3
# Nats per token: what CONFIDENT_RATE of wrong choices, half a nat and more each, cost.
MIN_KL = 0.02
MIN_TOP1 = 0.5
# Nats per token; below it a low agreement is a flat distribution's.
FLAT_KL = 0.1
_EXACT = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Score:
    """One replica against golden logits; KL in nats per token."""

    replica: str
    kl_divergence: float
    top1_agreement: float
    confident_disagreements: int
    tokens: int
    contexts: int
    seconds: float = 0.0

    @property
    def most_confident(self) -> int:
        """The number of confident disagreements that chance still explains."""
        n, rate, left = self.contexts, CONFIDENT_RATE, 1.0
        for k in range(n + 1):  # the binomial distribution's tail from k on
            if left < CHANCE:
                return k - 1
            left -= math.comb(n, k) * rate**k * (1 - rate) ** (n - k)
        return n

    def problem(self, limit: float | None) -> str:
        """What this replica cannot have from quantization alone; empty: it is healthy.

        Args:
            limit: of KL divergence; None where none is known.
        """
        if not self.kl_divergence >= 0:
            return "its logits are not numbers"
        if limit is not None and self.kl_divergence > limit:
            return f"expected a KL of at most {limit:g}, as its types explain"
        if self.confident_disagreements > self.most_confident and self.kl_divergence > MIN_KL:
            return f"expected at most {self.most_confident} confident disagreements"
        if limit is None and self.top1_agreement < MIN_TOP1 and self.kl_divergence > FLAT_KL:
            return f"expected an agreement of at least {MIN_TOP1} where KL is above {FLAT_KL}"
        return ""


def limit_of(quant_type: str, cache_types: Sequence[str] = ()) -> float | None:
    """The KL divergence that weights and KV cache of these types explain, in nats per token.

    A cache costs at most what weights of its type do. None where a type has no limit.
    """
    found = [LIMITS.get(quant_type)]
    found += [LIMITS.get(kind) for kind in cache_types if kind not in _EXACT]
    known = [limit for limit in found if limit is not None]
    return sum(known) if len(known) == len(found) else None


def judge(
    scores: Sequence[Score], modes: Mapping[str, Mode], limit: float | None = None
) -> GateResult:
    """The verdict about an endpoint's replicas: the worst one decides.

    The figure is its KL divergence.

    Args:
        scores: at least one.
        modes: of gates, by name.
        limit: of KL divergence, as `limit_of` has it.
    """
    gates = Gates(modes)
    worst = max(scores, key=lambda s: (s.problem(limit) != "", s.kl_divergence))
    detail = (
        f"{worst.replica}: KL {worst.kl_divergence:.4g} nats per token to the trained model, "
        f"top-1 agreement {worst.top1_agreement:.3f}, {worst.confident_disagreements} confident "
        f"disagreements in {worst.contexts} contexts of {worst.tokens} tokens"
    )
    problem = worst.problem(limit)
    if problem:
        detail += (
            f"; {problem}. Check that file and golden logits are of one model, look at context "
            "and rope settings and at the replica's log, or set gates: {serve.smoke: warn}"
        )
    result = gates.judge(
        GATE,
        not problem,
        figure=worst.kl_divergence if math.isfinite(worst.kl_divergence) else None,
        threshold=limit,
        unit="nats",
        detail=detail,
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
