"""The `train` job: a model and rows in, an adapter and golden logits out.

Responsibility: put the room's parts together for one attempt, resume from its
newest checkpoint, report. Does not know gRPC, nor who started it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.errors import DataLoss, Preempted
from arriero.gates.golden import probe_sequences
from arriero.llama.cores import threads
from arriero.operations.job import Job, Output, main
from arriero.prompts import FILE_NAME as TEMPLATE_FILE
from arriero.training.checkpoints import Checkpoints
from arriero.training.plan import Plan, checkpoint_bytes
from arriero.training.rows import PROBE_FILE, Rows, check_ids, read_facts
from arriero.training.spec import embedding_rows, lora_of, plan_of, read_config
from arriero.weights import Weights
from arriero.weights.health import check_adapter

if TYPE_CHECKING:
    from arriero.training.loop import Loop, Report, State
    from arriero.training.numerics import Numerics

_TENSORS, _STATE = "tensors.pt", "state.json"
# The first and the last losses are means over this many steps at most.
_MEAN_STEPS = 10


def train(job: Job) -> Sequence[Output]:
    """Stage `train`: outputs `adapter`, and `golden` (report) unless the adapter is ill.

    Raises:
        Preempted: told to leave; the newest checkpoint is of the last whole step.
        FailedPrecondition: the loss is not finite, or the rows are another model's.
        DiskFull: no room for a checkpoint.
    """
    job.progress(phase="loading", force=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch  # seconds, with what follows: said to be loading first

    from arriero.training import adapter, numerics

    torch.set_num_threads(threads())
    spec = job.spec
    base, dataset = job.input("model"), job.input("dataset")
    weights = Weights.open(base.path)
    rows, val_rows = _open_rows(job, weights)
    plan, lora = plan_of(spec, len(rows)), lora_of(spec)
    how = numerics.choose(plan.dtype)
    job.check_preempted()
    model = adapter.load_base(base.path, how.dtype, how.device)
    model = adapter.attach(model, lora, base=base.digest, seed=plan.seed)
    if plan.gradient_checkpointing:
        adapter.spare_activations(model)
    trained = sum(weight.numel() for weight in adapter.trained_weights(model).values())
    job.log.info(
        "training %d of %d parameters on %s in %s with %d threads: %d rows, %d steps of %d",
        trained,
        weights.elements + trained,
        how.device,
        str(how.dtype).removeprefix("torch."),
        torch.get_num_threads(),
        len(rows),
        plan.total_steps,
        plan.batch_size,
    )
    state = _train(job, model, (rows, val_rows), plan, how, parameters=weights.elements)
    directory = job.output_dir("adapter")
    adapter.save(model, directory)
    if (dataset.path / TEMPLATE_FILE).is_file():
        shutil.copyfile(dataset.path / TEMPLATE_FILE, directory / TEMPLATE_FILE)
    del model
    if how.device == "cuda":
        torch.cuda.empty_cache()
    output = Output(
        name="adapter",
        kind="adapter",
        path=directory,
        artifact_name=base.manifest.name,
        metrics={**_metrics(state), "parameters": float(trained)},
        labels={"base": base.digest},
        licenses=base.manifest.licenses,
    )
    if not _healthy(job, directory, weights):
        return [output]
    output.golden = "output:golden"
    return [output, _golden(job, directory, rows, how.device, state)]


def _open_rows(job: Job, weights: Weights) -> tuple[Rows, Rows | None]:
    dataset, held_out = job.input("dataset"), job.optional_input("val_dataset")
    embeddings = embedding_rows(weights, read_config(job.input("model").path))
    rows = Rows(dataset.path)
    check_ids(rows, embeddings, what="dataset")
    if held_out is None:
        return rows, None
    val_rows = Rows(held_out.path)
    check_ids(val_rows, embeddings, what="val_dataset")
    return rows, val_rows


def _train(
    job: Job,
    model: Any,
    rows: tuple[Rows, Rows | None],
    plan: Plan,
    how: Numerics,
    *,
    parameters: int,
) -> State:
    """Train from the newest checkpoint to the end."""
    from arriero.training.loop import Loop, Stopped

    pad_id = read_facts(job.input("dataset").path).get("pad_token_id")
    pad_id = max(0, int(pad_id or 0))  # any id: what is padded is never looked at
    loop = Loop(model, *rows, plan, how, pad_id=pad_id, parameters=parameters)
    checkpoints = Checkpoints(job.checkpoints, plan.save_total_limit)
    saved: float | None = None  # when the newest complete one was
    saved_step = 0
    if (newest := checkpoints.newest()) is not None:
        loop.restore(*_read(newest))
        saved, saved_step = newest.stat().st_mtime, loop.state.step
        job.log.info("resumed from step %d of %d", loop.state.step, plan.total_steps)
    needed = checkpoint_bytes(sum(weight.numel() for weight in loop.tensors()["weights"].values()))

    def report(now: Report) -> None:
        job.progress(
            phase=now.phase,
            step=now.step,
            total=now.total,
            unit="steps" if now.phase == "training" else "rows",
            loss=now.loss,
            learning_rate=now.learning_rate,
            tokens_per_second=now.tokens_per_second,
            tokens=now.tokens,
            mfu=now.mfu,
            checkpoint_time=saved,
        )

    def save() -> None:
        nonlocal saved, saved_step
        job.store.preflight(needed)
        checkpoints.save(loop.state.step, lambda place: _write(place, loop), needed=needed)
        saved, saved_step = time.time(), loop.state.step

    # The step that it goes on from: what is left is told from this process' own speed.
    report(loop.report())
    try:
        state = loop.run(report=report, save=save, should_stop=job.preempted.is_set)
    except Stopped as stopped:
        if loop.state.step != saved_step:
            save()
        raise Preempted(
            f"told to leave at step {loop.state.step} of {plan.total_steps}; it is saved, and "
            "the next attempt goes on from there"
        ) from stopped
    for step, loss in state.val_losses:
        job.log.info("held-out loss %.4f nats per token at step %d", loss, step)
    return state


def _write(directory: Path, loop: Loop) -> None:
    import torch

    # Through memory: torch's own writer hides why it fails.
    buffer = io.BytesIO()
    torch.save(loop.tensors(), buffer)
    (directory / _TENSORS).write_bytes(buffer.getbuffer())
    (directory / _STATE).write_text(json.dumps(loop.state.to_dict()), encoding="utf-8")


def _read(directory: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    import torch

    # To the CPU: generators' states stay there, the rest is copied to its parameters.
    tensors = torch.load(directory / _TENSORS, map_location="cpu", weights_only=True)
    return tensors, json.loads((directory / _STATE).read_text(encoding="utf-8"))


def _metrics(state: State) -> dict[str, float]:
    count = max(1, min(_MEAN_STEPS, len(state.losses) // 4))
    metrics = {
        "steps": float(state.step),
        "tokens": float(state.tokens),
        "trained_tokens": float(state.trained_tokens),
    }
    if state.losses:
        metrics["loss_first"] = sum(state.losses[:count]) / count
        metrics["loss_last"] = sum(state.losses[-count:]) / count
    if state.val_losses:
        metrics["val_loss"] = state.val_losses[-1][1]
    return metrics


def _healthy(job: Job, directory: Path, base: Weights) -> bool:
    """Judge `adapter.health`; whether golden logits can be made of it."""
    if not job.gates.wanted("adapter.health"):
        return True
    with job.gates.timed():
        problems = check_adapter(directory, base=base)
    job.gates.judge(
        "adapter.health",
        not problems,
        figure=float(len(problems)),
        threshold=0.0,
        unit="problems",
        detail="; ".join(problems),
    )
    return not problems


def _golden(job: Job, adapter: Path, rows: Rows, device: str, state: State) -> Output:
    from arriero.training.golden import golden_logits

    sequences = _probe(job, rows)

    def tick(done: int) -> None:
        job.progress(phase="proving", step=done, total=len(sequences), unit="sequences")

    tick(0)
    base = job.input("model")
    golden = golden_logits(base.path, adapter, sequences, device=device, tick=tick)
    directory = job.output_dir("golden")
    golden.write(directory)
    figures = {
        "format": 1,
        "report": "golden",
        "base": base.digest,
        "tokens": len(golden.tokens),
        "sequences": len(golden.lengths),
        "vocabulary": int(golden.logprobs.shape[1]),
        "losses": state.losses,
        "val_losses": state.val_losses,
        **_metrics(state),
    }
    (directory / "report.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return Output(
        name="golden",
        kind="report",
        path=directory,
        artifact_name=base.manifest.name,
        metrics={"tokens": float(len(golden.tokens))},
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


if __name__ == "__main__":
    main({"train": train})
