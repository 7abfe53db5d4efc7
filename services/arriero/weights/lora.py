"""A PEFT LoRA adapter: what it changes, by how much, and what is not supported.

Responsibility: read `adapter_config.json` and the adapter's header, and map
PEFT's names to the base model's tensors with the right scale. Does not know
whether the values are sane (`weights.health` does).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.errors import FailedPrecondition
from arriero.weights.arithmetic import delta
from arriero.weights.layout import TensorInfo
from arriero.weights.reader import Weights

if TYPE_CHECKING:
    import torch

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "LoraAdapter", "LoraPair", "LoraSettings"]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
# What PEFT puts before the base model's own module names.
PREFIX = "base_model.model."
# The adapter's name is in the middle only of checkpoints that PEFT did not save itself.
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 3

# Settings that change what an adapter computes; value: why it cannot be folded, what to do.
_RETRAIN = "train it again without, or merge it with PEFT and import the merged model"
_REFUSED: Mapping[str, str] = {
    "use_dora": f"DoRA scales whole weights, not only the low-rank part; {_RETRAIN}",
    "modules_to_save": f"whole modules are replaced; {_RETRAIN}",
    "trainable_token_indices": f"rows of the embeddings are replaced; {_RETRAIN}",
    "lora_bias": f"biases are trained beside the matrices; {_RETRAIN}",
    "target_parameters": f"bare parameters (experts) are targeted; {_RETRAIN}",
    "layer_replication": f"layers are repeated, so the merged model has more of them; {_RETRAIN}",
    "alora_invocation_tokens": "activated LoRA works from some tokens on only and can never "
    "be merged; serve it as an adapter",
    "use_qalora": f"QALoRA pools its inputs; {_RETRAIN}",
    "use_bdlora": f"block-diagonal LoRA lays out its matrices otherwise; {_RETRAIN}",
    "kasa_config": f"KaSA changes the base's weights too; {_RETRAIN}",
    "monteclora_config": f"MonteCLoRA samples its matrices; {_RETRAIN}",
    "arrow_config": "Arrow routes between adapters by token and can never be merged; merge "
    "one adapter",
    "megatron_config": f"Megatron's parallel layers name their weights otherwise; {_RETRAIN}",
}
# Initialisations that PEFT does by changing the base's weights (peft.tuners.lora.layer).
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What of `adapter_config.json` the arithmetic needs.

    Attributes:
        rank: LoRA's r; `rank_pattern` overrides it by module.
        alpha: scale's numerator; `alpha_pattern` overrides it by module.
        rslora: scale is alpha / sqrt(r) instead of alpha / r
            (Kalajdzievski 2023, arXiv:2312.03732).
        fan_in_fan_out: the adapter says that the base keeps its weights as (in, out).
        base: what the adapter says it was trained on; may be empty.
    """

    rank: int
    alpha: float
    rslora: bool = False
    fan_in_fan_out: bool = False
    base: str = ""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> LoraSettings:
        """Read and judge `adapter_config.json`.

        Raises:
            FailedPrecondition: missing, not a LoRA configuration, or a feature
                that is not supported, by its name.
        """
        path = directory / CONFIG_FILE
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise FailedPrecondition(
                f"{directory.name} holds no {CONFIG_FILE}; expected a PEFT adapter directory"
            ) from error
        except ValueError as error:
            raise FailedPrecondition(f"{CONFIG_FILE} is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise FailedPrecondition(f"{CONFIG_FILE} is not a JSON object")
        _refuse(config)
        try:
            settings = cls(
                rank=int(config["r"]),
                alpha=float(config["lora_alpha"]),
                rslora=bool(config.get("use_rslora")),
                fan_in_fan_out=bool(config.get("fan_in_fan_out")),
                base=str(config.get("base_model_name_or_path") or ""),
                rank_pattern={str(k): int(v) for k, v in _table(config, "rank_pattern")},
                alpha_pattern={str(k): float(v) for k, v in _table(config, "alpha_pattern")},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FailedPrecondition(
                f"{CONFIG_FILE} is not a LoRA configuration ({type(error).__name__}: {error}); "
                "expected numbers for r and lora_alpha"
            ) from error
        if settings.rank < 1 or not math.isfinite(settings.alpha):
            raise FailedPrecondition(
                f"{CONFIG_FILE} has r {settings.rank} and lora_alpha {settings.alpha}; "
                "expected a rank of at least 1 and a finite alpha"
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


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The two matrices of one module.

    Attributes:
        module: the base model's name of the layer.
        target: the base tensor that is changed, `<module>.weight`.
        a: A, shape (rank, in).
        b: B, shape (out, rank).
        scale: factor of B·A.
    """

    module: str
    target: str
    a: TensorInfo
    b: TensorInfo
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of B·A: (out, in)."""
        return (self.b.shape[0], self.a.shape[1])

    @property
    def rank(self) -> int:
        """LoRA's r."""
        return self.a.shape[0]


class LoraAdapter:
    """An opened adapter directory; its values are read when asked for."""

    def __init__(
        self,
        settings: LoraSettings,
        pairs: Mapping[str, LoraPair],
        weights: Weights,
        transposed: bool = False,
    ) -> None:
        """Take what `open` read."""
        self.settings = settings
        self.pairs = dict(pairs)
        self.transposed = transposed
        self._weights = weights

    @classmethod
    def open(cls, directory: Path, *, transposed: bool = False) -> LoraAdapter:
        """Read the configuration and the tensors' places.

        Args:
            directory: a PEFT adapter directory.
            transposed: the base keeps its linear weights as (in, out), as
                GPT-2's Conv1D does. As in PEFT the layer decides, not the
                adapter's `fan_in_fan_out`, which is often set wrongly.

        Raises:
            FailedPrecondition: an unsupported feature (named, with what to do),
                half a pair, a rank other than the configuration's, no pairs.
            DataLoss: the tensors' file is missing, cut off or not safetensors.
        """
        settings = LoraSettings.read(directory)
        weights = Weights.open(directory, "adapter_model")
        sides: dict[str, dict[str, TensorInfo]] = {}
        for name, info in weights.items():
            if not (found := _MATRIX.fullmatch(name)):
                raise FailedPrecondition(_unexplained(name))
            module = found["module"].removeprefix(PREFIX)
            sides.setdefault(module, {})[found["side"]] = info
        if not sides:
            raise FailedPrecondition(
                f"{WEIGHTS_FILE} holds no LoRA matrices; it was saved wrongly, save it again "
                "from the trained model"
            )
        pairs = [_pair(module, found, settings) for module, found in sides.items()]
        return cls(settings, {pair.target: pair for pair in pairs}, weights, transposed)

    def matrices(self, pair: LoraPair) -> tuple[torch.Tensor, torch.Tensor]:
        """A (rank, in) and B (out, rank) in their own type."""
        return self._weights.tensor(pair.a.name), self._weights.tensor(pair.b.name)

    def delta(self, pair: LoraPair) -> torch.Tensor:
        """What the adapter adds to `pair.target`: float32, in that weight's shape."""
        return delta(*self.matrices(pair), pair.scale, transposed=self.transposed)

    def shape_of(self, pair: LoraPair) -> tuple[int, int]:
        """The shape that the base's weight must have."""
        return (pair.shape[1], pair.shape[0]) if self.transposed else pair.shape

    def check_base(self, base: Mapping[str, TensorInfo]) -> None:
        """Refuse a base that the adapter does not fit.

        Raises:
            FailedPrecondition: targets that the base does not have, other
                shapes, or weights that are not floating point; with figures.
        """
        absent = [pair.module for pair in self.pairs.values() if pair.target not in base]
        if absent:
            tied = " (its output layer is tied to the embeddings)" if "lm_head" in absent else ""
            raise FailedPrecondition(
                f"the adapter changes {len(absent)} of {len(self.pairs)} modules that the base "
                f"does not have{tied}, such as {_some(absent)}; merge it into the model that it "
                "was trained on"
            )
        wrong = [
            f"{pair.module}: base {base[pair.target].shape}, adapter {self.shape_of(pair)}"
            for pair in self.pairs.values()
            if base[pair.target].shape != self.shape_of(pair)
        ]
        if wrong:
            raise FailedPrecondition(
                f"{len(wrong)} of {len(self.pairs)} modules have other shapes than the base, "
                f"such as {_some(wrong)}; merge it into the model that it was trained on"
            )
        packed = [
            f"{pair.target} ({base[pair.target].dtype})"
            for pair in self.pairs.values()
            if base[pair.target].dtype not in _FLOATS
        ]
        if packed:
            raise FailedPrecondition(
                f"{len(packed)} weights of the base are not {', '.join(_FLOATS)}, such as "
                f"{_some(packed)}; merge into the model that is not quantized"
            )


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
            f"bias {config['bias']!r} is not supported: biases of the base were trained; {_RETRAIN}"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        raise FailedPrecondition(
            f"init_lora_weights {start!r} is not supported: it changes the base's weights before "
            "training; save it with PEFT's path_initial_model_for_weight_conversion, which "
            "makes an ordinary LoRA of it"
        )


def _table(config: Mapping[str, Any], name: str) -> list[tuple[Any, Any]]:
    return list((config.get(name) or {}).items())


def _pattern_key(patterns: Mapping[str, Any], module: str) -> str:
    """PEFT's rule (`get_pattern_key`): the first that matches a dotted ending."""
    for pattern in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return pattern
    return module


def _unexplained(name: str) -> str:
    features = {
        "lora_embedding_": "LoRA on embeddings",
        "lora_magnitude_vector": "DoRA",
        "modules_to_save": "modules_to_save",
        ".bias": "bias",
        "embed_tokens": "saved embeddings",
        "lm_head": "saved embeddings",
    }
    for part, feature in features.items():
        if part in name:
            return f"{feature} ({name}) is not supported: {_RETRAIN}"
    return f"{name} is no LoRA matrix; expected names that end in lora_A.weight or lora_B.weight"


def _pair(module: str, sides: Mapping[str, TensorInfo], settings: LoraSettings) -> LoraPair:
    if len(sides) != 2:
        raise FailedPrecondition(
            f"{module} has only lora_{next(iter(sides))}; expected A and B: the adapter is "
            "incomplete, save it again"
        )
    a, b = sides["A"], sides["B"]
    rank = settings.rank_of(module)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise FailedPrecondition(
            f"{module}: A has shape {a.shape} and B {b.shape}, the configuration says rank "
            f"{rank}; configuration and weights belong to different adapters"
        )
    if a.dtype not in _FLOATS or b.dtype not in _FLOATS:
        raise FailedPrecondition(
            f"{module}: A is {a.dtype} and B {b.dtype}; expected {', '.join(_FLOATS)}"
        )
    return LoraPair(module, f"{module}.weight", a, b, settings.scale_of(module))


def _some(items: Sequence[str]) -> str:
    return "; ".join(items[:_SHOWN])
