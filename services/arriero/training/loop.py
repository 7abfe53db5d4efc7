"""The training loop.

Responsibility: optimizer steps over batches, validation, when to save, and the
state from which all of it goes on as if nothing had happened. Does not know
jobs, artifacts or directories.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from transformers import get_scheduler

from arriero.errors import FailedPrecondition
from arriero.training import allocator, fused, stopping
from arriero.training.adapter import trained_weights
from arriero.training.finite import Finite
from arriero.training.forward import Forward
from arriero.training.lanes import Lanes
from arriero.training.numerics import Numerics, peak_flops
from arriero.training.optimizers import make_optimizer
from arriero.training.plan import Plan
from arriero.training.ranks import ALONE, Ranks
from arriero.training.rows import MicroBatch, Rows, batches, collate
from arriero.training.state import Report, State

# Steps that the speed is taken over.
_SPEED_STEPS = 10
# Seconds between checkpoints when `save_steps` is 0.
SAVE_SECONDS = 60.0
# Of a token: forward, and backward to activations alone (the base's weights have no
# gradients); and to the weights where they are trained.
_FLOPS_PER_PARAMETER, _FLOPS_PER_TRAINED = 4, 2


_log = logging.getLogger("arriero.job.train")
T = TypeVar("T")


class Stopped(Exception):
    """The loop left between two batches; its state is that of the last whole step."""


class Loop:
    """One training of one model.

    Args:
        model: what of it requires gradients is trained.
        rows: to train on.
        val_rows: held out, if any.
        plan: how.
        numerics: where the model is, and in what it computes.
        parameters: of the base, for the model FLOPs utilisation.
        measures_base: take the held-out loss before the first step too.
        leaves_out: go on without the steps whose loss is not finite, instead of ending.
        ranks: the processes that train together; each batch is dealt among them.
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
        parameters: int = 0,
        measures_base: bool = False,
        leaves_out: bool = False,
        ranks: Ranks = ALONE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.plan = plan
        self.state = State()
        self._rows, self._val_rows = rows, val_rows
        self._numerics, self._clock = numerics, clock
        self._measures_base, self._ranks = measures_base, ranks
        self._finite = Finite(plan, numerics, leaves_out=leaves_out)
        self._weights = trained_weights(model)
        self._peak = peak_flops(numerics)
        trained = sum(weight.numel() for weight in self._weights.values())
        self._flops = _FLOPS_PER_PARAMETER * parameters + _FLOPS_PER_TRAINED * trained
        self._optimizer = make_optimizer(plan, self._weights.values(), numerics.device)
        self._grad_norm: float | None = None
        self._scheduler = get_scheduler(
            plan.scheduler,
            self._optimizer,
            num_warmup_steps=plan.warmup_steps,
            num_training_steps=plan.total_steps,
        )
        self._scaler = torch.amp.GradScaler(numerics.device, enabled=numerics.scaled)
        self._forward = Forward(model, numerics, plan.neftune_alpha)
        self._shards = plan.fsdp and ranks.world > 1
        if self._shards:
            # Where samples run one by one, ranks would gather weights at different times.
            layers = self._forward.layers() if self._forward.packs else []
            ranks.shard(self._forward, layers, numerics.device)
        self._parameters = sum(weight.numel() for weight in model.parameters())
        self._lanes = Lanes(self._lane_count(trained))
        self._generators = [torch.Generator() for _ in range(self._lanes.count)]
        # By which path it goes, for whoever asks later.
        self.path = f"{self._forward.path}, {self._lanes.count} at a time"
        _log.info("forward and backward: %s", self.path)
        self._rate = float(self._scheduler.get_last_lr()[0])
        self._order: tuple[int, list[npt.NDArray[np.int64]]] = (-1, [])
        self._speed: deque[tuple[float, int]] = deque(maxlen=_SPEED_STEPS)

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
            save: writes a checkpoint from `tensors` and `state`; called on every rank,
                after the first step (a full disk shows early), then as the plan says, and
                at each lowest held-out loss where the plan hands that on.
            should_stop: asked between micro batches.

        Raises:
            Stopped: `should_stop` said so; `tensors` and `state` may be saved.
            FailedPrecondition: the loss or a gradient is not finite, or memory does
                not hold one row.
        """
        plan, state = self.plan, self.state
        saved_at, saved_step = self._clock(), state.step
        while True:
            found_best = self._validate_if_due(report, should_stop)
            if found_best and plan.load_best:
                save()
                saved_at, saved_step = self._clock(), state.step
            if state.step >= plan.total_steps or self._is_enough():
                return state
            due = state.step != saved_step and self._save_is_due(self._clock() - saved_at)
            if self._ranks.any(due):
                save()
                saved_at, saved_step = self._clock(), state.step
            self._step(should_stop)
            report(self.report())

    def _is_enough(self) -> bool:
        plan, losses = self.plan, self.state.val_losses
        if not stopping.exhausted(losses, plan.patience, plan.threshold):
            return False
        found = stopping.best(losses)
        _log.info(
            "stopped early at step %d of %d: %d validations without an improvement on %s",
            self.state.step,
            plan.total_steps,
            plan.patience,
            f"{found[1]:.4f} nats at step {found[0]}" if found else "no finite loss",
        )
        return True

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
        }

    def restore(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Go on from what `tensors` and `state` were.

        Raises:
            FailedPrecondition: they are another model's.
        """
        self.load_weights(tensors)
        self._optimizer.load_state_dict(tensors["optimizer"])
        self._scheduler.load_state_dict(tensors["scheduler"])
        if self._numerics.scaled:
            self._scaler.load_state_dict(tensors["scaler"])
        self._rate = float(self._scheduler.get_last_lr()[0])
        self.state = State(**state)

    def load_weights(self, tensors: Mapping[str, Any]) -> None:
        """Take the trained weights of `tensors` alone.

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

    @property
    def device(self) -> str:
        """Where it computes: `cpu` or `cuda`."""
        return self._numerics.device

    @property
    def dtype(self) -> str:
        """In what it computes: `float32`, `bfloat16`, `float16`."""
        return str(self._numerics.dtype).removeprefix("torch.")

    def probe(self) -> float | None:
        """Loss of the first row of the next step, as the step would compute it.

        Dropout included, so that equal losses before and after a resume prove weights,
        random state and data position at once. None when that row trains nothing.
        """
        row = self._batch(self.state.step)[:1]
        micro = collate(self._rows, row)
        if not len(micro.positions):
            return None  # on every rank
        self._seed()
        self._forward.train()
        return self._judged(micro) / self._rows.trained(row)

    def _step(self, should_stop: Callable[[], bool]) -> None:
        """One optimizer step; leaves everything as it was if it is stopped."""
        started = self._clock()
        chosen = self._batch(self.state.step)
        value = self._with_memory(lambda: self._gradients(chosen, should_stop))
        self._finish_step(started, chosen, value)

    def _with_memory(self, work: Callable[[], T]) -> T:
        """Do work, again with smaller micro batches where memory runs out."""
        while True:
            try:
                return work()
            except Exception as error:
                # Ranks shrink together or not at all: the next attempt does.
                if self._ranks.world > 1 or not allocator.ran_out(error):
                    raise
            # Not inside `except`: the error holds on to the tensors of its frames.
            self.shrink("out of memory")

    def _gradients(self, chosen: npt.NDArray[np.int64], should_stop: Callable[[], bool]) -> float:
        """Add up the gradients of a step's rows; their mean loss."""
        trained = self._rows.trained(chosen)
        self._seed()
        self._forward.train()
        total = torch.zeros((), device=self._numerics.device)
        for parts in self._micro_batches(self._rows, chosen):
            if self._ranks.any(should_stop()):
                self._optimizer.zero_grad(set_to_none=True)
                raise Stopped
            if parts and trained:
                # Over the whole step's tokens: neither the micro batch's size nor the
                # number of ranks or lanes changes anything.
                total += self._backward(parts, 1 / trained)
        if trained:
            self._ranks.add_gradients(self._weights.values())
        return self._ranks.total([float(total)])[0]

    def _backward(self, parts: list[MicroBatch], share: float) -> torch.Tensor:
        """Add the gradients of a micro batch to those that are there; its loss."""
        if len(parts) == 1:
            loss = self._forward(parts[0]) * share
            self._scaler.scale(loss).backward()
            return loss.detach()
        weights = list(self._weights.values())

        def lane(
            number: int, micro: MicroBatch
        ) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
            with fused.drawing(self._generators[number]):
                loss = self._forward(micro) * share
            found = torch.autograd.grad(self._scaler.scale(loss), weights, allow_unused=True)
            return loss.detach(), found

        total = torch.zeros(())
        # One after the other, so that the sums are the same each time.
        for value, gradients in self._lanes.run(lane, parts):
            total += value
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
        return total

    def _micro_batches(
        self, rows: Rows, chosen: npt.NDArray[np.int64]
    ) -> Iterator[list[MicroBatch]]:
        """This rank's micro batches, in a part for each lane; as many on each rank.

        Empty where nothing is to do.
        """
        own, size = self._ranks.share(chosen), self.micro_batch_size
        for number in range(self._ranks.parts(len(chosen), size)):
            part = own[number * size : (number + 1) * size]
            # Sharded weights are gathered from all ranks, whether or not they have rows.
            pieces = [collate(rows, piece) for piece in self._lanes.split(part)]
            found = [micro for micro in pieces if len(micro.positions)]
            yield found or ([self._idle(rows)] if self._shards else [])

    def _idle(self, rows: Rows) -> MicroBatch:
        """A row that trains nothing."""
        micro = collate(rows, [0])
        return replace(micro, positions=micro.positions[:0], labels=micro.labels[:0])

    def _finish_step(self, started: float, chosen: npt.NDArray[np.int64], value: float) -> None:
        trained = self._rows.trained(chosen)
        self._rate = float(self._scheduler.get_last_lr()[0])
        about = (self.state, self._rate, chosen)
        if trained and self._finite.allows("loss", value, *about) and self._apply(*about):
            self.state.add(value)
        self._optimizer.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            # The schedule follows the steps, those that moved nothing included.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self._scheduler.step()
        tokens = int(self._rows.lengths[chosen].sum())
        self.state.step += 1
        self.state.tokens += tokens
        self.state.trained_tokens += trained
        self._speed.append((self._clock() - started, tokens))

    @property
    def micro_batch_size(self) -> int:
        """Rows of a forward pass now: the plan's, or what memory has left of it."""
        return self.state.micro_batch_size or self.plan.micro_batch_size

    def shrink(self, why: str) -> None:
        """Halve the micro batch; the batch stays, in twice as many parts.

        Raises:
            FailedPrecondition: it is one row already.
        """
        size = self.micro_batch_size
        if size == 1:
            raise FailedPrecondition(
                f"{why} with micro_batch_size 1: use gradient_checkpointing, load_in_4bit, "
                "shorter rows (cutoff_len) or a machine with more memory",
                reason="OUT_OF_MEMORY",
            )
        self.state.micro_batch_size = size // 2
        parts = math.ceil(self.plan.batch_size / (size // 2))
        _log.warning(
            "%s with micro_batch_size %d: from here on it is %d, with %d accumulated a step; "
            "batch_size stays %d",
            why,
            size,
            size // 2,
            parts,
            self.plan.batch_size,
        )
        self._optimizer.zero_grad(set_to_none=True)
        allocator.release(self._numerics.device)

    def _apply(self, state: State, rate: float, rows: npt.NDArray[np.int64]) -> bool:
        """Move the weights by their gradients; whether these were fit for it."""
        self._scaler.unscale_(self._optimizer)
        limit = self.plan.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self._weights.values(), limit))
        self._grad_norm = norm if math.isfinite(norm) else None
        # A loss scale is found by trying: it skips such steps by itself.
        if not self._numerics.scaled and not self._finite.allows(
            "gradient", norm, state, rate, rows
        ):
            return False
        before = self._scaler.get_scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._finite.scaled(state, skipped=self._scaler.get_scale() < before)
        return True

    def _validate_if_due(
        self, report: Callable[[Report], None], should_stop: Callable[[], bool]
    ) -> bool:
        """Take the held-out loss when it is due; whether it is the lowest so far."""
        state, rows = self.state, self._val_rows
        if rows is None or not len(rows):
            return False
        if state.step == 0:
            if self._measures_base and state.base_loss is None:
                state.base_loss = self._validate(rows, report, should_stop)
            return False
        done = bool(state.val_losses) and state.val_losses[-1][0] == state.step
        if done or not self.plan.validates_at(state.step):
            return False
        loss = self._validate(rows, report, should_stop)
        if loss is None:
            return False
        state.val_losses.append([state.step, loss])
        found = stopping.best(state.val_losses)
        return found is not None and found[0] == state.step

    def _validate(
        self, rows: Rows, report: Callable[[Report], None], should_stop: Callable[[], bool]
    ) -> float | None:
        """Mean loss of held-out rows, nats per trained token."""
        order = np.argsort(-rows.lengths, kind="stable")

        def total_loss() -> list[float]:
            self._forward.eval()
            total, trained, done = 0.0, 0, 0
            for parts in self._micro_batches(rows, order):
                if self._ranks.any(should_stop()):
                    raise Stopped
                total += sum(self._lanes.run(lambda _, micro: self._judged(micro), parts))
                trained += sum(len(micro.labels) for micro in parts)
                done += self.micro_batch_size * self._ranks.world
                report(self.report("validating", min(done, len(order)), len(order)))
            return self._ranks.total([total, float(trained)])

        total, trained = self._with_memory(total_loss)
        return total / trained if trained else None

    def _judged(self, micro: MicroBatch) -> float:
        with torch.no_grad():
            return float(self._forward(micro))

    def _seed(self) -> None:
        """Make what the next step draws follow from seed, step, rank and lane; none is kept."""
        seed = self.plan.seed & (2**64 - 1)
        words = np.random.SeedSequence([seed, self.state.step, self._ranks.rank])
        states = words.generate_state(1 + self._lanes.count, np.uint64) >> np.uint64(1)
        torch.manual_seed(int(states[0]))
        self._generators = [torch.Generator().manual_seed(int(state)) for state in states[1:]]

    def _lane_count(self, trained: int) -> int:
        """Parts of a micro batch that are computed at the same time, each by its own thread.

        Only where they share nothing that changes, and gradients of their own are little.
        """
        if self._shards or not self._forward.concurrent or 4 * trained > self._parameters:
            return 1
        threads: int = torch.get_num_threads()
        return min(threads, self.plan.micro_batch_size)

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
        flops = self._flops * (speed or 0.0)
        return Report(
            phase=phase,
            step=step or self.state.step,
            total=total or self.plan.total_steps,
            loss=self.state.smooth_loss,
            learning_rate=self._rate,
            tokens_per_second=speed,
            tokens=self.state.tokens,
            mfu=flops / self._peak if flops and self._peak else None,
            raw_loss=self.state.losses[-1] if self.state.losses else None,
            grad_norm=self._grad_norm,
            micro_batch_size=self.micro_batch_size,
        )
