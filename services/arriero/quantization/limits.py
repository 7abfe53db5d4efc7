"""The gate `quant.kld`: how much a type may cost before something must be wrong.

Responsibility: a limit per quant type, and the verdict. Does not know how KL
divergence is measured.

The limits are several times what each type costs SmolLM2-135M, on which quantizing
weighs more than on any larger model (benchmarks/RESULTS.md): a healthy file stays far
below, a broken one (another model, a wrong rope, lost tensors) lies
above by nats. Which file is good enough is another question: `choose` asks it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from arriero.gates import Gates
from arriero.llama import QUANT_TYPES, Header
from arriero.quantization.evaluation import Measurement

GATE = "quant.kld"

# Nats per token. Types that are missing here (one to two bits, ternary) are for
# models that were trained for them; what they do to others has no healthy bound.
LIMITS: Mapping[str, float] = {
    "F32": 0.01,
    "F16": 0.01,
    "BF16": 0.02,
    "Q8_0": 0.03,
    "MXFP4_MOE": 0.03,
    "Q6_K": 0.1,
    "Q5_K_M": 0.3,
    "Q5_K_S": 0.3,
    "Q5_1": 0.3,
    "Q5_0": 0.3,
    "Q4_K_M": 0.4,
    "Q4_K_S": 0.5,
    "Q4_1": 0.6,
    "Q4_0": 0.8,
    "IQ4_NL": 0.6,
    "IQ4_XS": 0.6,
    "Q3_K_L": 0.8,
    "Q3_K_M": 0.8,
    "Q3_K_S": 1.2,
    "IQ3_M": 2.0,
    "IQ3_S": 2.0,
    "Q2_K": 2.0,
    "IQ3_XS": 2.5,
    "IQ3_XXS": 2.5,
    "Q2_K_S": 2.5,
    "BNB_INT8": 0.15,
    "BNB_NF4": 1.0,
}

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
