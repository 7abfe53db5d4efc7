"""From a request to work that is fit to be done: checked, resolved, priced, keyed.

Responsibility: everything about a spec that comes before an operation exists.
Does not know operations, nor whether the work runs already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import Message

from arriero import refs
from arriero.errors import Internal, InvalidArgument
from arriero.gates import GateResult
from arriero.operations.handoff import canonical, to_json
from arriero.operations.inputs import check_gates, check_inputs, input_fields, result_key
from arriero.operations.kinds import ResolveContext, Resolved, WorkKind
from arriero.settings import SourceSettings
from arriero.store import Artifact, Store
from arriero.v1 import types_pb2

_LONGEST_ID = 256


@dataclass(frozen=True)
class Work:
    """Work that may be done. `inputs` are digests by field, of the resolved spec."""

    kind: WorkKind
    resolved: Resolved
    inputs: dict[str, list[str]]
    key: str


def resolve(kind: WorkKind, spec: Message, store: Store, sources: SourceSettings) -> Work:
    """Check a spec's inputs and gates, let the room resolve it, compute its key. Blocks.

    Raises:
        ArrieroError: whatever is wrong with the request, before anything is done.
    """
    if not isinstance(spec, kind.spec_type):
        raise Internal(f"{kind.name} takes {kind.spec_type.__name__}, got {type(spec).__name__}")
    check_gates(spec)
    if kind.check is not None:
        kind.check(spec, ResolveContext(store, {}, sources))
    inputs = check_inputs(spec, store)
    resolved = kind.resolve(spec, ResolveContext(store, inputs, sources))
    # The room may have chosen inputs by default.
    chosen = check_inputs(resolved.spec, store)
    digests = {name: [artifact.digest for artifact in found] for name, found in chosen.items()}
    return Work(kind, resolved, digests, result_key(kind, resolved))


def named_digests(spec: Message) -> list[str]:
    """The digests that a spec's input fields hold, not looked at any further."""
    found: list[str] = []
    for field, _ in input_fields(spec):
        value = getattr(spec, field.name)
        found += [value] if isinstance(value, str) else value
    return [item for item in found if refs.is_digest(item)]


def check_context(context: types_pb2.StageContext) -> None:
    """Refuse what could not be recorded.

    Raises:
        InvalidArgument: an id, name or owner that is too long.
    """
    for name in ("request_id", "run", "stage", "owner"):
        length = len(getattr(context, name))
        if length > _LONGEST_ID:
            raise InvalidArgument.field(
                f"context.{name}", f"has {length} characters, expected at most {_LONGEST_ID}"
            )


def operation_id(service: str, request_id: str) -> str:
    """The id of the operation that answers a request; the same after a restart."""
    return hashlib.sha256(f"{service}\0{request_id}".encode()).hexdigest()[:20]


def request_digest(kind: str, spec: Message, context: types_pb2.StageContext) -> str:
    """Tells one request from another; who asks and for which run does not matter."""
    data = {"kind": kind, "spec": to_json(spec), "force": context.force}
    return hashlib.sha256(canonical(data)).hexdigest()


@dataclass(frozen=True)
class Known:
    """A result that the store has: artifacts by output name, in order."""

    artifacts: Mapping[str, Artifact]
    gates: tuple[GateResult, ...]


def known_result(store: Store, service: str, work: Work, *, force: bool) -> Known | None:
    """The store's result of the same work, unless it may not be used."""
    if force or not work.resolved.cacheable:
        return None
    result = store.get_result(service, work.key)
    if result is None:
        return None
    artifacts = {name: store.get(digest) for name, digest in result.outputs.items()}
    return Known(artifacts, result.gates)
