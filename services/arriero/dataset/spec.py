"""What a dataset spec means: defaults, checks, and what its sources are.

Responsibility: resolve a `DatasetSpec` before any work starts. Does not know
how rows become tokens.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from arriero import prompts
from arriero.dataset import alpaca, rows, selection, sources
from arriero.dataset.encoding import shipped_template, template_of
from arriero.dataset.vocabulary import special_tokens
from arriero.errors import FieldViolation, InvalidArgument
from arriero.gates import check_modes
from arriero.operations.defaults import with_defaults
from arriero.operations.kinds import ResolveContext, Resolved
from arriero.prompts import EOS
from arriero.v1 import dataset_pb2

FAIL, SKIP = "fail", "skip"
# Raised by hand when the same spec would give other rows, ids or labels.
SEMANTICS = 1
MIN_CUTOFF, MAX_CUTOFF = 8, 1 << 20
# Sources up to this size are read through at once, so that malformed JSON is
# refused before any work starts; larger ones are by the job.
_PRECHECK_BYTES = 32 * 1024 * 1024
NO_ROWS = "the sources hold no rows; expected a JSON array of objects, or one object per line"


def resolve(spec: dataset_pb2.DatasetSpec, context: ResolveContext) -> Resolved:
    """Fill in defaults and check everything that can be checked quickly.

    Raises:
        InvalidArgument: a field is wrong, a source is not allowed, malformed or
            empty, the template is unknown or does not fit.
        NotFound: a source does not exist.
        FailedPrecondition: the tokenizer's files are not usable, a source is quarantined.
    """
    resolved = with_defaults(spec)
    located = _check(resolved, context)
    _check_template(resolved, context)
    del resolved.sources[:]
    resolved.sources.extend(source.text for source in located)
    digests = check_digests(located, resolved.sha256)
    del resolved.sha256[:]
    resolved.sha256.extend(digests)
    size = sum(source.size for source in located)
    return Resolved(
        spec=resolved,
        # int32 ids in the spool, ids and labels in the file: 12 bytes for a token
        # of about 3 bytes of text; twice that for texts that tokenize badly.
        disk_bytes=8 * size + (1 << 20),
        memory_bytes=(512 << 20) + size // 4,
        # The digests say what the sources hold; where they lie changes nothing.
        unkeyed=("sources",),
    )


def check(spec: dataset_pb2.DatasetSpec, context: ResolveContext) -> None:
    """Refuse what is wrong whatever the tokenizer is; raises as `resolve`."""
    _check(with_defaults(spec), context)


def _check(spec: dataset_pb2.DatasetSpec, context: ResolveContext) -> list[sources.Source]:
    check_modes(spec.gates)
    _check_fields(spec)
    if spec.template != prompts.MODEL:
        shipped_template(spec.template)
    located = [
        sources.locate(text, store=context.store, allowed=context.sources, field=f"sources[{i}]")
        for i, text in enumerate(spec.sources)
    ]
    if sum(source.size for source in located) <= _PRECHECK_BYTES:
        _check_rows(located, spec)
    return located


def check_digests(located: Sequence[sources.Source], expected: Sequence[str]) -> list[str]:
    """The digests of the sources, compared with what they must be where that is given.

    Raises:
        InvalidArgument: another number of digests, or other bytes.
    """
    if expected and len(expected) != len(located):
        raise InvalidArgument.field(
            "sha256", f"{len(expected)} digests for {len(located)} sources; expected one each"
        )
    found = [sources.digest(source) for source in located]
    for i, (wanted, actual) in enumerate(zip(expected, found, strict=False)):
        if wanted.removeprefix("sha256:").lower() != actual.removeprefix("sha256:"):
            raise InvalidArgument.field(
                f"sha256[{i}]",
                f"{located[i].text} has {actual}, expected {wanted}: the source changed; "
                "start again with what it holds now, or restore it",
            )
    return found


def _check_fields(spec: dataset_pb2.DatasetSpec) -> None:
    problems: list[FieldViolation] = []

    def refuse(field: str, description: str) -> None:
        problems.append(FieldViolation(field, description))

    if not spec.sources:
        refuse("sources", "empty; expected at least one file, directory or dataset/name:tag")
    for field, value, choices in (
        ("format", spec.format, (alpaca.FORMAT,)),
        ("on_bad_row", spec.on_bad_row, (FAIL, SKIP)),
    ):
        if value not in choices:
            near = difflib.get_close_matches(value, choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            refuse(field, f"{value!r} is unknown; expected {' or '.join(choices)}{hint}")
    if not MIN_CUTOFF <= spec.cutoff_len <= MAX_CUTOFF:
        refuse("cutoff_len", f"{spec.cutoff_len}; expected {MIN_CUTOFF} to {MAX_CUTOFF} tokens")
    if spec.max_rows < 0:
        refuse("max_rows", f"{spec.max_rows}; expected a number of rows, or 0 for all")
    try:
        selection.check_val_set_size(spec.val_set_size)
    except InvalidArgument as error:
        problems.extend(error.violations)
    if problems:
        raise InvalidArgument(
            "; ".join(f"{item.field}: {item.description}" for item in problems),
            violations=problems,
        )


def _check_template(spec: dataset_pb2.DatasetSpec, context: ResolveContext) -> None:
    directory = context.inputs["tokenizer"][0].path
    tokens = special_tokens(directory)
    template = template_of(spec.template, directory)
    bound = template.bind(bos_token=tokens.bos, eos_token=tokens.eos)
    if spec.add_eos_token and bound.end_of_turn == EOS and not tokens.eos:
        raise InvalidArgument.field(
            "add_eos_token",
            "the tokenizer has no EOS token to end rows with; expected one in its "
            "tokenizer_config.json, or add_eos_token: false",
        )


def _check_rows(located: Sequence[sources.Source], spec: dataset_pb2.DatasetSpec) -> None:
    count = sum(_count(source, f"sources[{i}]") for i, source in enumerate(located))
    if count == 0:
        raise InvalidArgument.field("sources", NO_ROWS)
    if spec.max_rows:
        count = min(count, spec.max_rows)
    selection.held_out(count, spec.val_set_size)


def _count(source: sources.Source, field: str) -> int:
    """Rows of a source; all of its JSON is read."""
    try:
        return sum(1 for file in source.files for _ in rows.read(file.path, file.name))
    except InvalidArgument as error:
        said = [FieldViolation(field, item.description) for item in error.violations]
        raise InvalidArgument(
            f"{field}: {said[0].description}",
            violations=said,
            reason=error.reason,
            metadata=error.metadata,
        ) from None
