"""Which base should an adapter be folded into that was trained on a quantized one?

Responsibility: read from adapters how their base was quantized, and measure both
bases. Does not fold, and knows no jobs.

The adapter learned beside the quantized weights, so the model that was trained is
base as quantized + adapter. Folded into the full weights it is another model, and
how far away is measured instead of assumed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.gates.golden import compare
from arriero.weights import MergedWeights
from arriero.weights.roundtrip import Packing, packing_of

__all__ = ["BASES", "Closeness", "measure", "packing_for"]

BASES = ("auto", "full", "dequantized")


def packing_for(specs: Sequence[Mapping[str, Any]], wanted: str) -> Packing | None:
    """How the base is to be quantized before adapters are folded in; None: not at all.

    Args:
        specs: of the trainings that made the adapters; empty where nothing is known.
        wanted: `auto`, `full` or `dequantized`.

    Raises:
        InvalidArgument: `dequantized`, but no adapter says how its base was quantized.
        FailedPrecondition: adapters of bases that were quantized in different ways.
    """
    if wanted == "full":
        return None
    found = [packing_of(spec) for spec in specs]
    if not any(found):
        if wanted == "dequantized":
            raise InvalidArgument.field(
                "qlora_base",
                "'dequantized' is asked for, but no adapter says that its base was quantized; "
                "expected adapters of a training with load_in_4bit or load_in_8bit",
            )
        return None
    if len(set(found)) > 1:
        raise FailedPrecondition(
            f"the adapters were trained on bases held in different ways "
            f"({', '.join(item.kind if item else 'full precision' for item in found)}); merge them "
            "with qlora_base: full, or one after the other"
        )
    return found[0]


@dataclass(frozen=True, slots=True)
class Closeness:
    """Mean KL divergence in nats per token from the quantized base with its adapters.

    Attributes:
        full: of the merge into the full weights.
        dequantized: of the merge into what quantization leaves of them.
    """

    full: float
    dequantized: float

    @property
    def closer(self) -> str:
        """`full` or `dequantized`; NaN is not close."""
        return "full" if self.full <= self.dequantized else "dequantized"


def measure(
    full: MergedWeights, dequantized: MergedWeights, sequences: Sequence[list[int]]
) -> Closeness:
    """Run both merges over some tokens and compare them with what was trained.

    Args:
        full: folded into the base as it is stored.
        dequantized: folded into the base as it was trained on.
        sequences: token ids.
    """
    from arriero.weights import oracle

    trained = oracle.golden_of(dequantized, sequences)
    return Closeness(
        full=compare(trained, oracle.logits_of_merge(full, sequences)).kl_divergence,
        dequantized=compare(trained, oracle.logits_of_merge(dequantized, sequences)).kl_divergence,
    )
