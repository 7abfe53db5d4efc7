"""The spec of `export`: defaults, checks, and what the work will need.

Responsibility: turn what was asked into what will be done, before anything is.
Reads headers alone; does not write or send.
"""

from __future__ import annotations

from dataclasses import dataclass

from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.gates import check_modes
from arriero.merging import architecture, meta, sources, tokenizer_model
from arriero.merging.specs import DTYPES
from arriero.operations.defaults import with_defaults
from arriero.operations.kinds import ResolveContext, Resolved
from arriero.store import Artifact
from arriero.v1 import merging_pb2
from arriero.weights import TensorPlan, Weights, dtype_name

__all__ = ["FORMATS", "MetaPlan", "check_export", "plan_meta", "resolve_export", "target_of"]

FORMATS = ("hf", "meta")
_MEMORY = 1_000_000_000
# Cards, parameters and tokenizers beside the weights.
_BESIDE = 100_000_000


def check_export(spec: merging_pb2.ExportSpec, context: ResolveContext) -> None:
    """Refuse what is wrong with an `ExportSpec` whatever is exported.

    Raises:
        InvalidArgument: an unknown format, dtype or target, fields that do not go
            together, a number that is none.
    """
    check_modes(spec.gates)
    if spec.gates:
        raise InvalidArgument.field("gates", "are not for export: it judges nothing")
    resolved = with_defaults(spec)
    if resolved.format not in FORMATS:
        raise _unknown("format", resolved.format, FORMATS)
    if resolved.dtype not in ("auto", *DTYPES):
        raise _unknown("dtype", resolved.dtype, ("auto", *DTYPES))
    if resolved.max_shard_size < 1:
        raise InvalidArgument.field(
            "max_shard_size", f"{resolved.max_shard_size} is not a size; expected bytes, at least 1"
        )
    if resolved.shards < 0:
        raise InvalidArgument.field(
            "shards", f"{resolved.shards} is below 0; expected a number of files, 0 for Meta's own"
        )
    if spec.shards and resolved.format != "meta":
        raise InvalidArgument.field(
            "shards", "is only used with format: meta; expected max_shard_size"
        )
    if spec.HasField("max_shard_size") and resolved.format != "hf":
        raise InvalidArgument.field(
            "max_shard_size", "is only used with format: hf; expected shards"
        )
    if spec.HasField("target"):
        target_of(spec.target)
        if not spec.token_secret:
            raise InvalidArgument.field(
                "token_secret", "is missing; pushing needs a token, given by its secret's name"
            )
        sources.secret_variable(spec.token_secret)
        return
    for field in ("token_secret", "private"):
        if spec.HasField(field):  # type: ignore[arg-type]
            raise InvalidArgument.field(field, "is only used with target")


def target_of(text: str) -> sources.HubSource:
    """Where to push to.

    Raises:
        InvalidArgument: not `hf://org/name`, or a token in it.
    """
    try:
        target = sources.parse(text)
    except InvalidArgument as error:
        said = error.violations[0].description if error.violations else error.message
        raise InvalidArgument.field("target", said) from error
    if not isinstance(target, sources.HubSource):
        raise InvalidArgument.field("target", f"{text!r} is no hub; expected hf://org/name")
    if target.pinned:
        raise InvalidArgument.field(
            "target", f"{text!r} names a commit; expected hf://org/name or hf://org/name@branch"
        )
    return target


def resolve_export(spec: merging_pb2.ExportSpec, context: ResolveContext) -> Resolved:
    """Fill in `ExportSpec`, and see from the headers that it can be done.

    Raises:
        InvalidArgument: as `check_export`; shards that do not divide the sizes.
        FailedPrecondition: a model that Meta's layout cannot hold.
        DataLoss: damaged files.
    """
    check_export(spec, context)
    resolved = with_defaults(spec)
    [artifact] = context.inputs["model"]
    kind = artifact.manifest.kind
    size = 0
    if kind != "model":
        given = [
            field
            for field in ("format", "dtype", "max_shard_size")
            if spec.HasField(field)  # type: ignore[arg-type]
            and not (field == "format" and spec.format == "hf")
        ]
        if given:
            raise InvalidArgument.field(given[0], f"is for models; a {kind} has one layout")
        if not spec.HasField("target"):
            raise InvalidArgument.field(
                "target", f"is missing; a {kind} has one layout, it can only be sent to a hub"
            )
    elif resolved.format == "meta":
        plan = plan_meta(artifact, shards=resolved.shards, dtype=resolved.dtype)
        resolved.shards = plan.shards
        size = sum(item.nbytes for plans in plan.files for item in plans)
    else:
        _require_hugging_face(artifact)
        weights = Weights.open(artifact.outline)
        size = sum(item.nbytes for item in converted(weights, resolved.dtype))
    return Resolved(
        spec=resolved,
        disk_bytes=size + (_BESIDE if size else 0),
        memory_bytes=_MEMORY,
        cacheable=not spec.HasField("target"),
        unkeyed=("token_secret",),
    )


def converted(weights: Weights, dtype: str) -> list[TensorPlan]:
    """The tensors in the dtype asked for; integers keep theirs."""
    wanted = None if dtype == "auto" else dtype_name(dtype)
    floating = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
    return [
        TensorPlan(name, wanted if wanted and info.dtype in floating else info.dtype, info.shape)
        for name, info in weights.items()
    ]


@dataclass(frozen=True, slots=True)
class MetaPlan:
    """A model in Meta's layout.

    Attributes:
        params: `params.json`.
        head_dim: width of a head.
        places: by Hugging Face name, in the order of writing; the output layer
            may have the embeddings' name (tied).
        sources: Hugging Face's tensor behind each of Meta's names.
        files: what each rank's file holds, in order.
    """

    params: dict[str, object]
    head_dim: int
    places: dict[str, meta.Place]
    sources: dict[str, str]
    files: list[list[TensorPlan]]

    @property
    def shards(self) -> int:
        """Files."""
        return len(self.files)


def plan_meta(artifact: Artifact, *, shards: int, dtype: str) -> MetaPlan:
    """Lay a model out as Meta does, from its headers.

    Args:
        artifact: of kind `model`.
        shards: files; 0 for as many as Meta ships of that size.
        dtype: of the weights; `auto` keeps the model's.

    Raises:
        FailedPrecondition: not a plain LLaMA model.
        InvalidArgument: shards that do not divide the sizes.
    """
    _require_hugging_face(artifact)
    path = artifact.outline
    config = architecture.read_config(path)
    names = config.get("architectures") or []
    if not set(names) & {"LlamaForCausalLM", "LLaMAForCausalLM"}:
        raise FailedPrecondition(
            f"Meta's layout is LLaMA's; the model is {', '.join(map(str, names)) or 'unnamed'}: "
            "export with format: hf"
        )
    weights = Weights.open(path)
    expected = architecture.expected_tensors(config)
    strange = [name for name in weights if name not in expected and name != "lm_head.weight"]
    if strange:
        meta.place_of(strange[0], vocabulary_rows=False)
        raise FailedPrecondition(f"{strange[0]} is more than a LLaMA model of this config has")
    vocabulary = expected["model.embed_tokens.weight"][0]
    ranks = shards or meta.default_shards(weights.elements)
    meta.check_shards(config, vocabulary, ranks)
    params = meta.Params.json_of(config, vocabulary=vocabulary)
    tokenizer = path / "tokenizer.model"
    rows = not tokenizer.is_file() or tokenizer_model.is_ranks(tokenizer)
    ours = {plan.name: plan for plan in converted(weights, dtype)}
    places: dict[str, meta.Place] = {}
    origins: dict[str, str] = {}
    files: list[list[TensorPlan]] = [[] for _ in range(ranks)]
    for name in [*expected, *(["lm_head.weight"] if "lm_head.weight" not in expected else [])]:
        # Meta's code has an output layer of its own, tied or not.
        origin = name if name in weights else "model.embed_tokens.weight"
        place = places[name] = meta.place_of(name, vocabulary_rows=rows)
        origins[name] = origin
        shape = list(ours[origin].shape)
        if place.axis is not None:
            shape[place.axis] //= ranks
        for plans in files:
            plans.append(TensorPlan(place.name, ours[origin].dtype, tuple(shape)))
    head = int(config["hidden_size"]) // int(config["num_attention_heads"])
    return MetaPlan(params, head, places, origins, files)


def _require_hugging_face(artifact: Artifact) -> None:
    if not (artifact.outline / "config.json").is_file():
        raise FailedPrecondition(
            f"model {artifact.digest} has no config.json: it is in Meta's layout already; import "
            "it first"
        )


def _unknown(field: str, value: str, known: tuple[str, ...]) -> InvalidArgument:
    return InvalidArgument.field(
        field, f"{value!r} is not known; expected one of {', '.join(known)}"
    )
