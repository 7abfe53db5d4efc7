"""Endpoints and replicas as people and metrics see them.

Responsibility: join what is wanted, what was scored and what the platform
observes. Does not know how any of it comes about.
"""

from __future__ import annotations

from collections.abc import Mapping

from arriero.metrics import EndpointFigures
from arriero.orchestrator.platform import Observed
from arriero.orchestrator.records import EndpointRecord
from arriero.v1 import orchestrator_pb2 as pb

_STATES: Mapping[str, pb.ReplicaState.ValueType] = {
    "STARTING": pb.REPLICA_STATE_STARTING,
    "READY": pb.REPLICA_STATE_READY,
    "DRAINING": pb.REPLICA_STATE_DRAINING,
    "FAILED": pb.REPLICA_STATE_FAILED,
}


def endpoint_message(record: EndpointRecord, observed: Observed) -> pb.Endpoint:
    """A copy with the replicas as the platform sees them, scores by name and artifact."""
    endpoint = pb.Endpoint()
    endpoint.CopyFrom(record.endpoint)
    endpoint.rollout_error = record.error
    scores = {(r.name, r.digest): r for r in record.endpoint.replicas}
    del endpoint.replicas[:]
    for replica in observed.replicas:
        seen = endpoint.replicas.add(
            name=replica.name,
            address=replica.address,
            state=_STATES.get(replica.state, pb.REPLICA_STATE_UNSPECIFIED),
            digest=replica.digest,
            detail=replica.detail,
            metrics_address=replica.metrics,
        )
        score = scores.get((replica.name, replica.digest))
        if score is not None and replica.state == "READY":
            seen.kl_divergence = score.kl_divergence
            seen.top1_agreement = score.top1_agreement
    endpoint.ready_replicas = len(observed.ready(endpoint.spec.model))
    if observed.elastic:
        endpoint.desired_replicas = max(endpoint.desired_replicas, observed.scaled_to)
    return endpoint


def endpoint_figures(endpoint: pb.Endpoint) -> EndpointFigures:
    """The numbers of an endpoint; of several replicas the worst."""
    live = [r for r in endpoint.replicas if r.HasField("kl_divergence")]
    return EndpointFigures(
        endpoint.name,
        endpoint.spec.model,
        endpoint.run,
        endpoint.desired_replicas,
        endpoint.ready_replicas,
        max((r.kl_divergence for r in live), default=None),
        min((r.top1_agreement for r in live), default=None),
    )


def shortage(record: EndpointRecord, observed: Observed) -> str:
    """How many replicas are ready, of how many, and what the failed ones said."""
    ready = len(observed.ready(record.endpoint.spec.model))
    model = record.endpoint.spec.model
    details = [f"{r.name}: {r.detail}" for r in observed.replicas if r.detail and r.digest == model]
    said = f" ({'; '.join(details)})" if details else ""
    return f"{ready} of {record.endpoint.desired_replicas} replicas are ready{said}"
