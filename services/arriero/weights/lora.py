"""The tensors of a PEFT LoRA adapter: what they change, and by how much.

Responsibility: read the adapter's header, and map PEFT's names to the base model's
tensors with the right scale. Does not know whether the values are sane
(`weights.health` does), nor the base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.errors import FailedPrecondition
from arriero.weights.adapter_config import CONFIG_FILE, RETRAIN, LoraSettings
from arriero.weights.layout import TensorInfo
from arriero.weights.reader import Weights, same_bytes

if TYPE_CHECKING:
    import torch

__all__ = [
    "EMBEDDING_LAYERS",
    "WEIGHTS_FILE",
    "LoraAdapter",
    "LoraPair",
    "Replacement",
    "base_name",
    "is_saved",
]

WEIGHTS_FILE = "adapter_model.safetensors"
# What PEFT puts before the base model's own module names.
PREFIX = "base_model.model."
# The adapter's name is in the middle only of checkpoints that PEFT did not save itself.
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
_EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.[^.]+)?")
_MAGNITUDE = re.compile(
    r"(?P<module>.+)\.lora_magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
)
# How PEFT's wrappers show in names: of a trained copy, and of a layer below LoRA.
_COPY = re.compile(r"\.modules_to_save(?:\.(?!weight$|bias$)[^.]+(?=\.))?")
_WRAPPED = ".base_layer."
_ORIGINAL = ".original_module."
# Saved beside an adapter when they were resized (peft.utils.constants).
EMBEDDING_LAYERS = ("embed_tokens", "lm_head")
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The matrices of one module.

    Attributes:
        module: the base model's name of the layer.
        target: the base tensor that is changed, `<module>.weight`.
        a: A, shape (rank, in); of embeddings (rank, vocabulary).
        b: B, shape (out, rank); of embeddings (width, rank).
        scale: factor of B·A.
        transposed: the base's weight lies as (in, out): embeddings, and GPT-2's Conv1D.
        embedding: of an embedding layer.
        magnitude: DoRA's m, shape (out,); of embeddings (width,).
    """

    module: str
    target: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool = False
    embedding: bool = False
    magnitude: TensorInfo | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """The shape that the base's weight must have."""
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.transposed else (out, into)

    @property
    def rank(self) -> int:
        """LoRA's r."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Replacement:
    """A tensor that the adapter brings whole.

    Attributes:
        target: the base tensor that it takes the place of.
        info: where it lies.
        trained: a copy that was trained beside the base's (`modules_to_save`), so
            that what was tied to the base's is not tied to it; otherwise the base's
            own tensor, as it was when LoRA was put on (resized embeddings).
    """

    target: str
    info: TensorInfo
    trained: bool


class LoraAdapter:
    """An opened adapter directory; its values are read when asked for.

    Attributes:
        settings: the configuration.
        pairs: LoRA by the base tensor's name.
        replaced: whole tensors by the base tensor's name.
    """

    def __init__(
        self,
        settings: LoraSettings,
        pairs: Mapping[str, LoraPair],
        replaced: Mapping[str, Replacement],
        weights: Weights,
    ) -> None:
        """Take what `open` read."""
        self.settings = settings
        self.pairs = dict(pairs)
        self.replaced = dict(replaced)
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
                half a pair, a rank other than the configuration's, a magnitude or a
                saved module that is missing, nothing at all.
            DataLoss: the tensors' file is missing, cut off or not safetensors.
        """
        settings = LoraSettings.read(directory)
        weights = Weights.open(directory, "adapter_model")
        sides: dict[str, dict[str, TensorInfo]] = {}
        embeddings: set[str] = set()
        replaced: dict[str, Replacement] = {}
        for name, info in weights.items():
            plain = name.removeprefix(PREFIX)
            if found := _MATRIX.fullmatch(plain):
                sides.setdefault(found["module"], {})[found["side"]] = info
            elif found := _EMBEDDING.fullmatch(plain):
                sides.setdefault(found["module"], {})[found["side"]] = info
                embeddings.add(found["module"])
            elif settings.dora and (found := _MAGNITUDE.fullmatch(plain)):
                sides.setdefault(found["module"], {})["magnitude"] = info
            elif _ORIGINAL not in plain:
                whole = _replacement(plain, info, settings)
                # The same tensor may be saved under the wrapper's name too.
                if whole.target == plain or whole.target not in replaced:
                    replaced[whole.target] = whole
        if not sides and not replaced:
            raise FailedPrecondition(
                f"{WEIGHTS_FILE} holds no LoRA matrices; it was saved wrongly, save it again "
                "from the trained model"
            )
        _check_saved(settings, replaced)
        pairs = [
            _pair(module, found, settings, transposed, module in embeddings)
            for module, found in sides.items()
        ]
        return cls(settings, {pair.target: pair for pair in pairs}, replaced, weights)

    @property
    def touched(self) -> set[str]:
        """Names of the base's tensors that are changed or replaced."""
        return {*self.pairs, *self.replaced}

    def tensor(self, info: TensorInfo) -> torch.Tensor:
        """A tensor of the adapter, in its own type, over the file's pages."""
        return self._weights.tensor(info.name)

    def same(self, one: TensorInfo, other: TensorInfo) -> bool:
        """Whether two of the adapter's tensors are equal, byte by byte."""
        return (one.dtype, one.shape) == (other.dtype, other.shape) and same_bytes(
            self._weights.raw(one.name), self._weights.raw(other.name)
        )

    def factors(self, pair: LoraPair) -> tuple[torch.Tensor, torch.Tensor]:
        """Two matrices whose product, by `pair.scale`, is added: (rows, rank), (rank, columns)."""
        a, b = self.tensor(pair.a), self.tensor(pair.b)
        return (a.T, b.T) if pair.transposed else (b, a)


def _replacement(name: str, info: TensorInfo, settings: LoraSettings) -> Replacement:
    """What a tensor is that is no part of LoRA's own.

    Raises:
        FailedPrecondition: nothing that can be merged.
    """
    target = base_name(name)
    if ".lora_" not in name and target.endswith((".weight", ".bias")):
        module, _, kind = target.rpartition(".")
        if is_saved(module, settings.modules_to_save):
            return Replacement(target, info, trained=_WRAPPED not in name)
        if kind == "weight" and module.rpartition(".")[2] in EMBEDDING_LAYERS:
            return Replacement(target, info, trained=False)
    raise FailedPrecondition(_unexplained(name))


def base_name(name: str) -> str:
    """The base's name of a tensor that an adapter brings whole, without PEFT's wrappers."""
    return _COPY.sub("", name.removeprefix(PREFIX)).replace(_WRAPPED, ".")


def is_saved(module: str, saved: Sequence[str]) -> bool:
    """Whether a module or one that holds it is among `modules_to_save`.

    PEFT compares endings, dots or not: `norm` means `post_attention_layernorm` too.
    """
    while module:
        if module.endswith(tuple(saved)):
            return True
        module = module.rpartition(".")[0]
    return False


def _check_saved(settings: LoraSettings, replaced: Mapping[str, Replacement]) -> None:
    absent = [
        name
        for name in settings.modules_to_save
        if not any(is_saved(target.rpartition(".")[0], [name]) for target in replaced)
    ]
    if absent:
        raise FailedPrecondition(
            f"modules_to_save names {_some(absent)}, but {WEIGHTS_FILE} holds no such tensors; "
            "the adapter is incomplete, save it again from the trained model"
        )


def _unexplained(name: str) -> str:
    features = {
        "lora_magnitude_vector": "DoRA without use_dora",
        "token_adapter": "trainable_token_indices",
        ".bias": "bias",
    }
    for part, feature in features.items():
        if part in name:
            return f"{feature} ({name}) is not supported: {RETRAIN}"
    return (
        f"{name} is no LoRA matrix and {CONFIG_FILE} does not name it in modules_to_save; "
        "expected names that end in lora_A.weight or lora_B.weight"
    )


def _pair(
    module: str,
    sides: Mapping[str, TensorInfo],
    settings: LoraSettings,
    transposed: bool,
    embedding: bool,
) -> LoraPair:
    lonely = [f"lora_{side}" for side in ("A", "B") if side in sides]
    if len(lonely) != 2:
        raise FailedPrecondition(
            f"{module} has only {', '.join(lonely) or 'a magnitude'}; expected A and B: the "
            "adapter is incomplete, save it again"
        )
    a, b, magnitude = sides["A"], sides["B"], sides.get("magnitude")
    rank = settings.rank_of(module)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise FailedPrecondition(
            f"{module}: A has shape {a.shape} and B {b.shape}, the configuration says rank "
            f"{rank}; configuration and weights belong to different adapters"
        )
    if settings.dora and (magnitude is None or magnitude.shape != (b.shape[0],)):
        found = "none" if magnitude is None else f"of shape {magnitude.shape}"
        raise FailedPrecondition(
            f"{module}: expected a magnitude of shape {(b.shape[0],)} (use_dora), found {found}; "
            "the adapter is incomplete, save it again"
        )
    types = [info.dtype for info in (a, b, *([magnitude] if magnitude else []))]
    if not set(types) <= set(_FLOATS):
        raise FailedPrecondition(
            f"{module}: its matrices are {', '.join(types)}; expected {', '.join(_FLOATS)}"
        )
    return LoraPair(
        module,
        f"{module}.weight",
        a,
        b,
        settings.scale_of(module),
        transposed=transposed or embedding,
        embedding=embedding,
        magnitude=magnitude,
    )


def _some(items: Sequence[str]) -> str:
    return "; ".join(items[:_SHOWN])
