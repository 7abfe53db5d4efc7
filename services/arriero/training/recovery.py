"""A training that outlives its process.

Responsibility: put a loop into checkpoints, take it up from the newest one that is
whole, and prove that it is the same training (gate `train.resume`). Does not know
how a checkpoint is made durable, nor what a step does.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from arriero.errors import DataLoss, FailedPrecondition
from arriero.gates import Gates, Verdict
from arriero.store import Store
from arriero.training import stopping
from arriero.training.checkpoints import Checkpoints, checkpoint_bytes
from arriero.training.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from arriero.training.loop import Loop

_TENSORS, _STATE, _PROBE = "tensors.pt", "state.json", "probe.json"
# Beside the checkpoints: the micro batch of the attempt that runs, or was killed.
_MICRO_BATCH = "micro-batch.json"
# Nats, and share of the loss, by which the same batch may differ: sums in another
# order on another machine or number of threads. A wrong row differs by tenths.
_NOISE = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 1e-2}

_log = logging.getLogger("arriero.job.train")


class Recovery:
    """What one attempt keeps of a loop, and finds of it.

    Args:
        loop: as it was made.
        directory: where checkpoints are; outlives attempts.
        store: whose quota they count in.
        gates: gets the verdict of `train.resume`.
        ranks: all of which call the same methods; the first alone writes and judges.
    """

    def __init__(
        self, loop: Loop, directory: Path, store: Store, gates: Gates, ranks: Ranks = ALONE
    ) -> None:
        self._loop, self._store, self._gates = loop, store, gates
        self._directory, self._ranks = directory, ranks
        self._checkpoints = (
            Checkpoints(directory, loop.plan.save_total_limit) if ranks.first else None
        )
        trained = sum(weight.numel() for weight in loop.tensors()["weights"].values())
        self._needed = checkpoint_bytes(trained)
        self._step = 0
        self.time: float | None = None

    def resume(self, *, out_of_memory: bool) -> None:
        """Go on from the newest checkpoint, if there is one.

        Args:
            out_of_memory: the attempt before was ended for want of memory, so that
                this one takes smaller micro batches.

        Raises:
            FailedPrecondition: the checkpoint gives another loss than it was saved
                with, and the gate is enforced; memory does not hold one row.
        """
        loop, ranks = self._loop, self._ranks
        newest: Path | None = ranks.told(self._checkpoints.newest() if self._checkpoints else None)
        if newest is not None:
            planned = loop.state.micro_batch_size
            tensors, state = _read(newest)
            loop.restore(tensors, state)
            if planned:  # less memory is free than when it was saved
                loop.state.micro_batch_size = min(planned, loop.micro_batch_size)
            self.time, self._step = newest.stat().st_mtime, loop.state.step
            _log.info("resumed from step %d of %d", loop.state.step, loop.plan.total_steps)
            self._prove(newest)
        if out_of_memory:
            used = ranks.told(_json(self._directory / _MICRO_BATCH).get("micro_batch_size"))
            if isinstance(used, int) and used > 0:
                loop.state.micro_batch_size = used
            loop.shrink("the attempt before was ended because memory ran out")
        self._remember()

    def save(self) -> None:
        """Write a checkpoint of the last whole step.

        Raises:
            DiskFull: there is no room for it.
        """
        loop = self._loop
        probe = loop.probe()  # all ranks compute it, where weights are spread over them
        if self._checkpoints is None:
            self._step = loop.state.step
            return
        found = stopping.best(loop.state.val_losses) if loop.plan.load_best else None
        self._store.preflight(self._needed)
        self._checkpoints.save(
            loop.state.step,
            lambda place: self._write(place, probe),
            needed=self._needed,
            best=found[0] if found else None,
        )
        self.time, self._step = time.time(), loop.state.step
        self._remember()

    def save_if_newer(self) -> None:
        """Write a checkpoint, unless there is one of this very step."""
        if self._loop.state.step != self._step:
            self.save()

    def load_best(self) -> int:
        """Give the loop the weights of the lowest held-out loss; the step that they are of.

        Raises:
            DataLoss: its checkpoint is gone or damaged.
        """
        loop = self._loop
        found = stopping.best(loop.state.val_losses)
        if found is None or found[0] == loop.state.step:
            return loop.state.step
        path = self._ranks.told(self._checkpoints.whole(found[0]) if self._checkpoints else None)
        if path is None:
            raise DataLoss(
                f"the checkpoint of step {found[0]}, whose held-out loss of {found[1]:.4f} nats "
                "was the lowest, is gone or damaged; train again, or without "
                "load_best_model_at_end"
            )
        loop.load_weights(_read(path)[0])
        _log.info("took the weights of step %d: held-out loss %.4f nats", found[0], found[1])
        return found[0]

    def forget(self) -> None:
        """Leave nothing but checkpoints: the attempt ends, and not for want of memory."""
        if self._ranks.first:
            (self._directory / _MICRO_BATCH).unlink(missing_ok=True)

    def _remember(self) -> None:
        if not self._ranks.first:
            return
        path = self._directory / _MICRO_BATCH
        path.write_text(json.dumps({"micro_batch_size": self._loop.micro_batch_size}))

    def _write(self, directory: Path, probe: float | None) -> None:
        import torch

        with _Sink(directory / _TENSORS) as sink:
            sink.fill(lambda: torch.save(self._loop.tensors(), sink))
        (directory / _STATE).write_text(json.dumps(self._loop.state.to_dict()), encoding="utf-8")
        (directory / _PROBE).write_text(json.dumps({"loss": probe}), encoding="utf-8")

    def _prove(self, checkpoint: Path) -> None:
        """Judge `train.resume`: the first row of the next batch, as it was when saved."""
        gates, loop = self._gates, self._loop
        if not gates.wanted("train.resume"):
            return
        saved = _json(checkpoint / _PROBE).get("loss")
        with gates.timed():
            now = loop.probe()
        if not self._ranks.first:
            return
        if saved is None or now is None:
            gates.skip("train.resume", "the next batch's first row trains no token")
            return
        figure = abs(now - saved)
        threshold = _NOISE[loop.dtype] * (1 + abs(saved))
        said = (
            f"resumed at step {loop.state.step}, the next batch's first row has loss {now:.6f}; "
            f"when the checkpoint was written it had {saved:.6f}"
        )
        passed = figure <= threshold  # NaN is not
        verdict = gates.judge(
            "train.resume", passed, figure=figure, threshold=threshold, unit="nats", detail=said
        )
        if verdict.verdict is Verdict.FAILED:
            raise FailedPrecondition(
                f"train.resume: {said}, {figure:.2g} nats apart where {threshold:.2g} is noise: "
                "this machine computes otherwise than the one before; train with force to start "
                "anew, or go on with gates: {train.resume: warn}",
                reason="RESUME_DIFFERS",
            )


class _Sink:
    """A file for `torch.save`, which otherwise hides why writing fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._error: OSError | None = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _Sink:
        self._file = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    def fill(self, work: Any) -> None:
        """Run `work`; the file's own error comes first."""
        try:
            work()
        except Exception as error:
            if self._error is not None:
                raise self._error from error
            raise

    def write(self, data: Any) -> int:
        """Take a piece."""
        assert self._file is not None
        try:
            return self._file.write(data)
        except OSError as error:
            self._error = error
            raise

    def flush(self) -> None:
        """Nothing: closing does."""


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch

    # To the CPU: from there all of it is copied to where it belongs.
    tensors = torch.load(directory / _TENSORS, map_location="cpu", weights_only=True)
    return tensors, _json(directory / _STATE)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
