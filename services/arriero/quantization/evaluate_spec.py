"""The spec of `evaluate`: checks, defaults, and what the work will need.

Responsibility: from a spec as somebody wrote it to one with nothing left open.
Does not know how anything is measured.
"""

from __future__ import annotations

import math

from arriero.errors import FailedPrecondition, InvalidArgument, NotFound
from arriero.operations.defaults import with_defaults
from arriero.operations.kinds import ResolveContext, Resolved
from arriero.store import Artifact
from arriero.store.files import sha256_file
from arriero.v1 import quantization_pb2 as pb

# Smaller windows leave next to nothing before the tokens that are scored.
MIN_CONTEXT, MAX_CONTEXT = 8, 1 << 20
# Log-probabilities of a reference, as the job keeps them (`evaluate.REFERENCE_BYTES`).
_REFERENCE_DISK = 1 << 30


def resolve_evaluate(spec: pb.EvaluateSpec, context: ResolveContext) -> Resolved:
    """Check an `evaluate` spec; golden report and the text's digest come out named.

    Raises:
        InvalidArgument: no files, repeated ones, a limit that is no limit, a text
            that may not be read or is another one, fields that do not go together.
        NotFound: the text is not there.
        FailedPrecondition: nothing to compare the files with.
    """
    resolved = _checked(spec, context)
    files = context.inputs["models"]
    if not spec.HasField("golden") and (carried := _carried(files, context)):
        resolved.golden = carried
    text_or_rows = bool(spec.text or spec.dataset)
    if not resolved.golden and not text_or_rows:
        first = files[0].manifest
        raise FailedPrecondition(
            f"gguf {first.name or files[0].digest} carries no golden logits; name the report of "
            "the training or merge that made the model in the field golden, such as golden: "
            "train.golden, or measure perplexity on a text or a dataset",
            reason="NO_GOLDEN",
        )
    if spec.HasField("choose") and not resolved.golden and not spec.HasField("reference"):
        raise FailedPrecondition(
            "choose goes by the KL divergence, and there is neither golden logits nor a "
            "reference to compute it against; name one of them",
            reason="NO_GOLDEN",
        )
    if not spec.text:
        resolved.ClearField("context")
    if not text_or_rows:
        resolved.ClearField("chunks")
    running = [*files, *context.inputs.get("reference", [])]
    largest = max(artifact.manifest.size for artifact in running)
    disk = _REFERENCE_DISK if spec.HasField("reference") and text_or_rows else 0
    return Resolved(
        spec=resolved,
        disk_bytes=(1 << 20) + disk,
        memory_bytes=(1 << 30) + 2 * largest,
        # Its digest says what it holds; where it lies changes nothing.
        unkeyed=("text",),
    )


def check_evaluate(spec: pb.EvaluateSpec, context: ResolveContext) -> None:
    """Refuse what is wrong whatever the files are; raises as `resolve_evaluate`."""
    _checked(spec, context)


def _checked(spec: pb.EvaluateSpec, context: ResolveContext) -> pb.EvaluateSpec:
    resolved = with_defaults(spec)
    if not spec.models:
        raise InvalidArgument.field("models", "empty; expected at least one gguf")
    seen: dict[str, int] = {}
    for i, digest in enumerate(spec.models):
        if digest in seen:
            raise InvalidArgument.field(
                f"models[{i}]", f"is the same artifact as models[{seen[digest]}]"
            )
        seen[digest] = i
    if spec.text and spec.dataset:
        raise InvalidArgument.field(
            "text", "is given beside dataset; expected one thing to measure perplexity on"
        )
    if spec.HasField("context") and not spec.text:
        raise InvalidArgument.field("context", "is only used with text")
    if spec.HasField("sha256") and not spec.text:
        raise InvalidArgument.field("sha256", "is only used with text")
    if spec.HasField("chunks") and not (spec.text or spec.dataset):
        raise InvalidArgument.field("chunks", "is only used with text or dataset")
    if not MIN_CONTEXT <= resolved.context <= MAX_CONTEXT:
        raise InvalidArgument.field(
            "context", f"is {resolved.context}; expected {MIN_CONTEXT} to {MAX_CONTEXT} tokens"
        )
    if resolved.chunks < 0:
        raise InvalidArgument.field("chunks", f"is {resolved.chunks}; expected 0 (all) or more")
    if spec.HasField("choose"):
        if not spec.choose.HasField("smallest"):
            raise InvalidArgument.field("choose", "names no rule; expected smallest")
        max_kld = resolved.choose.smallest.max_kld
        if not (math.isfinite(max_kld) and max_kld > 0):
            raise InvalidArgument.field(
                "choose.smallest.max_kld", f"is {max_kld}; expected a positive number of nats"
            )
    if spec.text:
        _check_text(spec, resolved, context)
    return resolved


def _check_text(spec: pb.EvaluateSpec, resolved: pb.EvaluateSpec, context: ResolveContext) -> None:
    """Name the text by its path and its digest."""
    path = context.sources.check(spec.text, field="text")
    if not path.is_file():
        raise InvalidArgument.field("text", f"{spec.text!r} is not a file of text")
    size, found = sha256_file(path)
    if not size:
        raise InvalidArgument.field("text", f"{spec.text!r} is empty")
    wanted = spec.sha256.removeprefix("sha256:").lower()
    if wanted and wanted != found:
        raise InvalidArgument.field(
            "sha256", f"{spec.text} has sha256:{found}, expected sha256:{wanted}"
        )
    resolved.text, resolved.sha256 = str(path), f"sha256:{found}"


def _carried(files: list[Artifact], context: ResolveContext) -> str:
    """The golden logits that the files carry; empty if the first has none in the store.

    Raises:
        FailedPrecondition: the files carry different ones.
    """
    golden = files[0].manifest.golden or ""
    for i, artifact in enumerate(files):
        if golden and artifact.manifest.golden not in (golden, None):
            raise FailedPrecondition(
                f"models[{i}] carries other golden logits than models[0]: they are files of "
                "different models; evaluate them apart, or name in golden what both should equal"
            )
    try:
        return context.store.get(golden).digest if golden else ""
    except NotFound:
        return ""
