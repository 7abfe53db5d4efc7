"""Curves for TensorBoard, Weights & Biases and MLflow, by transformers' callbacks.

Responsibility: hand a training's figures to the trackers that `report_to` names. Does
not know how the figures come about; what a tracker does wrong ends no training.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from arriero.errors import FailedPrecondition
from arriero.training.state import Report, State

__all__ = ["Trackers"]

# transformers' own setting: where TensorBoard's files go.
_TENSORBOARD = "TENSORBOARD_LOGGING_DIR"
_log = logging.getLogger("arriero.job.train")


@dataclass(frozen=True)
class _Arguments:
    """What the callbacks ask of transformers' TrainingArguments, with this run's settings."""

    settings: Mapping[str, Any]
    run_name: str
    output_dir: str
    load_best_model_at_end: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)

    def to_json_string(self) -> str:
        return json.dumps(self.settings, indent=2)


class Trackers:
    """The trackers of one training; a context manager.

    Args:
        names: `tensorboard`, `wandb`, `mlflow`.
        settings: the resolved spec, as the trackers show it.
        run: of the pipeline, and its `stage`: the name there.
        stage: see `run`.
        directory: for TensorBoard's files, unless `TENSORBOARD_LOGGING_DIR` is set:
            then they go to `<run>/<stage>` below it.
    """

    def __init__(
        self,
        names: Sequence[str],
        settings: Mapping[str, Any],
        *,
        run: str,
        stage: str,
        directory: Path,
    ) -> None:
        self._callbacks: list[Any] = []
        self._validated = 0
        if not names:
            return
        from transformers import TrainerControl, TrainerState
        from transformers.integrations import get_reporting_integration_callbacks

        if shared := os.environ.get(_TENSORBOARD):
            directory = Path(shared).expanduser() / (run or "train") / stage
        os.environ[_TENSORBOARD] = str(directory)
        name = f"{run}/{stage}".strip("/") or "train"
        self._arguments = _Arguments(settings, name, str(directory))
        self._state, self._control = TrainerState(), TrainerControl()
        for tracker, kind in zip(names, get_reporting_integration_callbacks(names), strict=True):
            try:
                callback = kind()
                callback.on_train_begin(self._arguments, self._state, self._control)
            except Exception as error:
                raise FailedPrecondition(
                    f"report_to {tracker}: {type(error).__name__}: {error}; set it up beside "
                    "the training service, or leave it out"
                ) from error
            self._callbacks.append(callback)

    def log(self, now: Report, state: State) -> None:
        """Take in a report; only those about optimizer steps and new validations count."""
        if not self._callbacks or now.phase != "training":
            return
        figures = {
            "loss": now.raw_loss,
            "smoothed_loss": now.loss,
            "learning_rate": now.learning_rate,
            "grad_norm": now.grad_norm,
            "tokens_per_second": now.tokens_per_second,
            "tokens": now.tokens,
        }
        self._send(now.step, figures)
        self._send_validations(state)

    def _send_validations(self, state: State) -> None:
        for step, loss in state.val_losses[self._validated :]:
            self._send(int(step), {"eval_loss": loss})
        self._validated = len(state.val_losses)

    def _send(self, step: int, figures: Mapping[str, float | None]) -> None:
        self._state.global_step = step
        known = {name: value for name, value in figures.items() if value is not None}
        for callback in list(self._callbacks):
            try:
                callback.on_log(self._arguments, self._state, self._control, logs=dict(known))
            except Exception as error:
                _log.warning(
                    "%s failed (%s: %s); the training goes on without it",
                    type(callback).__name__,
                    type(error).__name__,
                    error,
                )
                self._callbacks.remove(callback)

    def finish(self, state: State) -> None:
        """Hand over what is left."""
        if self._callbacks:
            self._send_validations(state)

    def __enter__(self) -> Trackers:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the trackers."""
        for callback in self._callbacks:
            try:
                callback.on_train_end(self._arguments, self._state, self._control)
            except Exception as wrong:
                _log.warning("%s did not close: %s", type(callback).__name__, wrong)
