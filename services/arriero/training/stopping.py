"""Which validation was the best, and whether to go on.

Responsibility: pure functions of the held-out losses. Does not know the loop.
"""

from __future__ import annotations

from collections.abc import Sequence


def best(val_losses: Sequence[Sequence[float]]) -> tuple[int, float] | None:
    """(step, loss) of the lowest held-out loss, the earliest of equal ones; None without any.

    Args:
        val_losses: [step, loss] of each validation, in order.
    """
    finite = [(loss, int(step)) for step, loss in val_losses if loss == loss]
    if not finite:
        return None
    loss, step = min(finite)
    return step, loss


def exhausted(val_losses: Sequence[Sequence[float]], patience: int, threshold: float = 0.0) -> bool:
    """Whether so many validations in a row brought no improvement (transformers' rule).

    Args:
        val_losses: [step, loss] of each validation, in order.
        patience: validations; 0 means never.
        threshold: nats that count as an improvement when they are exceeded.
    """
    lowest, waited = float("inf"), 0
    for _, loss in val_losses:
        if loss < lowest - threshold:
            lowest, waited = loss, 0
        else:
            waited += 1
    return 0 < patience <= waited
