"""A stage's status as the numbers that metrics show.

Responsibility: from messages to `metrics` dataclasses. Does not know Prometheus.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from arriero.metrics import GpuFigures, StageFigures
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import types_pb2


def stage_figures(status: pb.StageStatus) -> StageFigures:
    """What is known of a stage's progress."""
    metadata = status.metadata
    progress = metadata.progress

    def optional(field: Any) -> Any:
        return getattr(progress, field) if progress.HasField(field) else None

    def time(field: Any) -> float | None:
        if not progress.HasField(field):
            return None
        return float(getattr(progress, field).ToNanoseconds()) / 1e9

    return StageFigures(
        kind=status.kind,
        state=pb.StageState.Name(status.state).removeprefix("STAGE_STATE_"),
        step=progress.step if progress.total_steps else None,
        total_steps=progress.total_steps or None,
        training_step=optional("training_step"),
        training_total_steps=optional("training_total_steps"),
        loss=optional("loss"),
        raw_loss=optional("raw_loss"),
        grad_norm=optional("grad_norm"),
        micro_batch_size=optional("micro_batch_size"),
        learning_rate=optional("learning_rate"),
        tokens=optional("tokens"),
        tokens_per_second=optional("tokens_per_second"),
        mfu=optional("mfu"),
        eta_seconds=optional("eta_seconds"),
        update_time=time("update_time"),
        checkpoint_time=time("checkpoint_time"),
        attempts=metadata.attempt or None,
        cpu_cores=optional("cpu_cores"),
        memory_bytes=optional("memory_bytes"),
        gpus=tuple(
            GpuFigures(g.uuid, g.utilization_ratio, g.memory_used_bytes, g.memory_total_bytes)
            for g in progress.gpus
        ),
    )


def stage_wait(status: pb.StageStatus) -> float | None:
    """Seconds from the stage's start to its first job's; None when no job ran."""
    if not status.metadata.jobs or not status.HasField("start_time"):
        return None
    first = status.metadata.jobs[0].start_time
    return float(first.ToNanoseconds() - status.start_time.ToNanoseconds()) / 1e9


def gate_pairs(gates: Iterable[types_pb2.GateResult]) -> list[tuple[str, str]]:
    """Gate and verdict (`passed`) of each result."""
    return [
        (g.gate, types_pb2.GateVerdict.Name(g.verdict).removeprefix("GATE_VERDICT_").lower())
        for g in gates
    ]
