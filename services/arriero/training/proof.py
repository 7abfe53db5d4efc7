"""What is proved of a training before it is handed on.

Responsibility: the gates `train.improves` and `adapter.health`, and the golden logits
as a report. Does not know how the training went beyond its state.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arriero.errors import DataLoss
from arriero.gates import Gates
from arriero.gates.golden import probe_sequences
from arriero.operations.job import Job, Output
from arriero.training.rows import PROBE_FILE, Rows
from arriero.training.state import State
from arriero.weights import Weights
from arriero.weights.health import check_adapter, check_model

# Where TensorBoard's files lie, beside the checkpoints and then in the report.
TENSORBOARD = "tensorboard"


def improves(gates: Gates, base_loss: float | None, loss: float | None) -> None:
    """Judge `train.improves`: what is handed on against the base, on held-out rows."""
    if not gates.wanted("train.improves"):
        return
    if base_loss is None or loss is None:
        gates.skip("train.improves", "no held-out rows; set val_set_size in the dataset stage")
        return
    gates.judge(
        "train.improves",
        loss < base_loss,
        figure=loss - base_loss,
        threshold=0.0,
        unit="nats",
        detail=f"held-out loss {loss:.4f} nats per token, the base's is {base_loss:.4f}"
        + ("" if loss < base_loss else "; fewer epochs or a lower learning_rate may help"),
    )


def healthy(gates: Gates, directory: Path, base: Weights, *, full: bool) -> bool:
    """Judge `adapter.health`; whether golden logits can be made of it.

    Args:
        gates: get the verdict.
        directory: the adapter's, or the model's.
        base: the base's tensors.
        full: it is a model.
    """
    if not gates.wanted("adapter.health"):
        return True
    with gates.timed():
        problems = check_model(directory, base) if full else check_adapter(directory, base=base)
    gates.judge(
        "adapter.health",
        not problems,
        figure=float(len(problems)),
        threshold=0.0,
        unit="problems",
        detail="; ".join(problems),
    )
    return not problems


def golden(
    job: Job, made: Output, rows: Rows, device: str, state: State, facts: Mapping[str, Any]
) -> Output:
    """Golden logits of what was trained, with its curves.

    Of an adapter they are those of the merge into the base as it is stored, also where
    the base was quantized while it was trained on: `report.json` says which base.

    Args:
        job: whose output it becomes.
        made: the adapter or the model.
        rows: trained on; the probe where the dataset has none.
        device: to compute on.
        state: for the curves.
        facts: more for the report.
    """
    from arriero.training.golden import golden_logits

    sequences = _probe(job, rows)

    def tick(done: int) -> None:
        job.progress(phase="proving", step=done, total=len(sequences), unit="sequences")

    tick(0)
    base = job.input("model")
    full = made.kind == "model"
    where = made.path if full else base.path
    adapter = None if full else made.path
    found = golden_logits(where, adapter, sequences, device=device, tick=tick)
    directory = job.output_dir("golden")
    found.write(directory)
    figures = {
        "format": 1,
        "report": "golden",
        "base": base.digest,
        "tokens": len(found.tokens),
        "sequences": len(found.lengths),
        "vocabulary": int(found.logprobs.shape[1]),
        "losses": state.losses,
        "val_losses": state.val_losses,
        **facts,
    }
    if (job.checkpoints / TENSORBOARD).is_dir():
        shutil.copytree(job.checkpoints / TENSORBOARD, directory / TENSORBOARD)
    (directory / "report.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return Output(
        name="golden",
        kind="report",
        path=directory,
        artifact_name=base.manifest.name,
        metrics={"tokens": float(len(found.tokens))},
        labels={"report": "golden"},
        gates=(),
    )


def _probe(job: Job, rows: Rows) -> list[list[int]]:
    """The dataset's probe; a dataset without one is probed with its own rows."""
    path = job.input("dataset").path / PROBE_FILE
    if not path.is_file():
        return probe_sequences([rows.ids(row).tolist() for row in range(min(len(rows), 256))])
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["sequences"]
        return [[int(i) for i in ids] for ids in found]
    except (ValueError, KeyError, TypeError) as error:
        raise DataLoss(f"{PROBE_FILE} of the dataset cannot be read: {error}") from error
