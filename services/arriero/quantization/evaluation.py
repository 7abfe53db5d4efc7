"""What a quantized file costs in quality, and which one to take.

Responsibility: figures per file, the choice among them, and the table that a
person reads. Does not know how logits are computed, artifacts or gRPC.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from arriero.errors import FailedPrecondition

FORMAT = 2


@dataclass(slots=True)
class Measurement:
    """One file; what was not measured is None.

    Attributes:
        name: of the file's artifact.
        digest: of its artifact.
        quant_type: such as `Q4_K_M`.
        size_bytes: of the file.
        bits_per_weight: tensor data only.
        kl_divergence, kl_max: mean and largest KL(golden || file), nats per token.
        top1_agreement: share of golden's positions with the same likeliest token.
        confident_disagreements: see `gates.golden.Comparison`.
        tokens: golden's positions.
        reference_kl, reference_kl_max, reference_top1: the same against the
            reference file.
        perplexity, perplexity_error: with its standard error.
        scored_tokens: that perplexity and the reference's figures are over.
        prompt_tokens_per_second, generation_tokens_per_second: on this machine.
        seconds: that measuring took.
    """

    name: str
    digest: str
    quant_type: str
    size_bytes: int
    bits_per_weight: float
    kl_divergence: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None
    confident_disagreements: int | None = None
    tokens: int | None = None
    reference_kl: float | None = None
    reference_kl_max: float | None = None
    reference_top1: float | None = None
    perplexity: float | None = None
    perplexity_error: float | None = None
    scored_tokens: int | None = None
    prompt_tokens_per_second: float | None = None
    generation_tokens_per_second: float | None = None
    seconds: float = 0.0

    @property
    def kld(self) -> float:
        """What the file is judged by: KL to the golden logits, else to the reference."""
        found = self.kl_divergence if self.kl_divergence is not None else self.reference_kl
        return math.nan if found is None else found


def choose_smallest(measurements: Sequence[Measurement], max_kld: float) -> Measurement:
    """The smallest file whose mean KL divergence is at most `max_kld`.

    Of files of the same size, the better one.

    Raises:
        FailedPrecondition: none is within the limit; the message lists them.
    """
    within = [m for m in measurements if m.kld <= max_kld]
    if not within:
        figures = ", ".join(
            f"{m.quant_type} {m.kld:.4g}" for m in sorted(measurements, key=lambda m: m.kld)
        )
        raise FailedPrecondition(
            f"no file stays within a KL divergence of {max_kld:g} nats per token: {figures}; "
            "quantize to a larger type, or raise choose.smallest.max_kld",
            reason="NOTHING_TO_CHOOSE",
        )
    return min(within, key=lambda m: (m.size_bytes, m.kld))


def report(
    measurements: Sequence[Measurement],
    *,
    golden: str | None,
    max_kld: float | None,
    chosen: Measurement | None,
    reference: Measurement | None = None,
    windows: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The evaluation as `report.json` has it.

    Args:
        measurements: one per file.
        golden: digest of the golden logits.
        max_kld: the limit of the choice.
        chosen: one of `measurements`.
        reference: the reference file's own figures.
        windows: what perplexity was measured on.
    """
    return {
        "format": FORMAT,
        "report": "evaluation",
        "golden": golden,
        "max_kld": max_kld,
        "chosen": chosen.digest if chosen else None,
        "models": [asdict(m) for m in measurements],
        "reference": asdict(reference) if reference else None,
        "windows": windows,
    }


def metrics(
    measurements: Sequence[Measurement], chosen: Measurement | None, reference: Measurement | None
) -> dict[str, float]:
    """The figures as an artifact's metrics: the chosen file's (else the first one's) by
    their names, and every file's as `<type>.<figure>`; of two files of one type the
    second is `<type>-2`. The reference's are `reference.<figure>`.
    """
    found: dict[str, float] = {}
    seen: dict[str, int] = {}
    for m in measurements:
        count = seen[m.quant_type] = seen.get(m.quant_type, 0) + 1
        label = m.quant_type if count == 1 else f"{m.quant_type}-{count}"
        found |= {f"{label}.{name}": value for name, value in _figures(m).items()}
        if chosen is m:
            found[f"{label}.chosen"] = 1.0
    if reference is not None:
        found |= {f"reference.{name}": value for name, value in _figures(reference).items()}
    return found | _figures(chosen or measurements[0])


def _figures(m: Measurement) -> dict[str, float]:
    names = (
        "kl_divergence", "kl_max", "top1_agreement", "size_bytes", "bits_per_weight",
        "reference_kl", "reference_top1", "perplexity", "perplexity_error",
        "prompt_tokens_per_second", "generation_tokens_per_second",
    )  # fmt: skip
    values = {name: getattr(m, name) for name in names}
    return {name: float(v) for name, v in values.items() if v is not None and math.isfinite(v)}


# Heading, width, and the cell; a column without any figure is left out.
_Cell = Callable[[Measurement], str | None]


def _format(form: str, name: str, scale: float = 1.0) -> _Cell:
    def cell(m: Measurement) -> str | None:
        value = getattr(m, name)
        return None if value is None else format(value / scale, form)

    return cell


def _perplexity(m: Measurement) -> str | None:
    return None if m.perplexity is None else f"{m.perplexity:.3f} ± {m.perplexity_error or 0:.3f}"


_COLUMNS: tuple[tuple[str, int, _Cell], ...] = (
    ("size MB", 9, _format(".1f", "size_bytes", 1e6)),
    ("bits/w", 7, _format(".2f", "bits_per_weight")),
    ("KL mean", 9, _format(".5f", "kl_divergence")),
    ("KL max", 9, _format(".4f", "kl_max")),
    ("top-1", 7, _format(".1%", "top1_agreement")),
    ("KL ref", 9, _format(".5f", "reference_kl")),
    ("top-1 ref", 10, _format(".1%", "reference_top1")),
    ("perplexity", 17, _perplexity),
    ("prompt t/s", 11, _format(".1f", "prompt_tokens_per_second")),
    ("gen t/s", 8, _format(".1f", "generation_tokens_per_second")),
)


def table(
    measurements: Sequence[Measurement],
    chosen: Measurement | None,
    reference: Measurement | None = None,
) -> str:
    """The evaluation as text, smallest file first; the reference last."""
    rows = sorted(measurements, key=lambda m: m.size_bytes)
    if reference is not None:
        rows.append(reference)
    used = [column for column in _COLUMNS if any(column[2](m) is not None for m in rows)]
    lines = [f"{'type':<10} " + " ".join(f"{head:>{width}}" for head, width, _ in used)]
    for m in rows:
        mark = "  <- chosen" if chosen is not None and m.digest == chosen.digest else ""
        if m is reference:
            mark = "  (reference)"
        cells = " ".join(f"{cell(m) or '':>{width}}" for _, width, cell in used)
        lines.append(f"{m.quant_type:<10} {cells}{mark}")
    return "\n".join(lines) + "\n"
