"""What is known of each RPC before it is called: from its proto, and a few lists.

Responsibility: idempotency, default deadline, audit and drain behaviour by
method path (`/package.Service/Method`). Does not know any implementation.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from google.protobuf.descriptor_pb2 import MethodOptions

from arriero.v1 import (
    dataset_pb2,
    inference_pb2,
    job_pb2,
    merging_pb2,
    orchestrator_pb2,
    quantization_pb2,
    training_pb2,
)

__all__ = [
    "AUTHENTICATES_ITSELF",
    "OPEN",
    "WATCHES",
    "audited",
    "default_timeout",
    "idempotent",
    "known",
    "read_only",
    "service_config",
]

_OPERATIONS = "/google.longrunning.Operations"
_HEALTH = "/grpc.health.v1.Health"

# Answered without a token: probes have none.
OPEN = frozenset({f"{_HEALTH}/Check", f"{_HEALTH}/List", f"{_HEALTH}/Watch"})

# Checked by the servicer against a token of its own.
AUTHENTICATES_ITSELF = frozenset(
    {"/arriero.v1.JobService/ReportProgress", "/arriero.v1.JobService/AppendLogs"}
)

# Wait for news and may be asked again at any time: a draining server ends them
# with UNAVAILABLE at once, since they would use up the whole drain.
WATCHES = frozenset(
    {
        "/arriero.v1.RunService/WatchRun",
        "/arriero.v1.RunService/ReadRunLogs",
        "/arriero.v1.JobService/ReadLogs",
        f"{_OPERATIONS}/WaitOperation",
        f"{_HEALTH}/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    }
)

# Neither read-only nor a change that anybody has to answer for.
_NOT_AUDITED = frozenset(
    {
        "/arriero.v1.InferenceService/Generate",
        "/arriero.v1.InferenceService/Chat",
        "/arriero.v1.JobService/ReportProgress",
        "/arriero.v1.JobService/AppendLogs",
    }
)

# Google's proto has no idempotency options.
_OPERATIONS_LEVELS = {
    f"{_OPERATIONS}/GetOperation": MethodOptions.NO_SIDE_EFFECTS,
    f"{_OPERATIONS}/ListOperations": MethodOptions.NO_SIDE_EFFECTS,
    f"{_OPERATIONS}/WaitOperation": MethodOptions.NO_SIDE_EFFECTS,
    f"{_OPERATIONS}/CancelOperation": MethodOptions.IDEMPOTENT,
    f"{_OPERATIONS}/DeleteOperation": MethodOptions.IDEMPOTENT,
}

# Seconds, where the settings' default is too short by nature.
_SLOW = {
    "/arriero.v1.InferenceService/Score": 600.0,
    "/arriero.v1.InferenceService/Embed": 600.0,
    "/arriero.v1.ArtifactService/CollectGarbage": 600.0,
    f"{_OPERATIONS}/WaitOperation": 3600.0,
    "/arriero.v1.EndpointService/GetEndpoint": 300.0,
}


@cache
def _levels() -> dict[str, int]:
    levels: dict[str, int] = dict(_OPERATIONS_LEVELS)
    for module in (
        dataset_pb2,
        inference_pb2,
        job_pb2,
        merging_pb2,
        orchestrator_pb2,
        quantization_pb2,
        training_pb2,
    ):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                levels[path] = method.GetOptions().idempotency_level
    return levels


def known() -> frozenset[str]:
    """Every method that Arriero's services have."""
    return frozenset(_levels())


def idempotent(method: str) -> bool:
    """Whether the method may be sent again after UNAVAILABLE."""
    return _levels().get(method, MethodOptions.IDEMPOTENCY_UNKNOWN) in (
        MethodOptions.NO_SIDE_EFFECTS,
        MethodOptions.IDEMPOTENT,
    )


def read_only(method: str) -> bool:
    """Whether the proto says that the method changes nothing."""
    return _levels().get(method) == MethodOptions.NO_SIDE_EFFECTS


def audited(method: str) -> bool:
    """Whether each call leaves an audit line: it changes something."""
    level = _levels().get(method)
    return (
        level is not None
        and level != MethodOptions.NO_SIDE_EFFECTS
        and (method not in _NOT_AUDITED)
    )


def default_timeout(method: str, default: float) -> float:
    """Deadline in seconds of a unary call that was given none."""
    return max(default, _SLOW.get(method, 0.0))


@cache
def service_config() -> str:
    """gRPC's JSON: retries for UNAVAILABLE, idempotent methods alone.

    Five attempts are the most that gRPC core makes, whatever is asked; with
    these delays (jittered by gRPC) they span about three seconds.
    """
    names = []
    for path in sorted(_levels()):
        if idempotent(path):
            _, service, method = path.split("/")
            names.append({"service": service, "method": method})
    policy = {
        "maxAttempts": 5,
        "initialBackoff": "0.2s",
        "maxBackoff": "2s",
        "backoffMultiplier": 2.0,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    config: dict[str, Any] = {"methodConfig": [{"name": names, "retryPolicy": policy}]}
    return json.dumps(config)
