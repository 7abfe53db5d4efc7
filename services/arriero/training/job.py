"""The `train` job: a model and rows in, an adapter (or a model) and golden logits out.

Responsibility: put the room's parts together for one attempt, and report. Does not
know gRPC, nor who started it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from arriero.cores import threads
from arriero.errors import Preempted
from arriero.gates import Mode
from arriero.operations.handoff import to_json
from arriero.operations.job import Job, Output, main
from arriero.operations.memory import available_bytes
from arriero.prompts import FILE_NAME as TEMPLATE_FILE
from arriero.training import allocator, launch, proof
from arriero.training.memory import fit, gigabytes
from arriero.training.plan import Plan
from arriero.training.ranks import Ranks
from arriero.training.rows import Rows, check_ids
from arriero.training.spec import (
    demand_of,
    embedding_rows,
    lora_of,
    plan_of,
    quantization_of,
    read_config,
)
from arriero.weights import Weights

if TYPE_CHECKING:
    from arriero.training.loop import Loop
    from arriero.training.numerics import Numerics
    from arriero.training.recovery import Recovery
    from arriero.training.state import Report, State
    from arriero.training.trackers import Trackers

# The first and the last losses are means over this many steps at most.
_MEAN_STEPS = 10


def train(job: Job) -> Sequence[Output]:
    """Stage `train`: outputs `adapter` (`model` with `method: full`), and `golden`
    (report) unless the first is ill.

    Raises:
        Preempted: told to leave; the newest checkpoint is of the last whole step.
        FailedPrecondition: the loss is not finite, memory does not suffice, or the
            rows are another model's.
        DiskFull: no room for a checkpoint.
    """
    job.progress(phase="loading", force=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    allocator.settle(sparing=job.spec.gradient_checkpointing)
    import torch  # seconds, with what follows: said to be loading first

    from arriero.training import adapter, finite, numerics, whole
    from arriero.training.optimizers import check_optimizer

    ranks = Ranks.join()
    torch.set_num_threads(max(1, threads() // ranks.local_world))
    base, full = job.input("model"), job.spec.method == "full"
    weights = Weights.open(base.path)
    rows, val_rows = _open_rows(job, weights)
    plan = plan_of(job.spec, len(rows))
    how = numerics.choose(plan.dtype)
    check_optimizer(plan.optimizer, how.device)
    micro_batch = ranks.least(_fitting(job, weights, rows, how, plan, ranks))
    job.check_preempted()
    model = _load(job, weights, how, plan, ranks)
    trained = sum(weight.numel() for weight in adapter.trained_weights(model).values())
    allocator.release(how.device)  # what loading left
    job.log.info(
        "training %d of %d parameters on %s in %s with %d threads: %d rows, %d steps of %d",
        trained,
        weights.elements if full else weights.elements + trained,
        how.device,
        str(how.dtype).removeprefix("torch."),
        torch.get_num_threads(),
        len(rows),
        plan.total_steps,
        plan.batch_size,
    )
    with ranks.together():
        loop = _loop(job, model, (rows, val_rows), plan, how, weights.elements, ranks)
    if micro_batch < plan.micro_batch_size:
        loop.state.micro_batch_size = micro_batch
    with ranks.together():
        state, best = _run(job, loop, ranks)
    path = loop.path
    if not ranks.first:
        return []
    name = "model" if full else "adapter"
    directory = job.output_dir(name)
    if full:
        whole.save(model, weights, base.path, directory)
    else:
        adapter.save(model, directory)
    if (job.input("dataset").path / TEMPLATE_FILE).is_file():
        shutil.copyfile(job.input("dataset").path / TEMPLATE_FILE, directory / TEMPLATE_FILE)
    del model, loop
    allocator.release(how.device)
    metrics = _metrics(state, best)
    finite.judge(job.gates, state)
    proof.improves(job.gates, state.base_loss, metrics.get("val_loss"))
    output = Output(
        name=name,
        kind=name,
        path=directory,
        artifact_name=base.manifest.name,
        metrics={**metrics, "parameters": float(trained)},
        labels=_labels(job, full=full),
        licenses=base.manifest.licenses,
    )
    if not proof.healthy(job.gates, directory, weights, full=full):
        return [output]
    output.golden = "output:golden"
    facts = {**metrics, "trained_on": _held_as(job, how), "path": path}
    # One GPU does not hold a base that had to be spread over several.
    device = "cpu" if plan.fsdp else how.device
    return [output, proof.golden(job, output, rows, device, state, facts)]


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


def _fitting(
    job: Job, weights: Weights, rows: Rows, how: Numerics, plan: Plan, ranks: Ranks
) -> int:
    """The micro batch that memory holds by estimate.

    Raises:
        FailedPrecondition: it holds none.
    """
    import torch

    model = job.input("model").path
    demand = demand_of(
        job.spec,
        read_config(model),
        weights,
        rows.longest(plan.micro_batch_size),
        plan.micro_batch_size,
        base_bytes=4 if how.dtype == torch.float32 else 2,
        host=how.device == "cpu",
        # In the host's memory every rank holds the whole base while it loads.
        spread=ranks.world if plan.fsdp and how.device != "cpu" else 1,
    )
    if how.device == "cpu":
        free, where = available_bytes() // ranks.local_world, "this host"
    else:
        free, where = torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    fitting = fit(demand, free, where)
    need = demand.need()
    job.log.info(
        "memory: about %s (%s) of %s free on %s",
        gigabytes(need.total),
        need,
        gigabytes(free),
        where,
    )
    if fitting < plan.micro_batch_size:
        job.log.warning(
            "that is too much for micro_batch_size %d: it is %d, with %d accumulated a step; "
            "batch_size stays %d",
            plan.micro_batch_size,
            fitting,
            -(-plan.batch_size // fitting),
            plan.batch_size,
        )
    return fitting


def _load(job: Job, weights: Weights, how: Numerics, plan: Plan, ranks: Ranks) -> Any:
    """The model, with what is to be trained of it."""
    import torch

    from arriero.training import adapter, whole

    spec, base = job.spec, job.input("model")
    if spec.method == "full":
        model = adapter.load_base(base.path, torch.float32, how.device)
        model = whole.unfreeze(model, weights)
    else:
        lora = lora_of(spec)
        # What is going to be spread may not fit on one device.
        device = "cpu" if plan.fsdp and ranks.world > 1 else how.device
        model = adapter.load_base(
            base.path, how.dtype, device, quantization_of(spec), lora.modules_to_save
        )
        model = adapter.attach(model, lora, base=base.digest, seed=plan.seed)
    if plan.gradient_checkpointing:
        adapter.spare_activations(model)
    return model


def _loop(
    job: Job,
    model: Any,
    rows: tuple[Rows, Rows | None],
    plan: Plan,
    how: Numerics,
    parameters: int,
    ranks: Ranks,
) -> Loop:
    from arriero.training.loop import Loop

    return Loop(
        model,
        *rows,
        plan,
        how,
        parameters=parameters,
        measures_base=job.gates.mode("train.improves") is not Mode.SKIP,
        leaves_out=job.gates.mode("train.finite") is not Mode.ENFORCE,
        ranks=ranks,
    )


def _run(job: Job, loop: Loop, ranks: Ranks) -> tuple[State, int]:
    """Train from the newest checkpoint to the end; the state, and the step handed on."""
    from arriero.training.loop import Stopped
    from arriero.training.recovery import Recovery

    tidy = allocator.Tidy(loop.device)
    recovery = Recovery(loop, job.checkpoints, job.store, job.gates, ranks)
    recovery.resume(out_of_memory=job.last_failure == "OUT_OF_MEMORY")
    total = loop.plan.total_steps
    # The step that it goes on from: what is left is told from this process' own speed.
    _report(job, recovery, loop.report())
    try:
        with _trackers(job) as trackers:

            def report(now: Report) -> None:
                _report(job, recovery, now)
                trackers.log(now, loop.state)
                tidy()

            state = loop.run(report=report, save=recovery.save, should_stop=job.preempted.is_set)
            trackers.finish(state)
    except Stopped as stopped:
        recovery.save_if_newer()
        raise Preempted(
            f"told to leave at step {loop.state.step} of {total}; it is saved, and "
            "the next attempt goes on from there"
        ) from stopped
    except Exception as error:
        if not allocator.ran_out(error):
            recovery.forget()
        raise
    for step, loss in state.val_losses:
        job.log.info("held-out loss %.4f nats per token at step %d", loss, step)
    return state, recovery.load_best() if loop.plan.load_best else state.step


def _trackers(job: Job) -> Trackers:
    from arriero.training.trackers import Trackers

    return Trackers(
        list(job.spec.report_to),
        to_json(job.spec),
        run=job.run,
        stage=job.stage,
        directory=job.checkpoints / proof.TENSORBOARD,
    )


def _report(job: Job, recovery: Recovery, now: Report) -> None:
    job.progress(
        phase=now.phase,
        step=now.step,
        total=now.total,
        unit="steps" if now.phase == "training" else "rows",
        loss=now.loss,
        raw_loss=now.raw_loss,
        grad_norm=now.grad_norm,
        micro_batch_size=now.micro_batch_size,
        learning_rate=now.learning_rate,
        tokens_per_second=now.tokens_per_second,
        tokens=now.tokens,
        mfu=now.mfu,
        checkpoint_time=recovery.time,
    )


def _metrics(state: State, best: int) -> dict[str, float]:
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
        last = state.val_losses[-1][1]
        metrics["val_loss"] = next((loss for step, loss in state.val_losses if step == best), last)
        metrics["best_step"] = float(best)
    if state.base_loss is not None:
        metrics["base_val_loss"] = state.base_loss
    if state.micro_batch_size:
        metrics["micro_batch_size"] = float(state.micro_batch_size)
    return metrics


def _labels(job: Job, *, full: bool) -> dict[str, str]:
    base = job.input("model")
    labels = {"base": base.digest}
    if full:
        kept = ("architecture", "license_files")
        labels |= {key: base.manifest.labels[key] for key in kept if key in base.manifest.labels}
    return labels


def _held_as(job: Job, how: Numerics) -> str:
    """In what the base was held while it was trained on: `nf4`, `bfloat16`."""
    packed = quantization_of(job.spec)
    return packed.name if packed else str(how.dtype).removeprefix("torch.")


if __name__ == "__main__":
    launch.as_torchrun()
    main({"train": train})
