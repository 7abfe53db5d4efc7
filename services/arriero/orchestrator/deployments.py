"""What may be deployed: a deployment's spec against the store.

Responsibility: defaults, field checks, and that model and golden logits are
there, of the right kind and not quarantined. Does not know endpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from arriero import refs
from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.gates import check_modes, remedy
from arriero.llama.adapter_files import adapter_path
from arriero.operations.defaults import with_defaults
from arriero.replica import AdapterSettings, ReplicaSettings
from arriero.store import Artifact, Store
from arriero.v1 import inference_pb2, pipeline_pb2

MAX_REPLICAS = 256
# By llama.cpp and by transformers.
_SERVED = ("gguf", "model")


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


def _check_base(name: str, adapter: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """What their specs say of where both come from; the replica looks into the files."""
    theirs, ours = adapter.get("model"), model.get("model")
    if theirs and ours and theirs != ours:
        raise FailedPrecondition(
            f"adapter {name} belongs to {theirs}, and the model was made from {ours}; serve it on "
            "its own base, or merge it",
            reason="OTHER_BASE",
        )
    if both := set(adapter.get("adapters", ())).intersection(model.get("adapters", ())):
        raise FailedPrecondition(
            f"adapter {name} ({', '.join(sorted(both))}) is merged into the model already; serve "
            "a file that was made without it",
            reason="MERGED_ALREADY",
        )


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
        model = self._artifact(spec.model, _SERVED, "model")
        golden = spec.golden or model.manifest.golden or ""
        if golden:
            golden = self._artifact(golden, ("report",), "golden").digest
        resolved = with_defaults(spec)
        resolved.model = model.digest
        resolved.golden = golden
        for index, spec_of in enumerate(resolved.adapters):
            spec_of.CopyFrom(self.resolve_adapter(spec_of, model, f"adapters[{index}]"))
        ReplicaSettings.of_spec(resolved).backend_of(model.manifest.kind)
        return resolved

    def resolve_adapter(
        self, spec: inference_pb2.AdapterSpec, model: Artifact, field: str
    ) -> inference_pb2.AdapterSpec:
        """An adapter by digest and name, if it may be served beside a model. Blocks.

        Args:
            spec: as asked for.
            model: the gguf artifact.
            field: of the adapter, for errors.

        Raises:
            InvalidArgument, NotFound: no such adapter.
            FailedPrecondition: it is quarantined, no GGUF adapter, or another model's.
        """
        adapter = self._artifact(spec.adapter, ("adapter",), f"{field}.adapter")
        resolved = with_defaults(spec)
        resolved.adapter = adapter.digest
        resolved.name = spec.name or adapter.manifest.name
        AdapterSettings(resolved.name, resolved.adapter, resolved.scale).check(field)
        try:
            adapter_path(adapter.path, resolved.name)
            _check_base(resolved.name, adapter.manifest.spec, model.manifest.spec)
        except FailedPrecondition as error:
            raise error.at(f"{field}.adapter") from None
        return resolved

    def model(self, digest: str) -> Artifact:
        """The artifact that an endpoint serves. Blocks."""
        return self._artifact(digest, _SERVED, "model")

    def _artifact(self, ref: str, kinds: Sequence[str], field: str) -> Artifact:
        expected = " or ".join(kinds)
        if not ref:
            raise InvalidArgument.field(field, f"is missing; expected a {expected}")
        artifact = self._store.get(ref, wait=5 if refs.is_digest(ref) else 0)
        kind = artifact.manifest.kind
        if kind not in kinds:
            raise InvalidArgument.field(field, f"{ref} is of kind {kind}; expected {expected}")
        if artifact.quarantined:
            raise FailedPrecondition(
                f"{field}: {kind} {artifact.digest} is quarantined by "
                f"{', '.join(artifact.manifest.failed_gates)}, it can't be deployed; "
                f"{remedy(artifact.manifest.failed_gates)}",
                reason="QUARANTINED",
            )
        return artifact
