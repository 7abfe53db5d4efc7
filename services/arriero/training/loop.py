"""The training loop.

Responsibility: optimizer steps over batches, validation, when to save, and the
state from which all of it goes on as if nothing had happened. Does not know
jobs, artifacts or directories.
"""

from __future__ import annotations

import inspect
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import get_scheduler

from arriero.errors import FailedPrecondition
from arriero.training.adapter import trained_weights
from arriero.training.numerics import Numerics, peak_flops
from arriero.training.plan import Plan
from arriero.training.rows import MASKED, MicroBatch, Rows, batches, collate

# Share of the past in the smoothed loss.
_SMOOTHING = 0.9
# Steps that the speed is taken over.
_SPEED_STEPS = 10
# Seconds between checkpoints when `save_steps` is 0.
SAVE_SECONDS = 60.0
# Of a token: forward, and backward to activations alone (the base's weights have no gradients).
_FLOPS_PER_PARAMETER = 4


class Stopped(Exception):
    """The loop left between two batches; its state is that of the last whole step."""


@dataclass(slots=True)
class State:
    """How far a training is; JSON.

    Attributes:
        step: optimizer steps done.
        tokens: unpadded tokens seen; `trained_tokens` of them counted in the loss.
        losses: mean loss in nats per trained token, one per step that had any.
        smoothed: exponential mean of `losses`, not yet corrected for its start.
        val_losses: [step, mean loss of the held-out rows].
    """

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    losses: list[float] = field(default_factory=list)
    smoothed: float = 0.0
    val_losses: list[list[float]] = field(default_factory=list)

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
    when it is `validating`.
    """

    phase: str
    step: int
    total: int
    loss: float | None
    learning_rate: float
    tokens_per_second: float | None
    tokens: int
    mfu: float | None


class Loop:
    """One training of one model.

    Args:
        model: with LoRA on it; what requires gradients is trained.
        rows: to train on.
        val_rows: held out, if any.
        plan: how.
        numerics: where the model is, and in what it computes.
        pad_id: any id that has an embedding.
        parameters: of the base, for the model FLOPs utilisation.
        clock: seconds, for the speed and for when to save.
    """

    def __init__(
        self,
        model: Any,
        rows: Rows,
        val_rows: Rows | None,
        plan: Plan,
        numerics: Numerics,
        *,
        pad_id: int = 0,
        parameters: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.plan = plan
        self.state = State()
        self._rows, self._val_rows = rows, val_rows
        self._numerics, self._pad_id, self._clock = numerics, pad_id, clock
        self._peak, self._parameters = peak_flops(numerics), parameters
        self._weights = trained_weights(model)
        self._optimizer = torch.optim.AdamW(
            self._weights.values(), lr=plan.learning_rate, weight_decay=plan.weight_decay
        )
        self._scheduler = get_scheduler(
            plan.scheduler,
            self._optimizer,
            num_warmup_steps=plan.warmup_steps,
            num_training_steps=plan.total_steps,
        )
        self._scaler = torch.amp.GradScaler(numerics.device, enabled=numerics.scaled)
        # Prompts need no logits, and those of a large vocabulary are most of the memory.
        forward = inspect.signature(model.get_base_model().forward).parameters
        self._chooses_logits = "logits_to_keep" in forward
        self._rate = float(self._scheduler.get_last_lr()[0])
        self._order: tuple[int, list[npt.NDArray[np.int64]]] = (-1, [])
        self._speed: deque[tuple[float, int]] = deque(maxlen=_SPEED_STEPS)
        torch.manual_seed(plan.seed)
        self._generators = _generators(numerics.device)

    def run(
        self,
        *,
        report: Callable[[Report], None],
        save: Callable[[], None],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> State:
        """Train to the end, from wherever the state is.

        Args:
            report: called after each step.
            save: writes a checkpoint from `tensors` and `state`; called after the
                first step (a full disk shows early), then as the plan says.
            should_stop: asked between micro batches.

        Raises:
            Stopped: `should_stop` said so; `tensors` and `state` may be saved.
            FailedPrecondition: the loss or a gradient is not finite.
        """
        plan, state = self.plan, self.state
        saved_at, saved_step = self._clock(), state.step
        while True:
            self._validate_if_due(report, should_stop)
            if state.step >= plan.total_steps:
                return state
            if state.step != saved_step and self._save_is_due(self._clock() - saved_at):
                save()
                saved_at, saved_step = self._clock(), state.step
            self._step(should_stop)
            report(self.report())

    def _save_is_due(self, seconds: float) -> bool:
        every, step = self.plan.save_steps, self.state.step
        return step == 1 or (step % every == 0 if every else seconds >= SAVE_SECONDS)

    def tensors(self) -> dict[str, Any]:
        """Everything but `state` that a resumed loop needs, as of the last whole step."""
        return {
            "weights": {name: weight.detach() for name, weight in self._weights.items()},
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "generators": self._generators,
        }

    def restore(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Go on from what `tensors` and `state` were.

        Raises:
            FailedPrecondition: they are another model's.
        """
        found = tensors["weights"]
        if {n: w.shape for n, w in found.items()} != {n: w.shape for n, w in self._weights.items()}:
            raise FailedPrecondition(
                f"the checkpoint holds {len(found)} trained tensors that are not the "
                f"{len(self._weights)} of this model; remove it to start anew"
            )
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(found[name])
        self._optimizer.load_state_dict(tensors["optimizer"])
        self._scheduler.load_state_dict(tensors["scheduler"])
        if self._numerics.scaled:
            self._scaler.load_state_dict(tensors["scaler"])
        self._generators = dict(tensors["generators"])
        self._rate = float(self._scheduler.get_last_lr()[0])
        self.state = State(**state)

    def _step(self, should_stop: Callable[[], bool]) -> None:
        """One optimizer step; leaves everything as it was if it is stopped."""
        started = self._clock()
        chosen = self._batch(self.state.step)
        trained = self._rows.trained(chosen)
        _restore_generators(self._generators, self._numerics.device)
        self.model.train()
        total = torch.zeros((), device=self._numerics.device)
        size = self.plan.micro_batch_size
        for start in range(0, len(chosen), size):
            if should_stop():
                self._optimizer.zero_grad(set_to_none=True)
                raise Stopped
            micro = collate(self._rows, chosen[start : start + size], self._pad_id)
            if len(micro.positions):
                # Over the whole step's tokens: the micro batch's size changes nothing.
                loss = self._loss(micro) / trained
                self._scaler.scale(loss).backward()
                total += loss.detach()
        value, self._rate = float(total), float(self._scheduler.get_last_lr()[0])
        if trained:
            self._check(value, "loss")
            self._apply()
            self.state.add(value)
        self._scheduler.step()
        tokens = int(self._rows.lengths[chosen].sum())
        self.state.step += 1
        self.state.tokens += tokens
        self.state.trained_tokens += trained
        self._generators = _generators(self._numerics.device)
        self._speed.append((self._clock() - started, tokens))

    def _apply(self) -> None:
        self._scaler.unscale_(self._optimizer)
        limit = self.plan.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self._weights.values(), limit)
        if not self._numerics.scaled:  # a loss scale is found by trying: it skips such steps
            self._check(float(norm), "gradient")
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)

    def _check(self, value: float, what: str) -> None:
        if math.isfinite(value):
            return
        step = self.state.step + 1
        lower = self.plan.learning_rate / 3
        raise FailedPrecondition(
            f"the {what} is {value} at step {step} of {self.plan.total_steps} (learning rate "
            f"{self._rate:.3g}, {str(self._numerics.dtype).removeprefix('torch.')}); lower "
            f"learning_rate (such as {lower:.1g}), raise warmup_steps, lower max_grad_norm, "
            "or use dtype float32",
            reason="LOSS_NOT_FINITE",
            metadata={"step": str(step), "value": str(value)},
        )

    def _loss(self, micro: MicroBatch) -> torch.Tensor:
        """Sum of -log p over the trained tokens, float32, nats."""
        device = self._numerics.device
        positions = micro.positions.to(device)
        choose = {"logits_to_keep": positions} if self._chooses_logits else {}
        with self._numerics.autocast():
            logits = self.model(
                input_ids=micro.input_ids.to(device), use_cache=False, **choose
            ).logits
        if not self._chooses_logits:
            logits = logits[:, positions]
        return functional.cross_entropy(
            logits.float().flatten(0, 1),
            micro.labels.to(device).flatten(),
            ignore_index=MASKED,
            reduction="sum",
        )

    def _validate_if_due(
        self, report: Callable[[Report], None], should_stop: Callable[[], bool]
    ) -> None:
        state, rows = self.state, self._val_rows
        ends = state.step % self.plan.steps_per_epoch == 0 or state.step == self.plan.total_steps
        done = bool(state.val_losses) and state.val_losses[-1][0] == state.step
        if rows is None or not len(rows) or not state.step or not ends or done:
            return
        self.model.eval()
        order = np.argsort(-rows.lengths, kind="stable")
        size = self.plan.micro_batch_size
        total, trained = 0.0, 0
        for start in range(0, len(order), size):
            if should_stop():
                raise Stopped
            chosen = order[start : start + size]
            micro = collate(rows, chosen, self._pad_id)
            if len(micro.positions):
                with torch.inference_mode():
                    total += float(self._loss(micro))
                trained += rows.trained(chosen)
            report(self.report("validating", start + len(chosen), len(order)))
        if trained:
            state.val_losses.append([state.step, total / trained])

    def _batch(self, step: int) -> npt.NDArray[np.int64]:
        epoch, place = divmod(step, self.plan.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (
                epoch,
                batches(
                    self._rows.lengths,
                    batch_size=self.plan.batch_size,
                    seed=self.plan.seed,
                    epoch=epoch,
                    group_by_length=self.plan.group_by_length,
                ),
            )
        return self._order[1][place]

    def report(self, phase: str = "training", step: int = 0, total: int = 0) -> Report:
        """How far it is; `step` and `total` default to the optimizer's."""
        seconds = sum(taken for taken, _ in self._speed)
        speed = sum(n for _, n in self._speed) / seconds if seconds > 0 else None
        flops = _FLOPS_PER_PARAMETER * self._parameters * (speed or 0.0)
        return Report(
            phase=phase,
            step=step or self.state.step,
            total=total or self.plan.total_steps,
            loss=self.state.smooth_loss,
            learning_rate=self._rate,
            tokens_per_second=speed,
            tokens=self.state.tokens,
            mfu=flops / self._peak if flops and self._peak else None,
        )


def _generators(device: str) -> dict[str, torch.Tensor]:
    """States of the random generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_generators(states: Mapping[str, torch.Tensor], device: str) -> None:
    torch.set_rng_state(states["cpu"])
    if device == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
