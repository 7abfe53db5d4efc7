"""Specs of `import` and `merge`: defaults, checks, and what the work will need.

Responsibility: turn what was asked into what will be done, before anything
is. Reads headers alone; does not fetch, convert or compute.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

from arriero.errors import (
    ArrieroError,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
)
from arriero.gates import Mode, check_modes
from arriero.gates.golden import TOKENS
from arriero.merging import gguf_source, meta_source, sources
from arriero.merging.qlora import BASES, packing_for
from arriero.operations.defaults import with_defaults
from arriero.operations.job import gate_modes
from arriero.operations.kinds import ResolveContext, Resolved
from arriero.refs import is_name
from arriero.store import Artifact
from arriero.v1 import merging_pb2
from arriero.weights import MergedWeights

__all__ = [
    "DTYPES",
    "KINDS",
    "check_import",
    "check_merge",
    "made_for",
    "resolve_import",
    "resolve_merge",
]

DTYPES = ("bfloat16", "float16", "float32")
KINDS = ("model", "adapter", "gguf")
_AS_FORMS = ("auto", *KINDS)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Interpreter, torch and transformers, in bytes.
_LIBRARIES = 1_200_000_000
# Times golden logits' bytes: what two sides in float32, and what is made of them, take.
_LOGITS = 8


def resolve_import(spec: merging_pb2.ImportSpec, context: ResolveContext) -> Resolved:
    """Fill in `ImportSpec`.

    Raises:
        InvalidArgument: a wrong source, kind, name, dtype, sha256 or secret's name.
        NotFound: a path where nothing is.
    """
    check_modes(spec.gates)
    resolved = with_defaults(spec)
    wanted = getattr(resolved, "as")
    if wanted not in _AS_FORMS:
        raise _unknown("as", wanted, _AS_FORMS)
    if resolved.dtype not in DTYPES:
        raise _unknown("dtype", resolved.dtype, DTYPES)
    if spec.HasField("token_secret"):
        sources.secret_variable(spec.token_secret)

    def check_path(text: str) -> Path:
        return context.sources.check(text, field="source")

    source = sources.parse(spec.source, check_path)
    if isinstance(source, sources.HubSource):
        if spec.HasField("sha256"):
            raise InvalidArgument.field(
                "sha256", "pins a file; pin a hub repository by its commit: hf://org/name@commit"
            )
        _refuse_tokenizer(spec)
        _check_dtype(spec, resolved, used=False)
        # What a branch points to is only known when it is fetched.
        return _import(resolved, wanted, source, 0, cacheable=source.pinned)
    if spec.HasField("token_secret"):
        raise InvalidArgument.field("token_secret", "is only used with hf:// sources")
    meta = isinstance(source, sources.PathSource) and meta_source.is_meta(source.path)
    if not meta:
        _refuse_tokenizer(spec)
    size = 0
    fingerprints = {}
    found = "gguf"
    if isinstance(source, sources.PathSource):
        fingerprints["source"] = sources.fingerprint(source.path, check_path)
        found = sources.classify(source.path)
        resolved.source = str(source.path)
        files = [source.path] if found == "gguf" else sources.list_files(source.path, check_path)
        size = sum(file.stat().st_size for file in files)
        if meta:
            _resolve_tokenizer(spec, resolved, source.path, fingerprints, context)
    if found != "gguf" and spec.HasField("sha256"):
        raise InvalidArgument.field("sha256", f"pins a file, but the source is a {found} directory")
    if spec.HasField("sha256"):
        resolved.sha256 = spec.sha256.lower().removeprefix("sha256:")
        if not _SHA256.fullmatch(resolved.sha256):
            raise InvalidArgument.field("sha256", "is not 64 hexadecimal digits")
    kind = found if wanted == "auto" else wanted
    if kind != found and (found, kind) != ("gguf", "model"):
        raise InvalidArgument.field("as", f"{kind!r} is asked for, but the source is a {found}")
    _check_dtype(spec, resolved, used=(found, kind) == ("gguf", "model"))
    if resolved.HasField("dtype") and isinstance(source, sources.PathSource):
        size = gguf_source.read_facts(source.path).elements * _BYTES[resolved.dtype]
    return _import(resolved, kind, source, size, fingerprints=fingerprints)


def _refuse_tokenizer(spec: merging_pb2.ImportSpec) -> None:
    if spec.HasField("tokenizer"):
        raise InvalidArgument.field("tokenizer", "is only used with Meta's checkpoints on a path")


def _check_dtype(
    spec: merging_pb2.ImportSpec, resolved: merging_pb2.ImportSpec, *, used: bool
) -> None:
    if used:
        return
    if spec.HasField("dtype"):
        raise InvalidArgument.field(
            "dtype",
            "is only used where a GGUF becomes a model; weights are taken as they are: give it to "
            "a stage export",
        )
    resolved.ClearField("dtype")


def _resolve_tokenizer(
    spec: merging_pb2.ImportSpec,
    resolved: merging_pb2.ImportSpec,
    directory: Path,
    fingerprints: dict[str, str],
    context: ResolveContext,
) -> None:
    """The path of a Meta checkpoint's `tokenizer.model`; part of the key."""
    meta_source.checkpoint_files(directory)
    path: Path | None
    if spec.HasField("tokenizer"):
        path = context.sources.check(spec.tokenizer, field="tokenizer")
        if not path.is_file():
            raise NotFound(f"tokenizer: {spec.tokenizer!r} is not a file")
    else:
        found = meta_source.find_tokenizer(directory)
        try:
            path = context.sources.check(str(found), field="tokenizer") if found else None
        except ArrieroError:  # in the directory above, where this service may not read
            path = None
        if path is None:
            return
    resolved.tokenizer = str(path)
    fingerprints["tokenizer"] = sources.fingerprint(path)


def _import(
    spec: merging_pb2.ImportSpec,
    kind: str,
    source: sources.Source,
    size: int,
    *,
    fingerprints: dict[str, str] | None = None,
    cacheable: bool = True,
) -> Resolved:
    setattr(spec, "as", kind)
    if not spec.name:
        spec.name = sources.artifact_name(source, kind)
    if not is_name(spec.name):
        raise InvalidArgument.field(
            "name", f"{spec.name!r} is not a name (lower case letters, digits, '.', '_', '-')"
        )
    return Resolved(
        spec=spec,
        fingerprints=fingerprints or {},
        disk_bytes=size,
        # A GGUF is dequantized as a whole; all else goes through memory in pieces.
        memory_bytes=_LIBRARIES
        + (size if spec.source.endswith(".gguf") and kind == "model" else 0),
        cacheable=cacheable,
        unkeyed=("token_secret",),
    )


def check_import(spec: merging_pb2.ImportSpec, context: ResolveContext) -> None:
    """Refuse a wrong `ImportSpec`, before its run starts; it has no inputs.

    Raises:
        InvalidArgument, NotFound: as `resolve_import`.
    """
    resolve_import(spec, context)


def check_merge(spec: merging_pb2.MergeSpec, context: ResolveContext) -> None:
    """Refuse what is wrong with a `MergeSpec` whatever its inputs are.

    Raises:
        InvalidArgument: no adapters, one twice, weights that do not go with
            them, an unknown dtype or base, a shard size below one.
    """
    check_modes(spec.gates)
    if not spec.adapters:
        raise InvalidArgument.field("adapters", "is empty; expected at least one adapter")
    if len(set(spec.adapters)) != len(spec.adapters):
        raise InvalidArgument.field("adapters", "names one adapter twice; give it a weight of 2")
    if spec.weights:
        _check_weights(spec.weights, len(spec.adapters))
    if spec.dtype and spec.dtype not in ("auto", *DTYPES):
        raise _unknown("dtype", spec.dtype, ("auto", *DTYPES))
    if spec.HasField("qlora_base") and spec.qlora_base not in BASES:
        raise _unknown("qlora_base", spec.qlora_base, BASES)
    if spec.HasField("max_shard_size") and spec.max_shard_size < 1:
        raise InvalidArgument.field(
            "max_shard_size", f"{spec.max_shard_size} is not a size; expected bytes, at least 1"
        )


def resolve_merge(spec: merging_pb2.MergeSpec, context: ResolveContext) -> Resolved:
    """Fill in `MergeSpec`, and see from the headers that base and adapters fit.

    Raises:
        InvalidArgument: as `check_merge`.
        FailedPrecondition: an adapter that is not supported or does not fit.
        DataLoss: damaged files.
    """
    check_merge(spec, context)
    resolved = with_defaults(spec)
    adapters = context.inputs["adapters"]
    if not spec.weights:
        resolved.weights.extend([1.0] * len(adapters))
    packing = packing_for([adapter.manifest.spec for adapter in adapters], resolved.qlora_base)
    if packing is None:
        resolved.qlora_base = "full"
    [base] = context.inputs["model"]
    merged = MergedWeights.open(
        base.outline, [adapter.outline for adapter in adapters], resolved.weights, resolved.dtype
    )
    proving = gate_modes(spec).get("merge.logits", Mode.ENFORCE) is not Mode.SKIP
    golden = _golden_bytes(base) if proving else 0
    return Resolved(
        spec=resolved,
        disk_bytes=merged.nbytes + base.manifest.size - merged.base.nbytes + golden,
        # Weights are streamed; logits of both sides are held in float32.
        memory_bytes=_LIBRARIES + _LOGITS * golden,
    )


def _check_weights(weights: Sequence[float], adapters: int) -> None:
    if len(weights) != adapters:
        raise InvalidArgument.field(
            "weights", f"has {len(weights)} entries for {adapters} adapters; expected one for each"
        )
    wrong = [
        FieldViolation(f"weights[{i}]", f"{weight} is not a finite number other than 0")
        for i, weight in enumerate(weights)
        if not math.isfinite(weight) or weight == 0
    ]
    if wrong:
        raise InvalidArgument(
            f"{wrong[0].field}: {wrong[0].description}; leave the adapter out instead",
            violations=wrong,
        )


def _golden_bytes(base: Artifact) -> int:
    try:
        config = json.loads((base.outline / "config.json").read_text(encoding="utf-8"))
        return 2 * TOKENS * int(config["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FailedPrecondition(f"config.json of the model has no vocab_size: {error}") from error


def made_for(adapter: Artifact, model: Artifact, base: str) -> bool:
    """Whether an adapter was trained on this very model, as far as is known.

    Args:
        adapter: the artifact.
        model: the base that it is to be merged into.
        base: the adapter's `base_model_name_or_path`.
    """
    if base.startswith("sha256:"):
        return base == model.digest
    return model.digest in adapter.manifest.parents


def _unknown(field: str, value: str, known: Sequence[str]) -> InvalidArgument:
    return InvalidArgument.field(
        field, f"{value!r} is not known; expected one of {', '.join(known)}"
    )
