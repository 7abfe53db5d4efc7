"""A spec's artifacts, and the key of its result.

Responsibility: read the `(arriero.v1.input)` options, check what the fields
name, and compute result keys. Does not know any room's spec.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf.message import Message

from arriero import refs
from arriero.errors import FailedPrecondition, InvalidArgument, NotFound
from arriero.gates import check_modes, remedy
from arriero.operations.handoff import canonical, to_json
from arriero.operations.kinds import Resolved, WorkKind
from arriero.store import Artifact, Store
from arriero.v1 import types_pb2

# Reason of a refusal that says no more than that an input is not made yet.
NO_DIGEST = "INPUT_IS_NO_DIGEST"


def input_fields(spec: Message) -> Iterator[tuple[Any, types_pb2.InputRule]]:
    """The top-level fields of a spec that name artifacts, with their rules."""
    for field in spec.DESCRIPTOR.fields:
        options = field.GetOptions()
        if options.HasExtension(types_pb2.input):
            yield field, options.Extensions[types_pb2.input]


def check_inputs(spec: Message, store: Store, *, wait: float = 0) -> dict[str, list[Artifact]]:
    """The artifacts of every input field; unset optional fields are left out.

    Args:
        spec: with digests in its input fields.
        store: where they must be.
        wait: seconds to look again for a digest that is not there yet (network
            filesystems show new entries late).

    Raises:
        InvalidArgument: a needed field is empty, a value is no digest, or the
            artifact is of a kind that the field does not accept.
        NotFound: the store has no such artifact.
        FailedPrecondition: it is quarantined.
    """
    found: dict[str, list[Artifact]] = {}
    for field, rule in input_fields(spec):
        for path, value in _values(spec, field):
            artifact = _check(path, value, rule, store, wait)
            found.setdefault(field.name, []).append(artifact)
    return found


def _values(spec: Message, field: Any) -> Iterator[tuple[str, str]]:
    value = getattr(spec, field.name)
    if field.is_repeated:
        for i, item in enumerate(value):
            yield f"{field.name}[{i}]", item
    elif field.has_presence and not spec.HasField(field.name):
        return
    else:
        yield field.name, value


def _check(path: str, value: str, rule: types_pb2.InputRule, store: Store, wait: float) -> Artifact:
    kinds = " or ".join(rule.kinds)
    if not value:
        raise InvalidArgument.field(path, f"is not set; expected the digest of a {kinds}")
    if not refs.is_digest(value):
        error = InvalidArgument.field(
            path, f"{value!r} is not a digest; expected sha256:<64 hex digits> of a {kinds}"
        )
        error.reason = NO_DIGEST
        raise error
    try:
        artifact = store.get(value, wait=wait)
    except NotFound as missing:
        raise missing.at(path) from None
    if rule.kinds and artifact.manifest.kind not in rule.kinds:
        raise InvalidArgument.field(
            path, f"{value} is a {artifact.manifest.kind}, expected a {kinds}"
        )
    if artifact.quarantined:
        gates = artifact.manifest.failed_gates
        raise FailedPrecondition(
            f"{artifact.manifest.kind} {value} is quarantined by {', '.join(gates)}; "
            f"{remedy(gates)}",
            reason="QUARANTINED",
            metadata={"subject": value},
        ).at(path)
    return artifact


def check_gates(spec: Message) -> None:
    """Refuse gates that do not exist, in specs that have a `gates` map.

    Raises:
        InvalidArgument: an unknown gate.
    """
    names: Mapping[str, int] = getattr(spec, "gates", {})
    check_modes(names)


def result_key(kind: WorkKind, resolved: Resolved) -> str:
    """Hexadecimal sha256 of what decides the result, and of nothing else."""
    spec = to_json(resolved.spec)
    for name in resolved.unkeyed:
        spec.pop(name, None)
    data = {
        "kind": kind.name,
        "semantics": kind.semantics,
        "spec": spec,
        "fingerprints": resolved.fingerprints,
    }
    return hashlib.sha256(canonical(data)).hexdigest()
