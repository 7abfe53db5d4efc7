"""Waiving: failed gates of a run's stages that a person lets pass, for a reason.

Responsibility: hold waivers against what stages failed by, refuse what does not
fit, write the rest into the store, and show what was waived. Does not know how a
run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.gates import KNOWN_GATES, Verdict
from arriero.operations.views import gate_message
from arriero.orchestrator import smoke
from arriero.store import Store
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import types_pb2

__all__ = ["Waived", "check", "let_through", "waive", "waived_gates"]

# Stage -> gate -> reason.
Waived = Mapping[str, Mapping[str, str]]
_LONGEST_REASON = 2000


def check(run: pb.Run, waivers: Sequence[pb.GateWaiver]) -> dict[str, dict[str, str]]:
    """Which gates of which stages the waivers mean, with the reasons.

    Raises:
        InvalidArgument: no reason, an unknown gate or stage, or a gate by which
            several stages failed.
        FailedPrecondition: no stage failed by that gate, or a stage failed by
            another one too; a gate that is judged on live replicas.
    """
    found: dict[str, dict[str, str]] = {}
    for i, waiver in enumerate(waivers):
        stage = _stage_of(run, waiver, f"waivers[{i}]")
        found.setdefault(stage.name, {})[waiver.gate] = waiver.reason.strip()
    for stage in run.stages:
        left = [gate for gate in _failed(stage) if gate not in found.get(stage.name, {})]
        if stage.name in found and left:
            raise FailedPrecondition(
                f"stage {stage.name!r} failed by {', '.join(left)} too; waive every gate that "
                "it failed by, or retry it without waivers"
            )
    return found


def _stage_of(run: pb.Run, waiver: pb.GateWaiver, path: str) -> pb.StageStatus:
    gate = waiver.gate
    if gate not in KNOWN_GATES:
        raise InvalidArgument.field(
            f"{path}.gate", f"{gate!r} is not a gate; known gates: {', '.join(KNOWN_GATES)}"
        )
    if not waiver.reason.strip():
        raise InvalidArgument.field(f"{path}.reason", "is empty; a waiver says why")
    if len(waiver.reason) > _LONGEST_REASON:
        raise InvalidArgument.field(
            f"{path}.reason",
            f"has {len(waiver.reason)} characters; expected at most {_LONGEST_REASON}",
        )
    names = [stage.name for stage in run.stages]
    if waiver.stage and waiver.stage not in names:
        raise InvalidArgument.field(
            f"{path}.stage",
            f"run {run.id} has no stage {waiver.stage!r}; stages: {', '.join(names)}",
        )
    if gate == smoke.GATE:
        raise FailedPrecondition(
            f"{gate} is judged on live replicas, and nothing of them is kept to be let through; "
            f"set gates: {{{gate}: warn}} in the deploy stage and run the pipeline again (what "
            "is done is reused)"
        )
    stages = [
        stage for stage in run.stages if gate in _failed(stage) and waiver.stage in ("", stage.name)
    ]
    if not stages:
        failed = [f"{s.name} by {', '.join(_failed(s))}" for s in run.stages if _failed(s)]
        where = f"stage {waiver.stage!r}" if waiver.stage else f"no stage of run {run.id}"
        verb = "did not fail" if waiver.stage else "failed"
        raise FailedPrecondition(
            f"{where} {verb} by {gate}; failed by a gate: {'; '.join(failed) or 'none'}"
        )
    if len(stages) > 1:
        raise InvalidArgument.field(
            f"{path}.stage",
            f"is empty, but several stages failed by {gate}: "
            f"{', '.join(stage.name for stage in stages)}; say which",
        )
    return stages[0]


def _failed(stage: pb.StageStatus) -> list[str]:
    if stage.state != pb.STAGE_STATE_FAILED:
        return []
    return [g.gate for g in stage.metadata.gates if g.verdict == types_pb2.GATE_VERDICT_FAILED]


def waive(store: Store, run: pb.Run, waived: Waived, who: str) -> None:
    """Write the waivers of what the stages published. Blocks; may be repeated.

    Raises:
        FailedPrecondition: nothing was kept that the gate could be waived for.
        NotFound: it was collected meanwhile.
    """
    found: list[tuple[str, str, str]] = []
    for stage in run.stages:
        for gate, reason in waived.get(stage.name, {}).items():
            digests = [
                output.digest
                for output in stage.outputs
                if gate in store.get(output.digest).manifest.failed_gates
            ]
            if not digests:
                raise FailedPrecondition(
                    f"stage {stage.name!r} kept nothing that {gate} refused; set gates: "
                    f"{{{gate}: warn}} in the stage and run the pipeline again"
                )
            found += [(digest, gate, reason) for digest in digests]
    for digest, gate, reason in found:
        store.waive(digest, gate, reason, who)


def let_through(stage: pb.StageStatus, gates: Mapping[str, str], who: str) -> None:
    """Make a stage that failed by these gates alone one that succeeded."""
    stage.state = pb.STAGE_STATE_SUCCEEDED
    stage.ClearField("error")
    for output in (*stage.outputs, *stage.metadata.outputs):
        output.quarantined = False
    for result in stage.metadata.gates:
        if result.gate in gates and result.verdict == types_pb2.GATE_VERDICT_FAILED:
            result.verdict = types_pb2.GATE_VERDICT_WAIVED
            said = f"waived by {who}: {gates[result.gate]}"
            result.detail = f"{said} ({result.detail})" if result.detail else said


def waived_gates(store: Store, digest: str) -> list[types_pb2.GateResult]:
    """Waived gates of an artifact and of all that it was made from, nearest first. Blocks."""
    found = []
    for manifest in store.lineage(digest):
        for result in store.gates(manifest):
            if result.verdict is Verdict.WAIVED:
                message = gate_message(result)
                message.detail = f"{manifest.kind} {manifest.name}: {result.detail}"
                found.append(message)
    return found
