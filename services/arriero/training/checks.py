"""What is wrong with a training's settings, field by field.

Responsibility: one `FieldViolation` for each setting that cannot end well: what was
found, what was expected. Does not know artifacts, only the names in a model.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from arriero.errors import FieldViolation, InvalidArgument
from arriero.training import plan as plans
from arriero.training.plan import Lora, Plan, pattern_matches
from arriero.v1 import training_pb2
from arriero.weights import TensorInfo
from arriero.weights.health import ALL_LINEAR, matches

_MAX_RANK = 4096
# transformers' name for a reporter, and the packages that each of them needs one of.
REPORTERS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


def refuse(problems: Sequence[FieldViolation]) -> None:
    """Say all that is wrong at once.

    Raises:
        InvalidArgument: something is.
    """
    if problems:
        raise InvalidArgument(
            "; ".join(f"{item.field}: {item.description}" for item in problems),
            violations=problems,
        )


def alone(spec: training_pb2.TrainSpec, plan: Plan, lora: Lora) -> Iterator[FieldViolation]:
    """What is wrong with a spec, its defaults filled in, whatever model and dataset are."""
    yield from _numbers(plan)
    yield from _warmup(plan)
    yield from _names(spec)
    yield from _method(spec)
    yield from _processes(spec)
    yield from _lora(lora)


def validation(plan: Plan, held_out: bool) -> Iterator[FieldViolation]:
    """Settings that need held-out rows, where there are none."""
    for field, wanted in (
        ("early_stopping_patience", plan.patience > 0),
        ("load_best_model_at_end", plan.load_best),
        ("eval_steps", plan.eval_steps > 0),
    ):
        if wanted and not held_out:
            yield FieldViolation(
                field,
                "needs held-out rows, and there are none; set val_set_size in the dataset "
                "stage, or val_dataset",
            )


def modules(
    lora: Lora, linear: Mapping[str, tuple[int, int]], base: Mapping[str, TensorInfo]
) -> Iterator[FieldViolation]:
    """Names in LoRA's settings that mean nothing in this model.

    Args:
        lora: the settings.
        linear: the model's linear layers.
        base: the model's tensors.
    """
    yield from _targets(lora, linear)
    everything = {name.rpartition(".")[0] for name in base} - {""}
    yield from _saved(lora, linear, everything)
    targeted = [name for name in linear if matches(name, _list(lora.targets))]
    for field, patterns in (
        ("lora.rank_pattern", lora.rank_pattern),
        ("lora.alpha_pattern", lora.alpha_pattern),
    ):
        for pattern in patterns:
            if not any(pattern_matches(pattern, name) for name in targeted):
                yield FieldViolation(
                    f"{field}[{pattern!r}]",
                    "matches no module that target_modules names; expected a name, a dotted "
                    f"ending or a regular expression for one of: {_listed(_leaves(targeted))}",
                )


def _list(names: str | tuple[str, ...]) -> str | list[str]:
    return names if isinstance(names, str) else list(names)


def _targets(lora: Lora, linear: Mapping[str, tuple[int, int]]) -> Iterator[FieldViolation]:
    leaves = _leaves(linear)
    if isinstance(lora.targets, str):
        if not linear:
            yield FieldViolation("lora.target_modules", "the model has no linear layers")
        return
    if ALL_LINEAR in lora.targets:
        yield FieldViolation(
            "lora.target_modules", f"{ALL_LINEAR!r} among other names; expected it alone"
        )
        return
    for name in lora.targets:
        if not any(matches(module, [name]) for module in linear):
            yield FieldViolation(
                "lora.target_modules",
                f"{name!r} is no linear layer of this model; expected {ALL_LINEAR} or of: "
                f"{_listed(leaves)}{_near(name, leaves)}",
            )


def _saved(
    lora: Lora, linear: Mapping[str, tuple[int, int]], everything: set[str]
) -> Iterator[FieldViolation]:
    targeted = [name for name in linear if matches(name, _list(lora.targets))]
    leaves = _leaves(everything - set(targeted))
    for name in lora.modules_to_save:
        found = [module for module in everything if matches(module, [name])]
        if twice := next((module for module in found if module in targeted), None):
            yield FieldViolation(
                "lora.modules_to_save",
                f"{name!r} is {twice}, which gets LoRA too; name it in target_modules or in "
                "modules_to_save",
            )
        # The output layer of a tied model has no tensor of its own.
        elif not found and name != "lm_head":
            yield FieldViolation(
                "lora.modules_to_save",
                f"{name!r} is no module of this model; expected of: "
                f"{_listed(leaves)}{_near(name, leaves)}",
            )


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def _numbers(plan: Plan) -> Iterator[FieldViolation]:
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
        ("neftune_noise_alpha", plan.neftune_alpha),
        ("early_stopping_threshold", plan.threshold),
    ):
        if not (math.isfinite(value) and value >= 0):
            yield wrong(field, value, "a number of at least 0")
    for field, value in zip(("adam_beta1", "adam_beta2"), plan.betas, strict=True):
        if not 0 <= value < 1:
            yield wrong(field, value, f"0 <= {field} < 1")
    if not (math.isfinite(plan.epsilon) and plan.epsilon > 0):
        yield wrong("adam_epsilon", plan.epsilon, positive)
    if plan.save_steps < 0:
        yield wrong("save_steps", plan.save_steps, "a number of steps, or 0 for one a minute")
    if plan.save_total_limit < 1:
        yield wrong("save_total_limit", plan.save_total_limit, "at least 1 checkpoint")
    if plan.eval_steps < 0:
        yield wrong("eval_steps", plan.eval_steps, "a number of steps, or 0 for each epoch's end")
    if plan.patience < 0:
        yield wrong("early_stopping_patience", plan.patience, "validations, or 0 for never")


def _warmup(plan: Plan) -> Iterator[FieldViolation]:
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


def _names(spec: training_pb2.TrainSpec) -> Iterator[FieldViolation]:
    for field, choices in (
        ("lr_scheduler_type", plans.SCHEDULERS),
        ("optim", plans.OPTIMIZERS),
        ("dtype", plans.DTYPES),
        ("method", plans.METHODS),
        ("bnb_4bit_quant_type", plans.FOUR_BIT_TYPES),
    ):
        value = getattr(spec, field)
        if value not in choices:
            yield FieldViolation(
                field,
                f"{value!r} is not available; expected {_listed(choices)}{_near(value, choices)}",
            )
    for name in spec.report_to:
        packages = REPORTERS.get(name)
        if packages is None:
            yield FieldViolation(
                "report_to",
                f"{name!r} is not available; expected {_listed(REPORTERS)}{_near(name, REPORTERS)}",
            )
        elif not any(importlib.util.find_spec(package) for package in packages):
            yield FieldViolation(
                "report_to",
                f"{name} needs the package {' or '.join(packages)}, which is not installed "
                "beside the training service; install it, or leave it out",
            )


def _method(spec: training_pb2.TrainSpec) -> Iterator[FieldViolation]:
    quantized = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(spec, name)]
    if len(quantized) > 1:
        yield FieldViolation("load_in_8bit", "beside load_in_4bit; expected one of the two")
    if spec.method != "full":
        return
    for name in quantized:
        yield FieldViolation(
            name, "with method full: weights of so few bits cannot be trained; use method lora"
        )
    for name in ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if getattr(spec.lora, name):
            yield FieldViolation(
                f"lora.{name}", "with method full, which trains every weight; leave it out"
            )


def _processes(spec: training_pb2.TrainSpec) -> Iterator[FieldViolation]:
    if spec.nodes < 1:
        yield FieldViolation("nodes", f"{spec.nodes}; expected at least 1 machine")
    if spec.nproc_per_node < 0:
        yield FieldViolation(
            "nproc_per_node", f"{spec.nproc_per_node}; expected processes, or 0 for one per GPU"
        )
    world = max(1, spec.nodes) * max(1, spec.nproc_per_node)
    if 1 <= spec.batch_size < world:
        yield FieldViolation(
            "batch_size", f"{spec.batch_size} rows for {world} processes; expected a row for each"
        )
    if not spec.fsdp:
        return
    if spec.method == "full":
        yield FieldViolation(
            "fsdp", "with method full; it spreads weights that are not trained: use method lora"
        )
    if spec.load_in_4bit or spec.load_in_8bit:
        yield FieldViolation(
            "fsdp", "with a quantized base, which cannot be spread; expected one of the two"
        )


def _lora(lora: Lora) -> Iterator[FieldViolation]:
    ranks = {"lora.r": lora.rank}
    ranks |= {f"lora.rank_pattern[{key!r}]": rank for key, rank in lora.rank_pattern.items()}
    for field, rank in ranks.items():
        if not 1 <= rank <= _MAX_RANK:
            yield FieldViolation(field, f"{rank}; expected a rank of 1 to {_MAX_RANK}")
    alphas = {"lora.lora_alpha": lora.alpha}
    alphas |= {f"lora.alpha_pattern[{key!r}]": alpha for key, alpha in lora.alpha_pattern.items()}
    for field, alpha in alphas.items():
        if not (math.isfinite(alpha) and alpha > 0):
            yield FieldViolation(field, f"{alpha}; expected a number above 0")
    for field, patterns in (
        ("lora.rank_pattern", lora.rank_pattern),
        ("lora.alpha_pattern", lora.alpha_pattern),
    ):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                yield FieldViolation(f"{field}[{pattern!r}]", f"no regular expression: {error}")
    if not 0 <= lora.dropout < 1:
        yield FieldViolation("lora.lora_dropout", f"{lora.dropout}; expected 0 <= dropout < 1")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _near(name: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(choices), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
