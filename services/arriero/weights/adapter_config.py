"""`adapter_config.json` of a PEFT LoRA adapter: ranks, scales, and what is not supported.

Responsibility: read it, and refuse by name what cannot be folded or is not known.
Does not know the adapter's tensors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arriero.errors import FailedPrecondition
from arriero.weights.config import read_object

__all__ = ["CONFIG_FILE", "RETRAIN", "LoraSettings", "read_settings"]

CONFIG_FILE = "adapter_config.json"
_SHOWN = 3
# What to do about what cannot be folded.
RETRAIN = "train it again without, or merge it with PEFT and import the merged model"
# Settings that change what an adapter computes; value: why it cannot be folded, what to do.
_REFUSED: Mapping[str, str] = {
    "trainable_token_indices": f"rows of the embeddings are replaced; {RETRAIN}",
    "lora_bias": f"biases are trained beside the matrices; {RETRAIN}",
    "target_parameters": f"bare parameters (experts) are targeted; {RETRAIN}",
    "layer_replication": f"layers are repeated, so the merged model has more of them; {RETRAIN}",
    "alora_invocation_tokens": "activated LoRA works from some tokens on only and can never "
    "be merged; serve it beside its base with PEFT",
    "use_qalora": f"QALoRA pools its inputs; {RETRAIN}",
    "use_bdlora": f"block-diagonal LoRA lays out its matrices otherwise; {RETRAIN}",
    "kasa_config": f"KaSA changes the base's weights too; {RETRAIN}",
    "monteclora_config": f"MonteCLoRA samples its matrices; {RETRAIN}",
    "arrow_config": "Arrow routes between adapters by token and can never be merged; merge "
    "one adapter",
    "megatron_config": f"Megatron's parallel layers name their weights otherwise; {RETRAIN}",
}
# Settings that are obeyed here, or were while training; of any other nobody knows here.
# fmt: off
_KNOWN = (
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "merge_weights", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora",
    "use_rslora", "velora_config",
)
# fmt: on
# Initialisations that PEFT does by changing the base's weights (peft.tuners.lora.layer).
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_BASE_KEEPING = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What of `adapter_config.json` the arithmetic needs.

    Attributes:
        rank: LoRA's r; `rank_pattern` overrides it by module.
        alpha: scale's numerator; `alpha_pattern` overrides it by module.
        rslora: scale is alpha / sqrt(r) instead of alpha / r
            (Kalajdzievski 2023, arXiv:2312.03732).
        base: what the adapter says it was trained on; may be empty.
        dora: magnitudes were trained apart from directions
            (Liu et al. 2024, arXiv:2402.09353).
        modules_to_save: endings of the names of modules trained as a whole.
        keeps_tied: PEFT's `ensure_weight_tying`: what is done to tied embeddings is
            done to the output layer too.
    """

    rank: int
    alpha: float
    rslora: bool = False
    base: str = ""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    keeps_tied: bool = False

    @classmethod
    def read(cls, directory: Path) -> LoraSettings:
        """Read and judge `adapter_config.json`.

        Raises:
            FailedPrecondition: missing, not a LoRA configuration, or a feature
                that is not supported, by its name.
        """
        config = read_settings(directory)
        _refuse(config)
        return cls.of(config)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LoraSettings:
        """Take what is in `adapter_config.json`, supported or not.

        Raises:
            FailedPrecondition: not a LoRA configuration, or numbers that are none.
        """
        try:
            settings = cls(
                rank=_rank(config["r"]),
                alpha=float(config["lora_alpha"]),
                rslora=bool(config.get("use_rslora")),
                base=str(config.get("base_model_name_or_path") or ""),
                rank_pattern={k: _rank(v) for k, v in _table(config, "rank_pattern").items()},
                alpha_pattern={k: float(v) for k, v in _table(config, "alpha_pattern").items()},
                dora=bool(config.get("use_dora")),
                modules_to_save=_names(config, "modules_to_save"),
                keeps_tied=bool(config.get("ensure_weight_tying")),
            )
            for pattern in (*settings.rank_pattern, *settings.alpha_pattern):
                re.compile(pattern)
        except (KeyError, TypeError, ValueError, re.error) as error:
            raise FailedPrecondition(
                f"{CONFIG_FILE} is not a LoRA configuration ({type(error).__name__}: {error}); "
                "expected numbers for r and lora_alpha, patterns with numbers, names in lists"
            ) from error
        ranks = {settings.rank, *settings.rank_pattern.values()}
        alphas = {settings.alpha, *settings.alpha_pattern.values()}
        if min(ranks) < 1 or not all(map(math.isfinite, alphas)):
            raise FailedPrecondition(
                f"{CONFIG_FILE} has r {_joined(ranks)} and lora_alpha {_joined(alphas)}; "
                "expected ranks of at least 1 and finite alphas"
            )
        return settings

    def rank_of(self, module: str) -> int:
        """The rank that a module's matrices must have."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """What B·A is multiplied by for a module."""
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _refuse(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type", "LORA")
    if str(kind).upper() != "LORA":
        raise FailedPrecondition(
            f"peft_type is {kind}; only LORA adapters can be merged: merge it with PEFT and "
            "import the merged model"
        )
    for name, advice in _REFUSED.items():
        if config.get(name):
            raise FailedPrecondition(f"{name} is not supported: {advice}")
    if config.get("bias", "none") != "none":
        raise FailedPrecondition(
            f"bias {config['bias']!r} is not supported: biases of the base were trained; {RETRAIN}"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        raise FailedPrecondition(
            f"init_lora_weights {start!r} is not supported: it changes the base's weights before "
            "training; save it with PEFT's path_initial_model_for_weight_conversion, which "
            "makes an ordinary LoRA of it"
        )
    if isinstance(start, str) and start.lower() not in _BASE_KEEPING:
        raise FailedPrecondition(
            f"init_lora_weights {start!r} is not known here, and some initialisations change the "
            f"base's weights; {RETRAIN}"
        )
    unknown = sorted(name for name in config if name not in _KNOWN and config[name])
    if unknown:
        raise FailedPrecondition(
            f"{CONFIG_FILE} sets {_some(unknown)}, which is not known here and may change what the "
            "adapter computes; take the setting out if it does not, else merge it with PEFT and "
            "import the merged model"
        )


def read_settings(directory: Path) -> dict[str, Any]:
    """`adapter_config.json` as it is; raises as `read_object`."""
    return read_object(directory / CONFIG_FILE, "a PEFT adapter directory")


def _rank(value: Any) -> int:
    if int(value) != float(value):
        raise ValueError(f"a rank of {value}")
    return int(value)


def _table(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise TypeError(f"{name} is {found!r}")
    return found


def _names(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    found = config.get(name) or []
    if not isinstance(found, list):
        raise TypeError(f"{name} is {found!r}")
    return tuple(map(str, found))


def _joined(numbers: set[int] | set[float]) -> str:
    return ", ".join(f"{number:g}" for number in sorted(numbers))


def _pattern_key(patterns: Mapping[str, Any], module: str) -> str:
    """PEFT's rule (`get_pattern_key`): the first that matches a dotted ending."""
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return module


def _some(items: Sequence[str]) -> str:
    return "; ".join(items[:_SHOWN])
