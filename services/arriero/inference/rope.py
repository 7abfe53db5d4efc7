"""Rotary positions of a context that is longer than the trained one.

Responsibility: from a deployment's words and what the model's file says, the
figures that llama.cpp takes. Does not know what evaluates them.

Sources: linear, Chen et al. 2023 (positions divided by the factor); YaRN, Peng et
al. 2023; NTK-aware, base' = base * alpha^(d / (d - 2)) with d rotated dimensions,
and alpha from the context as transformers' dynamic NTK has it,
alpha = factor * context / trained - (factor - 1): with a factor of 2 it is the
2 * context / trained - 1 that Chinese-LLaMA serves with.
"""

from __future__ import annotations

import logging

from arriero.llama import Model, Rope
from arriero.replica import RopeSettings

_log = logging.getLogger(__name__)

# NTK's factor where neither the deployment nor the model names one.
_NTK_FACTOR = 2.0
# What conversion stores of scalings that llama.cpp has no words for.
_TYPE_KEY, _FACTOR_KEY = "arriero.rope.type", "arriero.rope.factor"


def scaled(settings: RopeSettings, model: Model, context: int) -> Rope | None:
    """How to turn positions in a context of so many tokens; None: as the model says.

    Args:
        settings: checked.
        model: with the metadata that training and conversion stored.
        context: tokens.
    """
    trained = model.n_ctx_train or context
    longer = max(context / trained, 1.0)
    kind = settings.type
    dynamic = model.metadata.get(_TYPE_KEY) == "dynamic"
    if not kind and dynamic and longer > 1:
        kind = "ntk"
    if not kind:
        if longer > 1:
            _log.warning(
                "a context of %d tokens, and the model was trained with %d: answers get worse "
                "beyond those; set rope in the deploy stage",
                context,
                trained,
            )
        return None
    if kind == "none":
        return Rope(scaling="none")
    if kind == "ntk":
        stored = float(model.metadata[_FACTOR_KEY]) if dynamic else _NTK_FACTOR
        factor = settings.factor or stored
        alpha = settings.alpha or max(factor * longer - (factor - 1), 1.0)
        return Rope(freq_base=ntk_base(model.rope_freq_base, model.rope_dimensions, alpha))
    own_kind, own = model.rope_scaling
    # The context that the file names is what its own scaling reaches already.
    factor = settings.factor or longer * (own if own_kind == kind else 1.0)
    if kind == "linear":
        return Rope(scaling="linear", freq_scale=1 / factor)
    original = settings.yarn_original_context or (None if own_kind == "yarn" else trained)
    return Rope(
        scaling="yarn",
        freq_scale=1 / factor,
        original_context=original,
        ext_factor=_given(settings.yarn_ext_factor),
        attn_factor=_given(settings.yarn_attn_factor),
        beta_fast=_given(settings.yarn_beta_fast),
        beta_slow=_given(settings.yarn_beta_slow),
    )


def ntk_base(base: float, dimensions: int, alpha: float) -> float:
    """The base frequency that stretches the slowest dimension by `alpha`."""
    return base * float(alpha ** (dimensions / max(dimensions - 2, 1)))


def _given(value: float) -> float | None:
    return None if value < 0 else value
