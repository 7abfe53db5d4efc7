"""Records as the API shows them: `google.longrunning.Operation` and its parts.

Responsibility: from records, manifests and gate results to messages. Does not
know how records change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.longrunning import operations_pb2
from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2

from arriero.errors import ArrieroError
from arriero.gates import GateResult
from arriero.gates.cost import Cost
from arriero.operations.handoff import to_json
from arriero.operations.records import ExecutionRecord, OperationRecord, Result, State
from arriero.rpc.status import to_status
from arriero.store import Artifact
from arriero.v1 import types_pb2


def status_of(data: Mapping[str, Any]) -> status_pb2.Status:
    """A status from its JSON; details of unknown types are left out."""
    try:
        return json_format.ParseDict(dict(data), status_pb2.Status())
    except json_format.ParseError:
        return status_pb2.Status(code=int(data["code"]), message=str(data.get("message", "")))


def gate_message(result: GateResult) -> types_pb2.GateResult:
    """A gate's result as the API shows it."""
    return types_pb2.GateResult(
        gate=result.gate,
        mode=types_pb2.GateMode.Value(f"GATE_MODE_{result.mode.name}"),
        verdict=types_pb2.GateVerdict.Value(f"GATE_VERDICT_{result.verdict.name}"),
        figure=result.figure,
        threshold=result.threshold,
        unit=result.unit,
        detail=result.detail,
        seconds=result.seconds,
        memory_bytes=result.memory_bytes,
    )


def output_message(name: str, artifact: Artifact) -> types_pb2.StageOutput:
    """A published artifact as a stage's output."""
    return types_pb2.StageOutput(
        name=name,
        digest=artifact.digest,
        kind=artifact.manifest.kind,
        size_bytes=artifact.manifest.size,
        quarantined=artifact.quarantined,
        metrics=artifact.manifest.metrics,
    )


def operation_message(
    record: OperationRecord,
    execution: ExecutionRecord | None,
    waits_for: ArrieroError | None = None,
) -> operations_pb2.Operation:
    """An operation as it is now; `execution` is None when the store had the result."""
    metadata = types_pb2.OperationMetadata(
        kind=record.kind,
        state=types_pb2.OperationState.Value(f"OPERATION_STATE_{_state(record, execution)}"),
        result_key=record.result_key,
        cached=record.cached,
        run=record.run,
        stage=record.stage,
        estimate=types_pb2.Estimate(disk_bytes=record.disk_bytes, memory_bytes=record.memory_bytes),
        paused=record.paused and not record.state.ended,
    )
    if waits_for is not None and not record.state.ended:
        metadata.waits_for.CopyFrom(to_status(waits_for))
    _time(metadata.create_time, record.create_time)
    _time(metadata.end_time, record.end_time)
    fill_result(metadata, record.result)
    if execution is not None:
        _time(metadata.start_time, execution.start_time)
        metadata.attempt = execution.attempt
        if execution.progress:
            json_format.ParseDict(execution.progress, metadata.progress)
        for job in execution.jobs:
            interval = metadata.jobs.add(attempt=job.attempt)
            _time(interval.start_time, job.start_time)
            _time(interval.end_time, job.end_time)
            if job.status is not None:
                interval.status.CopyFrom(status_of(job.status))
    operation = operations_pb2.Operation(name=record.name, done=record.state.ended)
    operation.metadata.Pack(metadata)
    if record.result.error is not None:
        operation.error.CopyFrom(status_of(record.result.error))
    elif record.state is State.SUCCEEDED:
        response = types_pb2.OperationResult(cached=record.cached)
        fill_result(response, record.result)
        operation.response.Pack(response)
    return operation


def fill_result(
    message: types_pb2.OperationMetadata | types_pb2.OperationResult, result: Result
) -> None:
    """Put a result's outputs, gates and cost into metadata or a response."""
    for output in result.outputs:
        json_format.ParseDict(output, message.outputs.add())
    for gate in result.gates:
        json_format.ParseDict(gate, message.gates.add())
    if result.usage is not None:
        json_format.ParseDict(result.usage, message.usage)


def _state(record: OperationRecord, execution: ExecutionRecord | None) -> State:
    """Until an operation ends it stands where its execution stands."""
    if record.state.ended or execution is None or execution.state.ended:
        return record.state
    return execution.state


def _time(target: Timestamp, text: str) -> None:
    if text:
        target.FromJsonString(text)


def result_of(
    artifacts: Mapping[str, Artifact], gates: Sequence[GateResult], work: Cost | None = None
) -> Result:
    """Artifacts by output name, gates, and what a job took, as records have them."""
    return Result(
        outputs=[to_json(output_message(name, item)) for name, item in artifacts.items()],
        gates=[to_json(gate_message(gate)) for gate in gates],
        usage=to_json(_usage_message(work, gates)) if work is not None else None,
    )


def _usage_message(work: Cost, gates: Sequence[GateResult]) -> types_pb2.JobUsage:
    return types_pb2.JobUsage(
        work_seconds=work.seconds,
        work_memory_bytes=work.memory_bytes,
        gate_seconds=sum(gate.seconds for gate in gates),
        gate_memory_bytes=max((gate.memory_bytes for gate in gates), default=0),
    )
