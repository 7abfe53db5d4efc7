"""The gate `quant.kld`: did a type cost more than it can before something must be wrong?

Responsibility: the type of a file, and the verdict by its limit. Does not know how KL
divergence is measured. Which file is good enough is another question: `choose` asks it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from arriero.gates import Gates
from arriero.gates.limits import LIMITS
from arriero.llama import QUANT_TYPES, Header
from arriero.quantization.evaluation import Measurement

GATE = "quant.kld"

# `general.file_type` of a GGUF file is its ftype; files that split it say so in bit 10.
_FILE_TYPE = "general.file_type"
_GUESSED = 1024


def type_of(header: Header, label: str | None) -> str:
    """A file's quant type: as its artifact says, else as its metadata does, else `gguf`."""
    if label:
        return label
    found = header.metadata.get(_FILE_TYPE)
    if isinstance(found, int):
        for kind in QUANT_TYPES.values():
            if kind.ftype == found & ~_GUESSED:
                return kind.name
    return "gguf"


def judge(gates: Gates, measurements: Sequence[Measurement]) -> None:
    """Judge the files that are handed on, by the one that is furthest over its limit."""
    if not gates.wanted(GATE):
        return
    judged = [m for m in measurements if m.quant_type in LIMITS and not math.isnan(m.kld)]
    unknown = sorted({m.quant_type for m in measurements if m not in judged})
    if not judged:
        gates.skip(GATE, f"no limit for {', '.join(unknown)}, or no KL divergence was measured")
        return
    worst = max(judged, key=lambda m: m.kld / LIMITS[m.quant_type])
    limit = LIMITS[worst.quant_type]
    over = [m for m in judged if m.kld > limit_of(m)]
    detail = f"{len(judged)} files within their types' limits"
    if unknown:
        detail += f"; no limit for {', '.join(unknown)}"
    if over:
        named = ", ".join(f"{m.quant_type} {m.kld:.3g} (limit {limit_of(m):g})" for m in over)
        detail = (
            f"KL divergence to the model in nats per token: {named}; no quantization of this "
            "type alone costs that much: check that golden logits and files are of one model, "
            "then quantize again or take a larger type"
        )
    gates.judge(GATE, not over, figure=worst.kld, threshold=limit, unit="nats", detail=detail)


def limit_of(measurement: Measurement) -> float:
    """The limit of a file's type, in nats per token."""
    return LIMITS[measurement.quant_type]
