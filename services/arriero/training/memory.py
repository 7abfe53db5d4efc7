"""What a training will need of memory, by component, and what would make it fit.

Responsibility: arithmetic over a model's config and counts, before anything is
loaded. Does not know how much memory there is, nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from arriero.errors import FailedPrecondition

__all__ = ["Demand", "Need", "fit", "gigabytes"]

# Interpreter, torch, transformers and PEFT, in bytes: measured 0.7 GB.
_LIBRARIES = 900_000_000
# Hidden-sized activations that one layer keeps for its backward pass: Korthikanti
# et al. 2022 (arXiv:2205.05198) count 34 bytes a value in 16 bits; SwiGLU's three
# intermediate ones are counted apart.
_KEPT_PER_LAYER = 17
# On GPUs norms, rotation and attention are a kernel each: what is kept is what they and the
# products take in, nine hidden-sized values and four intermediate ones.
_KEPT_ON_GPU = 9
# RMSNorm computes in float32 whatever its input is: two norms, input and result.
_FLOAT32_PER_LAYER = 4
# Logits and their gradient, of so many values at a time (`training.loss`): in float32, or
# in 16 bits in each of two lanes.
_PER_LOGIT, _LOGITS = 2 * 4, 1 << 25
# Bytes per parameter of a linear layer that bitsandbytes holds, scales included:
# a float32 for 64 values (quantized to a byte, and 256 of those share a float32).
_PACKED = {"nf4": 0.5 + 1 / 64, "fp4": 0.5 + 1 / 64, "int8": 1.01}
_SINGLE_SCALES = 3 / 64
_MOMENTS = {"adamw_torch": 8.0, "adamw_8bit": 2.1, "paged_adamw_8bit": 0.0}


@dataclass(frozen=True, slots=True)
class Demand:
    """What memory depends on.

    Attributes:
        config: the model's `config.json`.
        parameters: of the base; `linear` of them in layers that can be quantized.
        trained: parameters that the optimizer moves.
        full: whether they are the base's own.
        base_bytes: per parameter of the base, where it is not quantized: 4 or 2.
        quantization: `nf4`, `fp4`, `int8`, or none.
        double: the scales are quantized too.
        optimizer: transformers' name.
        rows: of a micro batch.
        length: tokens of the longest row.
        lengths: tokens of the longest rows, as many as `rows`, longest first; where they
            are not known, all have `length`. No token is padding.
        dropped: widths of the inputs that adapters drop values of, over all layers; each
            is kept once more, or the mask of it.
        gradient_checkpointing: keeps one layer's activations instead of all.
        host: the libraries count too.
        spread: processes that the base is spread over.
    """

    config: Mapping[str, Any]
    parameters: int
    linear: int
    trained: int
    full: bool
    base_bytes: int
    quantization: str
    double: bool
    optimizer: str
    rows: int
    length: int
    gradient_checkpointing: bool
    host: bool
    spread: int = 1
    lengths: tuple[int, ...] = ()
    dropped: int = 0

    @property
    def tokens(self) -> int:
        """Of the heaviest micro batch that there can be."""
        if not self.lengths:
            return self.rows * self.length
        return sum(min(length, self.length) for length in self.lengths[: self.rows])

    def need(self) -> Need:
        """The estimate, roughly and rather too much than too little."""
        hidden = int(self.config.get("hidden_size") or 0)
        layers = int(self.config.get("num_hidden_layers") or 0)
        inner = int(self.config.get("intermediate_size") or 4 * hidden)
        vocabulary = int(self.config.get("vocab_size") or 0)
        size = self.base_bytes
        if self.host:
            per_layer = size * (_KEPT_PER_LAYER * hidden + 3 * inner)
            if size < 4:
                per_layer += _FLOAT32_PER_LAYER * 4 * hidden
        else:
            per_layer = size * (_KEPT_ON_GPU * hidden + 4 * inner)
        kept = layers * per_layer + size * self.dropped
        if self.gradient_checkpointing:
            kept = layers * size * hidden + per_layer + size * self.dropped // max(1, layers)
        tokens = self.tokens
        return Need(
            weights=self._weights(),
            gradients=4 * self.trained,
            optimizer=round(_MOMENTS[self.optimizer] * self.trained),
            activations=tokens * kept,
            logits=min(tokens * vocabulary, _LOGITS) * _PER_LOGIT,
            libraries=_LIBRARIES if self.host else 0,
        )

    def _weights(self) -> int:
        if self.full:  # in float32, and a 16-bit copy of each layer while it computes
            return 4 * self.parameters
        packed = _PACKED.get(self.quantization)
        if packed is None:
            base = self.base_bytes * self.parameters
        else:
            if self.quantization != "int8" and not self.double:
                packed += _SINGLE_SCALES
            base = round(packed * self.linear + self.base_bytes * (self.parameters - self.linear))
        return base // self.spread + 4 * self.trained


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes by component."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    libraries: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, name) for name in self.__slots__)

    def __str__(self) -> str:
        """Largest first: `weights 1.2 GB, logits 0.3 GB`."""
        parts = sorted(((getattr(self, n), n) for n in self.__slots__), reverse=True)
        return ", ".join(f"{name} {gigabytes(size)}" for size, name in parts if size)


def gigabytes(size: int) -> str:
    """`1.23 GB`."""
    return f"{size / 1e9:.2f} GB"


def fit(demand: Demand, available: int, where: str) -> int:
    """The largest micro batch, halved from the one asked for, that fits.

    Args:
        demand: what was asked for.
        available: bytes that are free, `where` they are needed (such as `this host`).
        where: for the message.

    Raises:
        FailedPrecondition: not even one row at a time can; with the figures, and the
            knobs that would make it fit.
    """
    rows = demand.rows
    while replace(demand, rows=rows).need().total > available and rows > 1:
        rows //= 2
    least = replace(demand, rows=rows).need()
    # What activations take is known least well: only what even half of them leave is certain.
    if least.total - least.activations // 2 <= available:
        return rows
    raise FailedPrecondition(
        f"the training needs {gigabytes(least.total)} with micro_batch_size 1 ({least}), and "
        f"{where} has {gigabytes(available)} free; {_advice(demand, available)}",
        reason="OUT_OF_MEMORY",
        metadata={"needed_bytes": str(least.total), "available_bytes": str(available)},
    )


def _advice(demand: Demand, available: int) -> str:
    """The fewest knobs that would make it fit, or what even all of them leave."""
    knobs: list[tuple[str, dict[str, Any]]] = []
    if not demand.gradient_checkpointing:
        knobs.append(("gradient_checkpointing: true", {"gradient_checkpointing": True}))
    if demand.optimizer == "adamw_torch":
        knobs.append(("optim: adamw_8bit", {"optimizer": "adamw_8bit"}))
    if not demand.full and demand.base_bytes == 4:
        knobs.append(("dtype: bfloat16", {"base_bytes": 2}))
    if demand.full:
        # LoRA's own share of a model is below a hundredth.
        lora = {"full": False, "trained": demand.parameters // 100}
        knobs.append(("method: lora", lora))
    if demand.quantization in ("", "int8"):
        changes = {"quantization": "nf4", "double": True}
        four_bit = ("load_in_4bit: true", changes)
        if demand.full:
            four_bit = ("method: lora with load_in_4bit: true", {**lora, **changes})
        knobs.append(four_bit)
    if demand.length > 256:
        half = demand.length // 2
        knobs.append((f"rows of at most {half} tokens (cutoff_len)", {"length": half}))

    def fits(*chosen: tuple[str, dict[str, Any]]) -> bool:
        changes: dict[str, Any] = {"rows": 1}
        for _, change in chosen:
            changes |= change
        return replace(demand, **changes).need().total <= available

    for knob in knobs:
        if fits(knob):
            return f"{knob[0]} would make it fit"
    chosen: list[tuple[str, dict[str, Any]]] = []
    for knob in knobs:
        if knob[0].startswith("method: lora with") or not demand.full or knob[0] != "method: lora":
            chosen.append(knob)
        if chosen and fits(*chosen):
            return f"{' with '.join(name for name, _ in chosen)} would make it fit"
    return "no setting makes it fit: take a smaller model, or a machine with more memory"
