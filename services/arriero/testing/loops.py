"""Training loops over real models and rows, as the job makes them.

Responsibility: put one together for any method, and run it. Does not know jobs.
"""

from __future__ import annotations

import torch

from arriero.store import Artifact
from arriero.training import adapter, whole
from arriero.training.loop import Loop, Stopped
from arriero.training.numerics import Numerics
from arriero.training.plan import Lora, Plan, Quantization
from arriero.training.rows import Rows
from arriero.weights import Weights

__all__ = ["make_loop", "run_loop"]


def make_loop(
    model: Artifact,
    dataset: Artifact,
    *,
    plan: Plan,
    how: Numerics,
    lora: Lora | None,
    quantization: Quantization | None = None,
) -> Loop:
    """A loop over a method; without `lora` everything is trained."""
    if lora is None:
        base = adapter.load_base(model.path, torch.float32, how.device)
        made = whole.unfreeze(base, Weights.open(model.path))
    else:
        base = adapter.load_base(
            model.path, how.dtype, how.device, quantization, lora.modules_to_save
        )
        made = adapter.attach(base, lora, base="sha256:0", seed=plan.seed)
    if plan.gradient_checkpointing:
        adapter.spare_activations(made)
    return Loop(made, Rows(dataset.path), None, plan, how)


def run_loop(loop: Loop, steps: int | None = None) -> list[float]:
    """Train, to the end or for so many whole steps; the losses."""

    def enough() -> bool:
        return steps is not None and loop.state.step >= steps

    try:
        loop.run(report=lambda _: None, save=lambda: None, should_stop=enough)
    except Stopped:
        assert steps is not None
    return list(loop.state.losses)
