"""Golden logits: what the tuned model says, as it will be merged.

Responsibility: fold the adapter into the base in the base's own types, run it in
float32 over the probe, and give the log-probabilities. Holds the model in its
stored type, one layer at a time in float32. Does not know what is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arriero.errors import FailedPrecondition
from arriero.gates.golden import Golden
from arriero.training.adapter import load_base
from arriero.weights import MergedWeights
from arriero.weights.layout import TORCH_NAMES


def golden_logits(
    base: Path,
    adapter: Path | None,
    sequences: Sequence[Sequence[int]],
    *,
    device: str = "cpu",
    tick: Callable[[int], None] = lambda done: None,
) -> Golden:
    """Log-probabilities of base and adapter, merged, after each token of the probe.

    The merged weights are rounded to the type in which the base stores them, as
    the merge will; everything after that is computed in float32.

    Args:
        base: the base model's directory.
        adapter: a healthy PEFT directory; without one it is the model's own word.
        sequences: token ids; each is run alone, from position 0.
        device: to compute on.
        tick: told how many sequences are done.

    Raises:
        FailedPrecondition: the model's logits are not finite.
    """
    model = merged(base, adapter, device)
    rows = []
    with torch.inference_mode():
        for done, ids in enumerate(sequences, start=1):
            batch = torch.tensor([list(ids)], dtype=torch.long, device=device)
            logits = model(input_ids=batch, use_cache=False).logits[0].float()
            if not bool(torch.isfinite(logits).all()):
                raise FailedPrecondition(
                    "the tuned model's logits are not finite once it is merged into "
                    f"{model.config.dtype} weights: its changes are too large; train with a "
                    "lower learning_rate or lora_alpha",
                    reason="LOGITS_NOT_FINITE",
                )
            rows.append(torch.log_softmax(logits, dim=-1).half().cpu().numpy())
            tick(done)
    return Golden(
        tokens=np.array([i for ids in sequences for i in ids], dtype=np.int32),
        lengths=np.array([len(ids) for ids in sequences], dtype=np.int32),
        logprobs=np.concatenate(rows),
    )


def merged(base: Path, adapter: Path | None, device: str = "cpu") -> Any:
    """The merged model, in the types of the base's files, computing in float32."""
    adapters = [] if adapter is None else [adapter]
    weights = MergedWeights.open(base, adapters, [1.0] * len(adapters))
    kinds = {plan.dtype for plan in weights.values()}
    # Mixed types are held in float32, which all of them fit in without loss.
    stored = getattr(torch, TORCH_NAMES[kinds.pop()]) if len(kinds) == 1 else torch.float32
    model = load_base(base, stored, "cpu").eval()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name in weights.touched:
        module, _, leaf = name.rpartition(".")
        # A new parameter: what is tied to the old one keeps that.
        value = torch.nn.Parameter(weights.tensor(name).to(stored), requires_grad=False)
        setattr(model.get_submodule(module), leaf, value)
    if tied and not weights.untied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    for module in model.modules():
        if any(weight.dtype != torch.float32 for weight in module.parameters(recurse=False)):
            _widen(module)
    return model.to(device)


def _widen(module: torch.nn.Module) -> None:
    """Give a module float32 parameters while it runs, and take them away after."""
    narrow: dict[str, Any] = {}

    def before(*_: object) -> None:
        narrow.update(module._parameters)
        for name, weight in narrow.items():
            if weight is not None:
                module._parameters[name] = torch.nn.Parameter(weight.float(), requires_grad=False)

    def after(*_: object) -> None:
        module._parameters.update(narrow)
        narrow.clear()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
