"""How far a training is, and what is said of it.

Responsibility: the state that a checkpoint keeps as JSON, and the report after a
step. Pure data; does not know torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

# Share of the past in the smoothed loss.
_SMOOTHING = 0.9


@dataclass(slots=True)
class State:
    """How far a training is; JSON.

    Attributes:
        step: optimizer steps done.
        tokens: unpadded tokens seen; `trained_tokens` of them counted in the loss.
        losses: mean loss in nats per trained token, one per step that had any.
        smoothed: exponential mean of `losses`, not yet corrected for its start.
        val_losses: [step, mean loss of the held-out rows].
        base_loss: of the held-out rows before the first step.
        micro_batch_size: what memory has left of the plan's; 0 means all of it.
        skipped: steps that the fp16 loss scale left out, as it does.
        not_finite: steps left out because the loss or a gradient was not finite.
    """

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    losses: list[float] = field(default_factory=list)
    smoothed: float = 0.0
    val_losses: list[list[float]] = field(default_factory=list)
    base_loss: float | None = None
    micro_batch_size: int = 0
    skipped: int = 0
    not_finite: list[int] = field(default_factory=list)

    def add(self, loss: float) -> None:
        """Take in the loss of a step."""
        self.losses.append(loss)
        self.smoothed = _SMOOTHING * self.smoothed + (1 - _SMOOTHING) * loss

    @property
    def smooth_loss(self) -> float | None:
        """Exponential mean of the losses (Kingma & Ba 2014's bias correction)."""
        if not self.losses:
            return None
        return self.smoothed / (1 - _SMOOTHING ** len(self.losses))

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Report:
    """What can be said after a step, or in the middle of a validation.

    `step` and `total` count optimizer steps when `phase` is `training`, rows
    when it is `validating`. `loss` is smoothed, `raw_loss` the last step's; the norm
    is of the gradient before it was clipped.
    """

    phase: str
    step: int
    total: int
    loss: float | None
    learning_rate: float
    tokens_per_second: float | None
    tokens: int
    mfu: float | None
    raw_loss: float | None = None
    grad_norm: float | None = None
    micro_batch_size: int = 0
