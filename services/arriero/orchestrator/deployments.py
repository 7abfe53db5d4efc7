"""What may be deployed: a deployment's spec against the store.

Responsibility: defaults, field checks, and that model and golden logits are
there, of the right kind and not quarantined. Does not know endpoints.
"""

from __future__ import annotations

from arriero import refs
from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.gates import check_modes, remedy
from arriero.operations.defaults import with_defaults
from arriero.replica import ReplicaSettings
from arriero.store import Artifact, Store
from arriero.v1 import pipeline_pb2

MAX_REPLICAS = 256


def check_spec(spec: pipeline_pb2.DeploySpec) -> None:
    """What is wrong with a deployment, whatever the store holds.

    Raises:
        InvalidArgument: with field paths relative to the spec.
    """
    if not refs.is_name(spec.endpoint):
        raise InvalidArgument.field(
            "endpoint",
            f"{spec.endpoint!r} is not an endpoint name; expected lower case letters, digits, "
            "'.', '_' and '-'",
        )
    check_replicas(spec.replicas)
    ReplicaSettings.of_spec(with_defaults(spec))
    if spec.HasField("timeout_seconds") and spec.timeout_seconds < 1:
        raise InvalidArgument.field("timeout_seconds", f"{spec.timeout_seconds} is below 1")
    check_modes(spec.gates)


def check_replicas(count: int) -> None:
    """Refuse what is no number of replicas.

    Raises:
        InvalidArgument: on field `replicas`.
    """
    if not 0 <= count <= MAX_REPLICAS:
        raise InvalidArgument.field("replicas", f"{count} is not between 0 and {MAX_REPLICAS}")


class Deployments:
    """Deployments of the artifacts of one store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def resolve(self, spec: pipeline_pb2.DeploySpec) -> pipeline_pb2.DeploySpec:
        """Defaults filled in, model and golden as digests of what may be served. Blocks.

        Raises:
            InvalidArgument: no model, or an artifact of another kind.
            NotFound: no such artifact.
            FailedPrecondition: it is quarantined.
        """
        model = self._artifact(spec.model, "gguf", "model")
        golden = spec.golden or model.manifest.golden or ""
        if golden:
            golden = self._artifact(golden, "report", "golden").digest
        resolved = with_defaults(spec)
        resolved.model = model.digest
        resolved.golden = golden
        return resolved

    def _artifact(self, ref: str, kind: str, field: str) -> Artifact:
        if not ref:
            raise InvalidArgument.field(field, f"is missing; expected a {kind}")
        artifact = self._store.get(ref, wait=5 if refs.is_digest(ref) else 0)
        if artifact.manifest.kind != kind:
            raise InvalidArgument.field(
                field, f"{ref} is of kind {artifact.manifest.kind}; expected {kind}"
            )
        if artifact.quarantined:
            raise FailedPrecondition(
                f"{field}: {kind} {artifact.digest} is quarantined by "
                f"{', '.join(artifact.manifest.failed_gates)}, it can't be deployed; "
                f"{remedy(artifact.manifest.failed_gates)}",
                reason="QUARANTINED",
            )
        return artifact
