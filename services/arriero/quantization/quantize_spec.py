"""The spec of `quantize`: checks, defaults, and what the work will need.

Responsibility: from a spec as somebody wrote it to one with nothing left open.
Does not know how the work is done.
"""

from __future__ import annotations

import math
import re

from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.llama import expected_size, resolve_tensor_type, resolve_type
from arriero.operations.defaults import with_defaults
from arriero.operations.kinds import ResolveContext, Resolved
from arriero.quantization import adapter_file, bnb, converter
from arriero.quantization.checkpoint import Checkpoint, read_checkpoint
from arriero.quantization.golden import carried
from arriero.v1 import quantization_pb2 as pb
from arriero.weights import LoraAdapter, MergedWeights

_METHODS = ("auto", "onepass", "reference")
# What Python's patterns have and those of C++'s std::regex, which llama.cpp takes, have not.
_NOT_ECMASCRIPT = re.compile(r"(?<!\\)\(\?(?![:=!]).?|(?<!\\)\\[AZ]")


def resolve_quantize(spec: pb.QuantizeSpec, context: ResolveContext) -> Resolved:
    """Check a `quantize` spec; types come out as llama.cpp writes them.

    Raises:
        InvalidArgument: no types, unknown or repeated ones, types that need an
            importance matrix without one, negative threads, weights that are not
            one for each adapter, an unknown method, patterns that are none.
        FailedPrecondition: the converter is missing, the model has no weights, or
            the adapters do not fit it.
    """
    resolved = _checked_quantize(spec)
    converter.locate()
    model = context.inputs["model"][0]
    adapters = context.inputs.get("adapters", [])
    if not spec.HasField("golden"):
        manifests = [adapter.manifest for adapter in adapters]
        found = carried(context.store, model.manifest, manifests, list(resolved.weights))
        if found is not None:
            resolved.golden = found.digest
    if adapters:
        paths = [adapter.outline for adapter in adapters]
        checkpoint = Checkpoint.of(
            MergedWeights.open(model.outline, paths, list(resolved.weights)).values()
        )
    else:
        checkpoint = read_checkpoint(model.outline)
    if resolved.adapter_only:
        adapter = LoraAdapter.open(adapters[0].outline)
        if why := adapter_file.obstacle(adapter, model.outline):
            raise FailedPrecondition(
                f"the adapter cannot become a GGUF adapter: {why}", reason="NO_GGUF_ADAPTER"
            )
        # In float32 at most, and once more between.
        return Resolved(
            spec=resolved,
            disk_bytes=(2 * len(resolved.types) + 1) * adapters[0].manifest.size,
            memory_bytes=(1 << 30) + 4 * adapters[0].manifest.size,
            unkeyed=("threads",),
        )
    given = {artifact.manifest.kind for artifact in context.inputs.get("imatrix", [])}
    if spec.HasField("imatrix_tokens") and given == {"report"}:
        raise InvalidArgument.field(
            "imatrix_tokens", "is only used with rows; imatrix is a report, computed already"
        )
    kinds = [resolve_type(name) for name in resolved.types if name not in bnb.TYPES]
    disk = sum(expected_size(checkpoint.parameters, kind) for kind in kinds)
    wide = [name for name in resolved.types if name in bnb.TYPES]
    disk += len(wide) * checkpoint.size
    if wide:
        bnb.available()
    if spec.method == "reference":
        disk += checkpoint.size * (2 if adapters else 1)
    elif "dataset" in given:
        disk += checkpoint.size
    return Resolved(
        spec=resolved,
        disk_bytes=disk,
        # llama.cpp's quantizer holds its largest tensor in fp32 beside the source's and
        # its own pages; the converter's libraries take the rest.
        memory_bytes=(1 << 30) + (2 * checkpoint.size if wide else 8 * checkpoint.largest),
        unkeyed=("threads",),
    )


def check_quantize(spec: pb.QuantizeSpec, context: ResolveContext) -> None:
    """Refuse what is wrong whatever the model is; raises as `resolve_quantize`."""
    _checked_quantize(spec)


def _checked_quantize(spec: pb.QuantizeSpec) -> pb.QuantizeSpec:
    resolved = with_defaults(spec)
    if not spec.types:
        raise InvalidArgument.field("types", "empty; expected at least one type, such as Q4_K_M")
    seen: dict[str, int] = {}
    for i, text in enumerate(spec.types):
        name = _type_name(spec, text, f"types[{i}]")
        if name in seen:
            raise InvalidArgument.field(
                f"types[{i}]", f"{name} is already there as types[{seen[name]}]"
            )
        seen[name] = i
    resolved.types[:] = list(seen)
    if spec.threads < 0:
        raise InvalidArgument.field("threads", f"is {spec.threads}; expected 0 (all) or more")
    _check_weights(spec, resolved)
    _check_overrides(resolved)
    if spec.HasField("imatrix_tokens") and not spec.HasField("imatrix"):
        raise InvalidArgument.field("imatrix_tokens", "is only used with rows in imatrix")
    if resolved.imatrix_tokens < 1:
        raise InvalidArgument.field(
            "imatrix_tokens", f"is {resolved.imatrix_tokens}; expected at least 1"
        )
    if resolved.method not in _METHODS:
        raise InvalidArgument.field(
            "method", f"{resolved.method!r} is not known; expected {', '.join(_METHODS)}"
        )
    _check_forms(spec, resolved)
    return resolved


def _type_name(spec: pb.QuantizeSpec, text: str, field: str) -> str:
    """A type as it is written, of those that what is asked for can have."""
    name = text.strip().upper()
    if spec.adapter_only:
        if name not in adapter_file.TYPES:
            raise InvalidArgument.field(
                field, f"an adapter alone is written as {', '.join(adapter_file.TYPES)}, not {text}"
            )
        return name
    if name in bnb.TYPES:
        return name
    return resolve_type(text, field=field, imatrix=spec.HasField("imatrix")).name


def _check_forms(spec: pb.QuantizeSpec, resolved: pb.QuantizeSpec) -> None:
    """Adapters alone, and checkpoints of bitsandbytes, take fewer knobs."""
    wide = any(name in bnb.TYPES for name in resolved.types)
    if not (resolved.adapter_only or wide):
        return
    if wide and spec.adapters:
        raise InvalidArgument.field(
            "adapters",
            "are not folded into checkpoints of bitsandbytes; quantize the output of a stage merge",
        )
    if wide and all(name in bnb.TYPES for name in resolved.types):
        what = "checkpoints of bitsandbytes"
    elif resolved.adapter_only:
        what = "an adapter alone"
        if len(spec.adapters) != 1:
            raise InvalidArgument.field(
                "adapters", f"holds {len(spec.adapters)}; adapter_only converts exactly one"
            )
        if list(resolved.weights) != [1.0]:
            raise InvalidArgument.field(
                "weights", "is not part of the file: whoever loads the adapter gives its scale"
            )
    else:
        return
    useless = ("imatrix", "output_tensor_type", "token_embedding_type", "method", "tensor_types")
    given = [field.name for field, _ in spec.ListFields() if field.name in useless]
    if given:
        raise InvalidArgument.field(given[0], f"has no meaning for {what}; leave it out")


def _check_weights(spec: pb.QuantizeSpec, resolved: pb.QuantizeSpec) -> None:
    for i, digest in enumerate(spec.adapters):
        if digest in spec.adapters[:i]:
            raise InvalidArgument.field(f"adapters[{i}]", "is there twice; give it a weight of 2")
    if spec.weights and len(spec.weights) != len(spec.adapters):
        raise InvalidArgument.field(
            "weights",
            f"holds {len(spec.weights)} numbers for {len(spec.adapters)} adapters; expected one "
            "for each, or none",
        )
    for i, weight in enumerate(spec.weights):
        if not math.isfinite(weight) or weight == 0:
            raise InvalidArgument.field(
                f"weights[{i}]",
                f"is {weight}; expected a finite number other than 0; leave the adapter out",
            )
    resolved.weights[:] = list(spec.weights) or [1.0] * len(spec.adapters)


def _check_overrides(resolved: pb.QuantizeSpec) -> None:
    """Types as ggml writes them; patterns that a regular expression is made of."""
    for pattern, text in list(resolved.tensor_types.items()):
        field = f"tensor_types[{pattern}]"
        try:
            re.compile(pattern)
        except re.error as error:
            raise InvalidArgument.field(
                field, f"is no regular expression over GGUF tensor names: {error}"
            ) from error
        if unknown := _NOT_ECMASCRIPT.search(pattern):
            raise InvalidArgument.field(
                field,
                f"has {unknown[0]!r}, which llama.cpp's regular expressions (ECMAScript's) do not "
                "know; of groups they take (...), (?:...), (?=...) and (?!...)",
            )
        resolved.tensor_types[pattern] = resolve_tensor_type(text, field=field)
    for field in ("output_tensor_type", "token_embedding_type"):
        if chosen := getattr(resolved, field):
            setattr(resolved, field, resolve_tensor_type(chosen, field=field))
