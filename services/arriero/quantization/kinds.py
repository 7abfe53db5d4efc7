"""The room's kinds of work: checking specs and filling in their defaults.

Responsibility: from a spec as somebody wrote it to one with nothing left open.
Does not know how the work is done.
"""

from __future__ import annotations

from arriero.errors import InvalidArgument, NotFound
from arriero.llama import expected_size, resolve_type
from arriero.operations.defaults import with_defaults
from arriero.operations.kinds import ResolveContext, Resolved, WorkKind
from arriero.quantization import converter
from arriero.quantization.checkpoint import read_checkpoint
from arriero.quantization.evaluate_spec import check_evaluate, resolve_evaluate
from arriero.v1 import quantization_pb2 as pb

_JOB_MODULE = "arriero.quantization.job"


def resolve_quantize(spec: pb.QuantizeSpec, context: ResolveContext) -> Resolved:
    """Check a `quantize` spec; types come out as llama.cpp writes them.

    Raises:
        InvalidArgument: no types, unknown or repeated ones, negative threads.
        FailedPrecondition: the converter is missing, or the model has no weights.
    """
    resolved = _checked_quantize(spec)
    converter.locate()
    model = context.inputs["model"][0]
    if not spec.HasField("golden") and model.manifest.golden:
        try:
            resolved.golden = context.store.get(model.manifest.golden).digest
        except NotFound:
            resolved.ClearField("golden")
    checkpoint = read_checkpoint(model.path)
    kinds = [resolve_type(name) for name in resolved.types]
    files = sum(expected_size(checkpoint.parameters, kind) for kind in kinds)
    return Resolved(
        spec=resolved,
        disk_bytes=checkpoint.size + files,
        # The quantizer holds its largest tensor in fp32 beside the source's and its
        # own pages; the converter's libraries take the rest.
        memory_bytes=(1 << 30) + 8 * checkpoint.largest,
        unkeyed=("threads",),
    )


def check_quantize(spec: pb.QuantizeSpec, context: ResolveContext) -> None:
    """Refuse what is wrong whatever the model is; raises as `resolve_quantize`."""
    _checked_quantize(spec)


def _checked_quantize(spec: pb.QuantizeSpec) -> pb.QuantizeSpec:
    resolved = with_defaults(spec)
    if not spec.types:
        raise InvalidArgument.field("types", "empty; expected at least one type, such as Q4_K_M")
    kinds = []
    seen: dict[str, int] = {}
    for i, text in enumerate(spec.types):
        kind = resolve_type(text, field=f"types[{i}]")
        if kind.name in seen:
            raise InvalidArgument.field(
                f"types[{i}]", f"{kind.name} is already there as types[{seen[kind.name]}]"
            )
        seen[kind.name] = i
        kinds.append(kind)
    resolved.types[:] = [kind.name for kind in kinds]
    if spec.threads < 0:
        raise InvalidArgument.field("threads", f"is {spec.threads}; expected 0 (all) or more")
    return resolved


WORK_KINDS = (
    WorkKind(
        name="quantize",
        job_module=_JOB_MODULE,
        spec_type=pb.QuantizeSpec,
        semantics=1,
        resolve=resolve_quantize,
        check=check_quantize,
    ),
    WorkKind(
        name="evaluate",
        job_module=_JOB_MODULE,
        spec_type=pb.EvaluateSpec,
        semantics=2,
        resolve=resolve_evaluate,
        check=check_evaluate,
    ),
)
