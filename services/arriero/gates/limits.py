"""How far from the trained model each quant type may bring a model.

Responsibility: a limit of KL divergence per type. Does not know how KL divergence is
measured, nor who judges by it.

The limits are several times what each type costs SmolLM2-135M, on which quantizing
weighs more than on any larger model (benchmarks/RESULTS.md): a healthy file stays far
below, a broken one (another model, a wrong rope, lost tensors) lies above by nats.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["LIMITS"]

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
