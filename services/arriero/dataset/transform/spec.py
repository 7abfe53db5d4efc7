"""What a transform spec means: defaults, checks, and what its sources are.

Responsibility: resolve a `TransformSpec` before anything is asked. Does not
know how answers are got.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from arriero.dataset import rows, sources
from arriero.dataset.spec import check_digests
from arriero.errors import FieldViolation, InvalidArgument
from arriero.gates import check_modes
from arriero.operations.defaults import with_defaults
from arriero.operations.kinds import ResolveContext, Resolved
from arriero.prompts import sandbox
from arriero.settings import SourceSettings, check_secret_name
from arriero.v1 import dataset_pb2

__all__ = ["ROW", "SEMANTICS", "check", "fields_of", "resolve"]

# Raised by hand when the same spec would ask for, or make, something else.
SEMANTICS = 1
# The prompt's variable that holds the whole row.
ROW = "row"
# Rows that are looked at for the fields that the prompt names.
_LOOKED_AT = 100
_RANGES = (
    ("concurrency", 1, 1024),
    ("requests_per_minute", 0, 1_000_000),
    ("tokens_per_minute", 0, 2_000_000_000),
    ("max_tokens", 1, 1 << 20),
    ("max_retries", 0, 100),
    ("timeout_seconds", 1, 24 * 3600),
    ("temperature", 0, 10),
    ("max_failed_share", 0, 1),
    ("max_rows", 0, 1 << 62),
)


def resolve(spec: dataset_pb2.TransformSpec, context: ResolveContext) -> Resolved:
    """Fill in defaults and check everything that can be checked quickly.

    Raises:
        InvalidArgument: a field is wrong, a source or the endpoint is not allowed, the
            prompt is no template or names fields that no row has.
        NotFound: a source does not exist.
    """
    resolved = with_defaults(spec)
    _check(resolved, context.sources)
    located = sources.locate_all(
        resolved.sources, context.inputs.get("rows", []), context.store, context.sources
    )
    located = sources.look_up(located, None)
    own = located[: len(resolved.sources)]
    _check_prompt_fields(resolved, located)
    del resolved.sources[:]
    resolved.sources.extend(source.text for source in own)
    digests = check_digests(own, resolved.sha256)
    del resolved.sha256[:]
    resolved.sha256.extend(digests)
    size = sum(source.size for source in located)
    return Resolved(
        spec=resolved,
        fingerprints=sources.identities(own),
        # The rows again with their answers, and the log of answers, which may be as long.
        disk_bytes=8 * size + (1 << 20),
        memory_bytes=(256 << 20) + size // 8,
        # Nothing of how it is asked changes what is asked. `max_failed_share` is among
        # them, so that raising it finds the answers that were paid for.
        unkeyed=(
            "sources",
            "concurrency",
            "requests_per_minute",
            "tokens_per_minute",
            "max_retries",
            "timeout_seconds",
            "max_failed_share",
            "api_key_secret",
        ),
    )


def check(spec: dataset_pb2.TransformSpec, context: ResolveContext) -> None:
    """Refuse what is wrong whatever the rows of other stages are; raises as `resolve`."""
    filled = with_defaults(spec)
    _check(filled, context.sources)
    located = sources.locate_all(filled.sources, (), context.store, context.sources)
    if not filled.rows:
        _check_prompt_fields(filled, located)


def fields_of(value: Any) -> dict[str, Any] | None:
    """A row's fields; None when it has none."""
    if isinstance(value, str):
        return {"text": value}
    return value if isinstance(value, dict) else None


def _check(spec: dataset_pb2.TransformSpec, allowed: SourceSettings) -> None:
    check_modes(spec.gates)
    problems: list[FieldViolation] = []

    def refuse(field: str, description: str) -> None:
        problems.append(FieldViolation(field, description))

    if not spec.sources and not spec.rows:
        refuse("sources", "empty; expected files or directories of rows, or a stage in rows")
    for name in ("endpoint", "model", "prompt"):
        if not getattr(spec, name).strip():
            refuse(name, "is not set; a model behind an endpoint is prompted with each row")
    for name, low, high in _RANGES:
        value = getattr(spec, name)
        if not low <= value <= high:
            refuse(name, f"{value:g}; expected {low} to {high}")
    names = list(spec.fields)
    if len(set(names)) != len(names) or not all(name.strip() for name in names):
        refuse("fields", f"{', '.join(names)}; expected names of fields, each once")
    for name, attempt in (
        ("endpoint", lambda text: allowed.check_url(text, field="endpoint")),
        ("api_key_secret", lambda text: check_secret_name(text, field="api_key_secret")),
        ("prompt", _compile),
    ):
        try:
            if value := getattr(spec, name):
                attempt(value)
        except InvalidArgument as error:
            problems.extend(error.violations)
    if problems:
        raise InvalidArgument(
            "; ".join(f"{item.field}: {item.description}" for item in problems),
            violations=problems,
        )


def _compile(prompt: str) -> None:
    try:
        sandbox.compile_source(prompt)
    except InvalidArgument as error:
        raise InvalidArgument.field("prompt", error.violations[0].description) from None


def _check_prompt_fields(
    spec: dataset_pb2.TransformSpec, located: Sequence[sources.Source]
) -> None:
    """Refuse a prompt that names fields which none of the first rows has: it would say less."""
    if not all(source.here for source in located):
        return
    wanted = sandbox.variables_of(spec.prompt) - {ROW}
    present: set[str] = set()
    for value in itertools.islice(_values(located), _LOOKED_AT):
        present.update(fields_of(value) or ())
    if missing := sorted(wanted - present):
        raise InvalidArgument.field(
            "prompt",
            f"names {', '.join(missing)}, which none of the first rows has; "
            f"they have: {', '.join(sorted(present)) or 'no fields'}",
        )


def _values(located: Sequence[sources.Source]) -> Iterator[Any]:
    for source in located:
        for file in source.files:
            for row in rows.read(file.path, file.name):
                yield row.value
