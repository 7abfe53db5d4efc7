"""The gate `train.finite`: steps whose loss or gradient is no number that can be.

Responsibility: end a training at such a step, or leave the step out, and say which
one it was. Does not know how losses are computed.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from arriero.errors import FailedPrecondition
from arriero.gates import Gates
from arriero.training.numerics import Numerics
from arriero.training.plan import Plan

if TYPE_CHECKING:
    from arriero.training.state import State

_log = logging.getLogger("arriero.job.train")
# Steps in a row after which no later one will be better: a float16 loss scale, which
# halves at each, is below any use then.
_HOPELESS = 30
# Rows that a message names.
_SHOWN = 8
# No real loss or gradient is larger, and clipped to its norm it would move the weights as if
# it were one: seen on a GPU with DoRA over a 4-bit base.
_LARGEST = 1e12


class Finite:
    """Watches the steps of one training.

    Args:
        plan: for advice.
        numerics: for the message.
        leaves_out: go on without such steps, instead of ending at the first.
    """

    def __init__(self, plan: Plan, numerics: Numerics, *, leaves_out: bool) -> None:
        self._plan, self._leaves_out = plan, leaves_out
        self._dtype = str(numerics.dtype).removeprefix("torch.")
        self._in_a_row = 0

    def allows(
        self, what: str, value: float, state: State, rate: float, rows: npt.NDArray[np.int64]
    ) -> bool:
        """Whether the step after `state` may be taken; where not, `state` records it.

        Args:
            what: `loss` or `gradient`.
            value: of it.
            state: before the step.
            rate: the learning rate.
            rows: of the batch.

        Raises:
            FailedPrecondition: it may not, and the training is to end then.
        """
        if abs(value) <= _LARGEST:  # nor a NaN
            if what == "gradient":
                self._in_a_row = 0
            return True
        step = state.step + 1
        shown = ", ".join(str(row) for row in rows[:_SHOWN])
        more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        said = (
            f"train.finite: the {what} is {value:.3g} at step {step} of {self._plan.total_steps} "
            f"(learning rate {rate:.3g}, {self._dtype}, rows {shown}{more})"
        )
        state.not_finite.append(step)
        self._in_a_row += 1
        if self._leaves_out and self._in_a_row < _HOPELESS:
            _log.warning("%s; the step is left out", said)
            return False
        lower = self._plan.learning_rate / 3
        raise FailedPrecondition(
            f"{said}; lower learning_rate (such as {lower:.1g}), raise warmup_steps, lower "
            "max_grad_norm, use dtype float32, or look at these rows; with gates: "
            "{train.finite: warn} such steps are left out",
            reason="LOSS_NOT_FINITE",
            metadata={"step": str(step), "value": str(value), "rows": shown},
        )

    def scaled(self, state: State, *, skipped: bool) -> None:
        """What the float16 loss scale made of a step: skipping some is how it is found.

        Raises:
            FailedPrecondition: it skips every step, however small it is.
        """
        if not skipped:
            self._in_a_row = 0
            return
        state.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= _HOPELESS:
            raise FailedPrecondition(
                f"train.finite: gradients overflow float16 in {_HOPELESS} steps in a row up to "
                f"step {state.step + 1}, however small the loss scale; use dtype bfloat16 or "
                "float32",
                reason="LOSS_NOT_FINITE",
            )


def judge(gates: Gates, state: State) -> None:
    """The verdict about a training that came to its end."""
    if not gates.wanted("train.finite"):
        return
    left_out = len(state.not_finite)
    said = []
    if left_out:
        first = ", ".join(str(step) for step in state.not_finite[:_SHOWN])
        said.append(f"{left_out} steps had no finite loss or gradient and were left out: {first}")
    if state.skipped:
        said.append(f"the float16 loss scale skipped {state.skipped} steps, as it does")
    gates.judge(
        "train.finite",
        not left_out,
        figure=float(left_out),
        threshold=0.0,
        unit="steps",
        detail="; ".join(said),
    )
