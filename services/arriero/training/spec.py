"""The spec of `train`: defaults, checks, and what the work will need.

Responsibility: turn what was asked into what will be done, before anything is.
Reads headers and counts alone; never imports torch, does not know the loop.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arriero.errors import FailedPrecondition
from arriero.gates import check_modes
from arriero.gates.golden import TOKENS
from arriero.operations.defaults import with_defaults
from arriero.operations.kinds import ResolveContext, Resolved
from arriero.store import Artifact
from arriero.training import checks
from arriero.training.checkpoints import checkpoint_bytes
from arriero.training.memory import Demand
from arriero.training.plan import Lora, Plan, Quantization
from arriero.training.rows import Rows, check_ids, read_facts
from arriero.v1 import training_pb2
from arriero.weights import TensorInfo, Weights
from arriero.weights.health import ALL_LINEAR, linear_modules, matches

_FLOATS = ("F32", "F16", "BF16", "F64")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_MICRO_BATCH = 8
# As many as make no warm-up too long, while the dataset is not known.
_MANY_ROWS = 1 << 40

# What changes where and how the work is done, and not what comes of it.
_UNKEYED = (
    "resources",
    "save_steps",
    "save_total_limit",
    "report_to",
    "nodes",
    "nproc_per_node",
    "fsdp",
)


def resolve(spec: training_pb2.TrainSpec, context: ResolveContext) -> Resolved:
    """Fill in `TrainSpec`, and refuse what could not end well.

    Raises:
        InvalidArgument: a field out of its range, an unknown name, target modules
            that the model does not have; all that is wrong at once, by field.
        FailedPrecondition: a dataset without trained tokens, or one that was
            tokenized for another model; a model without usable weights.
    """
    check_modes(spec.gates)
    resolved = _filled(spec)
    model, dataset = context.inputs["model"][0], context.inputs["dataset"][0]
    datasets = [("dataset", dataset)]
    datasets += [("val_dataset", item) for item in context.inputs.get("val_dataset", [])]
    facts = read_facts(dataset.path)
    plan = plan_of(resolved, facts["rows"])
    weights = Weights.open(model.outline)
    modules = linear_modules(weights)
    problems = [*checks.alone(resolved, plan, lora_of(resolved))]
    if resolved.method == "lora":
        problems += checks.modules(lora_of(resolved), modules, weights)
    checks.refuse([*problems, *checks.validation(plan, len(datasets) > 1)])
    config = read_config(model.outline)
    _check_weights(weights, modules)
    _check_datasets(datasets, model, embedding_rows(weights, config))
    lengths = Rows(dataset.path).longest(plan.micro_batch_size)
    demand = demand_of(resolved, config, weights, lengths, plan.micro_batch_size)
    golden = 2 * TOKENS * int(config.get("vocab_size") or 0)
    output = weights.nbytes if demand.full else 4 * demand.trained
    # One more than are kept exists while the newest is written; the best is kept beside.
    kept = plan.save_total_limit + 1 + plan.load_best
    return Resolved(
        spec=resolved,
        disk_bytes=kept * checkpoint_bytes(demand.trained) + output + golden,
        memory_bytes=demand.need().total,
        unkeyed=_UNKEYED,
    )


def check(spec: training_pb2.TrainSpec, context: ResolveContext) -> None:
    """Refuse what is wrong whatever the model and the dataset are; raises as `resolve`."""
    check_modes(spec.gates)
    filled = _filled(spec)
    checks.refuse([*checks.alone(filled, plan_of(filled, _MANY_ROWS), lora_of(filled))])


def plan_of(spec: training_pb2.TrainSpec, rows: int) -> Plan:
    """A resolved spec as a plan."""
    return Plan(
        rows=rows,
        num_epochs=spec.num_epochs,
        max_steps=spec.max_steps,
        batch_size=spec.batch_size,
        micro_batch_size=spec.micro_batch_size,
        learning_rate=spec.learning_rate,
        scheduler=spec.lr_scheduler_type,
        warmup=spec.warmup_steps,
        weight_decay=spec.weight_decay,
        max_grad_norm=spec.max_grad_norm,
        group_by_length=spec.group_by_length,
        seed=spec.seed,
        dtype=spec.dtype,
        save_steps=spec.save_steps,
        save_total_limit=spec.save_total_limit,
        gradient_checkpointing=spec.gradient_checkpointing,
        fsdp=spec.fsdp,
        optimizer=spec.optim,
        betas=(spec.adam_beta1, spec.adam_beta2),
        epsilon=spec.adam_epsilon,
        neftune_alpha=spec.neftune_noise_alpha,
        eval_steps=spec.eval_steps,
        patience=spec.early_stopping_patience,
        threshold=spec.early_stopping_threshold,
        load_best=spec.load_best_model_at_end,
    )


def quantization_of(spec: training_pb2.TrainSpec) -> Quantization | None:
    """How a resolved spec holds the base, unless in its own type."""
    if spec.load_in_4bit:
        return Quantization(4, spec.bnb_4bit_quant_type, spec.bnb_4bit_use_double_quant)
    return Quantization(8) if spec.load_in_8bit else None


def lora_of(spec: training_pb2.TrainSpec) -> Lora:
    """A resolved spec's LoRA settings."""
    names = tuple(spec.lora.target_modules)
    return Lora(
        rank=spec.lora.r,
        alpha=spec.lora.lora_alpha,
        dropout=spec.lora.lora_dropout,
        targets=ALL_LINEAR if names == (ALL_LINEAR,) else names,
        rslora=spec.lora.use_rslora,
        dora=spec.lora.use_dora,
        modules_to_save=tuple(spec.lora.modules_to_save),
        rank_pattern=dict(sorted(spec.lora.rank_pattern.items())),
        alpha_pattern=dict(sorted(spec.lora.alpha_pattern.items())),
    )


def demand_of(
    spec: training_pb2.TrainSpec,
    config: Mapping[str, Any],
    base: Weights,
    lengths: tuple[int, ...],
    rows: int,
    *,
    base_bytes: int = 0,
    host: bool = True,
    spread: int = 1,
) -> Demand:
    """What memory a resolved spec's training depends on, from headers alone.

    Args:
        spec: resolved.
        config: the model's `config.json`.
        base: its tensors.
        lengths: tokens of the longest rows, as many as `rows`, longest first.
        rows: of a micro batch.
        base_bytes: per parameter, once the device is known; 0 takes what `dtype` says,
            and for `auto` float32's, a CPU without fast bfloat16.
        host: whether it trains in the host's memory.
        spread: processes that the base is spread over.
    """
    modules, lora, full = linear_modules(base), lora_of(spec), spec.method == "full"
    dropped = 0
    if full:
        trained = base.elements
    else:
        adapted = {n: shape for n, shape in modules.items() if targets(n, lora)}
        trained = lora.parameters(adapted)
        if lora.dropout:
            dropped = sum(inner for _, inner in adapted.values())
        trained += sum(math.prod(info.shape) for info in saved_whole(base, lora))
    packed = quantization_of(spec)
    return Demand(
        config=config,
        parameters=base.elements,
        linear=sum(out * inner for out, inner in modules.values()),
        trained=trained,
        full=full,
        base_bytes=base_bytes or (2 if spec.dtype in ("bfloat16", "float16") else 4),
        quantization=packed.name if packed else "",
        double=packed.double if packed else False,
        optimizer=spec.optim,
        rows=rows,
        length=max(lengths, default=0),
        lengths=lengths,
        dropped=dropped,
        gradient_checkpointing=spec.gradient_checkpointing,
        host=host,
        spread=spread,
    )


def saved_whole(base: Weights, lora: Lora) -> list[TensorInfo]:
    """The base's tensors of `modules_to_save`."""
    return [
        info
        for name, info in base.items()
        if matches(name.rpartition(".")[0], list(lora.modules_to_save))
    ]


def targets(module: str, lora: Lora) -> bool:
    """Whether LoRA goes on a module."""
    wanted = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    return matches(module, wanted)


def read_config(model: Path) -> dict[str, Any]:
    """The model's `config.json`.

    Raises:
        FailedPrecondition: missing or not JSON.
    """
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError) as error:
        raise FailedPrecondition(
            f"the model's config.json cannot be read ({error}); expected a Hugging Face model"
        ) from error
    return config


def embedding_rows(weights: Weights, config: dict[str, Any]) -> int:
    """Rows of the token embeddings: ids must stay below."""
    for name, info in weights.items():
        if name.endswith(_EMBEDDINGS):
            return info.shape[0]
    return int(config.get("vocab_size", 0))


def _filled(spec: training_pb2.TrainSpec) -> training_pb2.TrainSpec:
    """A copy with defaults; an unset micro batch is the largest divisor of the batch up to 8."""
    asked = training_pb2.TrainSpec()
    asked.CopyFrom(spec)
    asked.lora.SetInParent()
    filled = with_defaults(asked)
    if not spec.HasField("micro_batch_size") and filled.batch_size > 0:
        divisors = (n for n in range(_MICRO_BATCH, 0, -1) if filled.batch_size % n == 0)
        filled.micro_batch_size = next(divisors)
    return filled


def _check_weights(weights: Weights, modules: dict[str, tuple[int, int]]) -> None:
    packed = [name for name in modules if weights[name + ".weight"].dtype not in _FLOATS]
    if packed:
        info = weights[packed[0] + ".weight"]
        raise FailedPrecondition(
            f"{len(packed)} linear layers are not floating point, such as {info.name} "
            f"({info.dtype}); train on the model that is not quantized"
        )


def _check_datasets(
    datasets: Sequence[tuple[str, Artifact]], model: Artifact, embeddings: int
) -> None:
    for field, artifact in datasets:
        facts = read_facts(artifact.path)
        if facts["rows"] < 1 or facts["trained_tokens"] < 1:
            raise FailedPrecondition(
                f"{field}: {facts['rows']} rows with {facts['trained_tokens']} trained tokens; "
                "expected at least one of each: are all labels masked, or all rows cut off?"
            )
        # Rows of the very model's own tokenizer need not be read to know.
        if facts.get("tokenizer") != model.digest:
            check_ids(Rows(artifact.path), embeddings, what=field)
