"""AdamW by transformers' names.

Responsibility: make the optimizer that a plan names, or say why this machine cannot.
Does not know what it moves.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch

from arriero.errors import FailedPrecondition
from arriero.training.plan import Plan


def check_optimizer(name: str, device: str) -> None:
    """Refuse an optimizer that cannot run here, before anything is loaded.

    Raises:
        FailedPrecondition: bitsandbytes is missing, or has nowhere to page to.
    """
    if name == "adamw_torch":
        return
    if name == "paged_adamw_8bit" and device != "cuda":
        raise FailedPrecondition(
            "optim paged_adamw_8bit pages between a GPU's memory and the host's, and this "
            "machine has no GPU that torch can use; use adamw_8bit, which holds its state in 8 "
            "bits here too"
        )
    _bits_and_bytes(name)


def make_optimizer(plan: Plan, weights: Iterable[torch.nn.Parameter], device: str) -> Any:
    """An optimizer over `weights`.

    The 8-bit ones keep the moments of tensors below 4,096 values in float32.

    Raises:
        FailedPrecondition: as `check_optimizer`.
    """
    check_optimizer(plan.optimizer, device)
    settings: dict[str, Any] = {
        "lr": plan.learning_rate,
        "betas": plan.betas,
        "eps": plan.epsilon,
        "weight_decay": plan.weight_decay,
    }
    if plan.optimizer == "adamw_torch":
        return torch.optim.AdamW(weights, **settings)
    optim = _bits_and_bytes(plan.optimizer)
    kind = optim.PagedAdamW8bit if plan.optimizer == "paged_adamw_8bit" else optim.AdamW8bit
    return kind(list(weights), **settings)


def _bits_and_bytes(name: str) -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from bitsandbytes import optim
    except Exception as error:  # it loads a library of its own, and fails in its own ways
        raise FailedPrecondition(
            f"optim {name} needs bitsandbytes, which cannot be imported here "
            f"({type(error).__name__}: {error}); install it, or use adamw_torch"
        ) from error
    return optim
