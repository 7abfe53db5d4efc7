"""The spec of `train`: defaults, checks, and what the work will need.

Responsibility: turn what was asked into what will be done, before anything is.
Reads headers and counts alone; never imports torch, does not know the loop.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from arriero.errors import FailedPrecondition, FieldViolation, InvalidArgument
from arriero.gates import check_modes
from arriero.gates.golden import TOKENS
from arriero.operations.defaults import with_defaults
from arriero.operations.kinds import ResolveContext, Resolved
from arriero.store import Artifact
from arriero.training import plan as plans
from arriero.training.plan import Lora, Plan
from arriero.training.rows import Rows, check_ids, read_facts
from arriero.v1 import training_pb2
from arriero.weights import Weights
from arriero.weights.health import ALL_LINEAR, linear_modules, matches

_FLOATS = ("F32", "F16", "BF16", "F64")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_MICRO_BATCH = 4
_MAX_RANK = 4096
# As many as make no warm-up too long, while the dataset is not known.
_MANY_ROWS = 1 << 40


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
    lora, plan = lora_of(resolved), plan_of(resolved, facts["rows"])
    weights = Weights.open(model.path)
    modules = linear_modules(weights)
    _raise([*_check_alone(resolved, plan), *_check_targets(lora, modules)])
    config = read_config(model.path)
    _check_weights(weights, modules)
    _check_datasets(datasets, model, embedding_rows(weights, config))
    targeted = {name: shape for name, shape in modules.items() if targets(name, lora)}
    trained = plans.trained_parameters(targeted, lora.rank)
    longest = int(facts.get("max_length") or facts.get("cutoff_len") or 0)
    golden = 2 * TOKENS * int(config.get("vocab_size", 0))
    return Resolved(
        spec=resolved,
        # One more than are kept exists while the newest is written.
        disk_bytes=(plan.save_total_limit + 1) * plans.checkpoint_bytes(trained)
        + 4 * trained
        + golden,
        memory_bytes=plans.memory_bytes(
            config,
            parameters=weights.elements,
            trained=trained,
            rows=plan.micro_batch_size,
            length=longest,
            gradient_checkpointing=plan.gradient_checkpointing,
        ),
        unkeyed=("resources", "save_steps", "save_total_limit"),
    )


def check(spec: training_pb2.TrainSpec, context: ResolveContext) -> None:
    """Refuse what is wrong whatever the model and the dataset are; raises as `resolve`."""
    check_modes(spec.gates)
    filled = _filled(spec)
    _raise([*_check_alone(filled, plan_of(filled, _MANY_ROWS))])


def _check_alone(spec: training_pb2.TrainSpec, plan: Plan) -> Iterable[FieldViolation]:
    yield from _check_plan(plan)
    yield from _check_names(spec)
    yield from _check_rank(lora_of(spec))


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
    )


def lora_of(spec: training_pb2.TrainSpec) -> Lora:
    """A resolved spec's LoRA settings."""
    names = tuple(spec.lora.target_modules)
    return Lora(
        rank=spec.lora.r,
        alpha=spec.lora.lora_alpha,
        dropout=spec.lora.lora_dropout,
        targets=ALL_LINEAR if names == (ALL_LINEAR,) else names,
        rslora=spec.lora.use_rslora,
    )


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
    """A copy with defaults; an unset micro batch is the largest divisor of the batch up to 4."""
    asked = training_pb2.TrainSpec()
    asked.CopyFrom(spec)
    asked.lora.SetInParent()
    filled = with_defaults(asked)
    if not spec.HasField("micro_batch_size") and filled.batch_size > 0:
        divisors = (n for n in range(_MICRO_BATCH, 0, -1) if filled.batch_size % n == 0)
        filled.micro_batch_size = next(divisors)
    return filled


def _raise(problems: Sequence[FieldViolation]) -> None:
    if problems:
        raise InvalidArgument(
            "; ".join(f"{item.field}: {item.description}" for item in problems),
            violations=problems,
        )


def _check_plan(plan: Plan) -> Iterable[FieldViolation]:
    def wrong(field: str, value: object, expected: str) -> FieldViolation:
        return FieldViolation(field, f"{value}; expected {expected}")

    positive = "a number above 0"
    if not (math.isfinite(plan.learning_rate) and plan.learning_rate > 0):
        yield wrong("learning_rate", plan.learning_rate, positive)
    if plan.max_steps < 0:
        yield wrong("max_steps", plan.max_steps, "a number of steps, or 0 for whole epochs")
    if plan.max_steps == 0 and not (math.isfinite(plan.num_epochs) and plan.num_epochs > 0):
        yield wrong("num_epochs", plan.num_epochs, positive)
    if plan.batch_size < 1:
        yield wrong("batch_size", plan.batch_size, "at least 1 row")
    if plan.micro_batch_size < 1:
        yield wrong("micro_batch_size", plan.micro_batch_size, "at least 1 row")
    elif plan.batch_size >= 1 and plan.batch_size % plan.micro_batch_size:
        yield wrong(
            "micro_batch_size",
            plan.micro_batch_size,
            f"a divisor of batch_size {plan.batch_size}, such as "
            f"{math.gcd(plan.batch_size, plan.micro_batch_size)}",
        )
    for field, value in (
        ("weight_decay", plan.weight_decay),
        ("max_grad_norm", plan.max_grad_norm),
    ):
        if not (math.isfinite(value) and value >= 0):
            yield wrong(field, value, "a number of at least 0")
    if plan.save_steps < 0:
        yield wrong("save_steps", plan.save_steps, "a number of steps, or 0 for one a minute")
    if plan.save_total_limit < 1:
        yield wrong("save_total_limit", plan.save_total_limit, "at least 1 checkpoint")
    yield from _check_warmup(plan)


def _check_warmup(plan: Plan) -> Iterable[FieldViolation]:
    warmup = plan.warmup
    if not math.isfinite(warmup) or warmup < 0 or (warmup >= 1 and warmup != int(warmup)):
        yield FieldViolation(
            "warmup_steps", f"{warmup}; expected a number of steps, or a share of them below 1"
        )
    elif warmup >= 1 and plan.batch_size >= 1 and (plan.max_steps > 0 or plan.num_epochs > 0):
        total = plan.total_steps if math.isfinite(plan.num_epochs) else math.inf
        if warmup >= total:
            yield FieldViolation(
                "warmup_steps",
                f"{int(warmup)} steps of {total} in all; expected fewer, or a share below 1 "
                "such as 0.05",
            )


def _check_names(spec: training_pb2.TrainSpec) -> Iterable[FieldViolation]:
    for field, choices in (
        ("lr_scheduler_type", plans.SCHEDULERS),
        ("optim", plans.OPTIMIZERS),
        ("dtype", plans.DTYPES),
    ):
        value = getattr(spec, field)
        if value not in choices:
            yield FieldViolation(
                field,
                f"{value!r} is not available; expected {_listed(choices)}{_near(value, choices)}",
            )


def _check_rank(lora: Lora) -> Iterable[FieldViolation]:
    if not 1 <= lora.rank <= _MAX_RANK:
        yield FieldViolation("lora.r", f"{lora.rank}; expected a rank of 1 to {_MAX_RANK}")
    if not (math.isfinite(lora.alpha) and lora.alpha > 0):
        yield FieldViolation("lora.lora_alpha", f"{lora.alpha}; expected a number above 0")
    if not 0 <= lora.dropout < 1:
        yield FieldViolation("lora.lora_dropout", f"{lora.dropout}; expected 0 <= dropout < 1")


def _check_targets(lora: Lora, modules: dict[str, tuple[int, int]]) -> Iterable[FieldViolation]:
    leaves = sorted({name.rsplit(".", 1)[-1] for name in modules})
    if isinstance(lora.targets, str):
        if not modules:
            yield FieldViolation("lora.target_modules", "the model has no linear layers")
        return
    if ALL_LINEAR in lora.targets:
        yield FieldViolation(
            "lora.target_modules", f"{ALL_LINEAR!r} among other names; expected it alone"
        )
        return
    for name in lora.targets:
        if not any(matches(module, [name]) for module in modules):
            yield FieldViolation(
                "lora.target_modules",
                f"{name!r} is no linear layer of this model; expected {ALL_LINEAR} or of: "
                f"{_listed(leaves)}{_near(name, leaves)}",
            )


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


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _near(name: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
