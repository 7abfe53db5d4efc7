"""What a dataset spec means: defaults, checks, and what its sources are.

Responsibility: resolve a `DatasetSpec` before any work starts. Does not know
how rows become tokens.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

from arriero import prompts
from arriero.dataset import formats, preparation, rows, selection, sources
from arriero.dataset.batches import EXACT, NEAR, NONE
from arriero.dataset.encoding import OVER_LENGTH, template_of
from arriero.dataset.vocabulary import special_tokens
from arriero.errors import FieldViolation, InvalidArgument
from arriero.gates import check_modes
from arriero.operations.defaults import with_defaults
from arriero.operations.kinds import ResolveContext, Resolved
from arriero.prompts import EOS
from arriero.settings import check_secret_name, secret
from arriero.v1 import dataset_pb2

FAIL, SKIP = "fail", "skip"
# Raised by hand when the same spec would give other rows, ids or labels.
SEMANTICS = 2
MIN_CUTOFF, MAX_CUTOFF = 8, 1 << 20
MAX_WEIGHT = 1000
# Below, two rows on one subject are as near as two that say the same.
LEAST_SIMILARITY = 0.3
# Sources up to this size are read through at once, so that malformed JSON is
# refused before any work starts; larger ones are by the job.
_PRECHECK_BYTES = 32 * 1024 * 1024
# The job, and a process for each core.
_MEMORY_BYTES = 1 << 30
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
    located = sources.look_up(_check(resolved, context), hub_token(resolved))
    _check_template(resolved, context)
    del resolved.sources[:]
    resolved.sources.extend(source.text for source in located)
    digests = check_digests(located, resolved.sha256)
    del resolved.sha256[:]
    resolved.sha256.extend(digests)
    stored = sources.locate_all((), context.inputs.get("rows", ()), context.store, None)
    size = sum(source.size for source in [*located, *stored])
    often = max([1.0, *resolved.source_weights])
    remote = sources.identities(located)
    return Resolved(
        spec=resolved,
        fingerprints=remote,
        # int32 ids in the spool, ids and labels in the file: 12 bytes for a token
        # of about 3 bytes of text; twice that for texts that tokenize badly.
        disk_bytes=int((8 * often + (1 if remote else 0)) * size) + (1 << 20),
        # Rows are never held in memory, only arrays about them.
        memory_bytes=_MEMORY_BYTES + size // 64,
        # The digests say what the sources hold; where they lie changes nothing.
        unkeyed=("sources", "num_proc", "token_secret"),
    )


def check(spec: dataset_pb2.DatasetSpec, context: ResolveContext) -> None:
    """Refuse what is wrong whatever the tokenizer is; raises as `resolve`."""
    _check(with_defaults(spec), context)


def _check(spec: dataset_pb2.DatasetSpec, context: ResolveContext) -> list[sources.Source]:
    check_modes(spec.gates)
    _check_fields(spec)
    if spec.token_secret:
        check_secret_name(spec.token_secret, field="token_secret")
    _check_template_file(spec, context)
    located = [
        sources.locate(text, store=context.store, allowed=context.sources, field=f"sources[{i}]")
        for i, text in enumerate(spec.sources)
    ]
    here = all(source.here for source in located)
    if here and sum(source.size for source in located) <= _PRECHECK_BYTES:
        _check_rows(located, spec)
    return located


def _check_template_file(spec: dataset_pb2.DatasetSpec, context: ResolveContext) -> None:
    """A template's name, or the file that a path leads to, with its digest."""
    if not prompts.is_path(spec.template):
        if spec.template_sha256:
            raise InvalidArgument.field("template_sha256", "is only used with the path of a file")
        if spec.template != prompts.MODEL:
            prompts.load(spec.template)
        return
    spec.template = str(context.sources.check(spec.template, field="template"))
    prompts.load(spec.template)
    spec.template_sha256 = check_template_digest(spec.template, spec.template_sha256)


def check_template_digest(path: str, expected: str) -> str:
    """The digest of a template's file, compared with what it must be where that is given.

    Raises:
        InvalidArgument: other bytes.
    """
    found = "sha256:" + hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if expected and expected.removeprefix("sha256:").lower() != found.removeprefix("sha256:"):
        raise InvalidArgument.field(
            "template_sha256",
            f"{path} has {found}, expected {expected}: the file changed; start again with what "
            "it holds now, or restore it",
        )
    return found


def hub_token(spec: dataset_pb2.DatasetSpec) -> str | None:
    """The hub's token; None where none is named.

    Raises:
        InvalidArgument: this is no name of a secret.
        FailedPrecondition: the environment has no such secret.
    """
    return secret(spec.token_secret, field="token_secret") if spec.token_secret else None


def check_digests(located: Sequence[sources.Source], expected: Sequence[str]) -> list[str]:
    """The digests of the sources, compared with what they must be where that is given.

    Of a remote source that was not fetched it is what was given, or empty.

    Raises:
        InvalidArgument: another number of digests, or other bytes.
    """
    if expected and len(expected) != len(located):
        raise InvalidArgument.field(
            "sha256", f"{len(expected)} digests for {len(located)} sources; expected one each"
        )
    given = list(expected) or [""] * len(located)
    found = [
        sources.digest(source) if source.here else wanted
        for source, wanted in zip(located, given, strict=True)
    ]
    for i, (wanted, actual) in enumerate(zip(given, found, strict=True)):
        if wanted and wanted.removeprefix("sha256:").lower() != actual.removeprefix("sha256:"):
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

    if not spec.sources and not spec.rows:
        refuse(
            "sources",
            "empty; expected at least one file, directory or dataset/name:tag, or a stage in rows",
        )
    for field, value, choices in (
        ("format", spec.format, (formats.AUTO, *formats.FIELDS)),
        ("on_bad_row", spec.on_bad_row, (FAIL, SKIP)),
        ("over_length", spec.over_length, OVER_LENGTH),
        ("dedup", spec.dedup, (NONE, EXACT, NEAR)),
    ):
        if value not in choices:
            near = difflib.get_close_matches(value, choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            refuse(field, f"{value!r} is unknown; expected {' or '.join(choices)}{hint}")
    for field, share in (
        ("dedup_threshold", spec.dedup_threshold),
        ("max_truncated_share", spec.max_truncated_share),
    ):
        if not 0 <= share <= 1:
            refuse(field, f"{share:g}; expected a share from 0 to 1")
    if spec.dedup == NEAR and spec.dedup_threshold < LEAST_SIMILARITY:
        refuse(
            "dedup_threshold",
            f"{spec.dedup_threshold:g} would make all rows one; expected {LEAST_SIMILARITY} to 1",
        )
    if spec.num_proc < 0:
        refuse("num_proc", f"{spec.num_proc}; expected a number of processes, or 0 for all CPUs")
    _check_weights(spec, refuse)
    _check_columns(spec, refuse)
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


def _check_weights(spec: dataset_pb2.DatasetSpec, refuse: Callable[[str, str], None]) -> None:
    weights, count = spec.source_weights, len(spec.sources) + len(spec.rows)
    if weights and len(weights) != count:
        refuse(
            "source_weights",
            f"{len(weights)} weights for {count} sources; expected one for each of sources and "
            "then rows",
        )
    for number, weight in enumerate(weights):
        if not 0 <= weight <= MAX_WEIGHT:
            refuse(f"source_weights[{number}]", f"{weight:g}; expected 0 to {MAX_WEIGHT}")
    if weights and not any(weights):
        refuse("source_weights", "are all 0, which takes no row")


def _check_columns(spec: dataset_pb2.DatasetSpec, refuse: Callable[[str, str], None]) -> None:
    names = formats.FIELDS.get(spec.format)
    known = names or tuple(dict.fromkeys(chain.from_iterable(formats.FIELDS.values())))
    for key in spec.columns:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            refuse(
                f"columns[{key!r}]",
                f"is no field of format {spec.format}; expected {', '.join(known)}{hint} "
                "(the format's field first, then its name in the rows)",
            )


def _check_template(spec: dataset_pb2.DatasetSpec, context: ResolveContext) -> None:
    directory = context.inputs["tokenizer"][0].outline
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
    if spec.rows:
        return
    if count == 0:
        raise InvalidArgument.field("sources", NO_ROWS)
    if spec.max_rows:
        count = min(count, spec.max_rows)
    if not spec.source_weights:
        selection.held_out(count, spec.val_set_size)
    preparation.formats_of(located, spec.format, dict(spec.columns))


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
