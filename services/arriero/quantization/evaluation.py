"""What a quantized file costs in quality, and which one to take.

Responsibility: figures per file, the choice among them, and the table that a
person reads. Does not know how logits are computed, artifacts or gRPC.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from arriero.errors import FailedPrecondition
from arriero.gates.golden import Comparison

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Measurement:
    """One file beside the golden logits.

    Attributes:
        name: of the file's artifact.
        digest: of its artifact.
        quant_type: such as `Q4_K_M`.
        size_bytes: of the file.
        bits_per_weight: tensor data only.
        kl_divergence, kl_max: mean and largest KL(golden || file), nats per token.
        top1_agreement: share of positions with the same likeliest token.
        confident_disagreements: see `gates.golden.Comparison`.
        tokens: positions compared.
        seconds: that measuring took.
    """

    name: str
    digest: str
    quant_type: str
    size_bytes: int
    bits_per_weight: float
    kl_divergence: float
    kl_max: float
    top1_agreement: float
    confident_disagreements: int
    tokens: int
    seconds: float

    @classmethod
    def of(
        cls,
        comparison: Comparison,
        *,
        name: str,
        digest: str,
        quant_type: str,
        size_bytes: int,
        bits_per_weight: float,
        seconds: float,
    ) -> Measurement:
        """From a comparison with golden logits."""
        return cls(
            name=name,
            digest=digest,
            quant_type=quant_type,
            size_bytes=size_bytes,
            bits_per_weight=bits_per_weight,
            kl_divergence=comparison.kl_divergence,
            kl_max=comparison.kl_max,
            top1_agreement=comparison.top1_agreement,
            confident_disagreements=comparison.confident_disagreements,
            tokens=comparison.tokens,
            seconds=seconds,
        )


def choose_smallest(measurements: Sequence[Measurement], max_kld: float) -> Measurement:
    """The smallest file whose mean KL divergence is at most `max_kld`.

    Of files of the same size, the better one.

    Raises:
        FailedPrecondition: none is within the limit; the message lists them.
    """
    within = [m for m in measurements if m.kl_divergence <= max_kld]
    if not within:
        figures = ", ".join(
            f"{m.quant_type} {m.kl_divergence:.4g}"
            for m in sorted(measurements, key=lambda m: m.kl_divergence)
        )
        raise FailedPrecondition(
            f"no file stays within a KL divergence of {max_kld:g} nats per token: {figures}; "
            "quantize to a larger type, or raise choose.smallest.max_kld",
            reason="NOTHING_TO_CHOOSE",
        )
    return min(within, key=lambda m: (m.size_bytes, m.kl_divergence))


def report(
    measurements: Sequence[Measurement],
    *,
    golden: str,
    max_kld: float | None,
    chosen: Measurement | None,
) -> dict[str, Any]:
    """The evaluation as `report.json` has it."""
    return {
        "format": FORMAT,
        "report": "evaluation",
        "golden": golden,
        "max_kld": max_kld,
        "chosen": chosen.digest if chosen else None,
        "models": [asdict(m) for m in measurements],
    }


def table(measurements: Sequence[Measurement], chosen: Measurement | None) -> str:
    """The evaluation as text, smallest file first."""
    lines = [
        f"{'type':<10} {'size MB':>9} {'bits/w':>7} {'KL mean':>9} {'KL max':>9} {'top-1':>7}",
    ]
    for m in sorted(measurements, key=lambda m: m.size_bytes):
        mark = "  <- chosen" if chosen is not None and m.digest == chosen.digest else ""
        lines.append(
            f"{m.quant_type:<10} {m.size_bytes / 1e6:>9.1f} {m.bits_per_weight:>7.2f} "
            f"{m.kl_divergence:>9.5f} {m.kl_max:>9.4f} {m.top1_agreement:>7.1%}{mark}"
        )
    return "\n".join(lines) + "\n"
