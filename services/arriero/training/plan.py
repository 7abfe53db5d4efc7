"""What a training is going to do, in numbers.

Responsibility: hyperparameters after all defaults, and what follows from them:
steps, warmup, memory. Pure arithmetic; knows neither protos nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Schedulers of transformers.get_scheduler that need nothing but steps and warmup.
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
OPTIMIZERS = ("adamw_torch",)
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Weight, gradient and two moments of AdamW, float32 each.
_BYTES_PER_TRAINED = 16
# What a checkpoint holds of them: weight and moments.
_BYTES_PER_SAVED = 12
# Interpreter, torch, transformers and PEFT, in bytes: measured 0.7 GB.
_LIBRARIES = 900_000_000
# Hidden-sized activations that one layer keeps for its backward pass: Korthikanti
# et al. 2022 (arXiv:2205.05198) count 34 bytes a value in 16 bits; SwiGLU's three
# intermediate ones are counted apart.
_KEPT_PER_LAYER = 17


@dataclass(frozen=True, slots=True)
class Plan:
    """A training, resolved.

    Attributes:
        rows: of the dataset.
        num_epochs: may be a fraction.
        max_steps: overrides `num_epochs` when above 0.
        batch_size: rows per optimizer step.
        micro_batch_size: rows per forward pass; divides `batch_size`.
        warmup: steps, or below 1 a share of all steps.
        max_grad_norm: 0 leaves gradients as they are.
        save_steps: optimizer steps between checkpoints; 0 means one a minute.
        dtype: `auto`, `float32`, `bfloat16`, `float16`.
    """

    rows: int
    num_epochs: float = 3.0
    max_steps: int = 0
    batch_size: int = 16
    micro_batch_size: int = 4
    learning_rate: float = 3e-4
    scheduler: str = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    group_by_length: bool = False
    seed: int = 42
    dtype: str = "auto"
    save_steps: int = 0
    save_total_limit: int = 2
    gradient_checkpointing: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every row once; the last one may see fewer rows."""
        return max(1, math.ceil(self.rows / self.batch_size))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        if self.max_steps > 0:
            return self.max_steps
        # Rounded first: 0.1 epochs of 30 steps are 3 steps, not 4.
        return max(1, math.ceil(round(self.num_epochs * self.steps_per_epoch, 6)))

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises.

        Shares are rounded up, as transformers does. The rate of the first of n
        warmup steps is 0 there, so at least one step of a training is left to it.
        """
        if self.warmup >= 1:
            return int(self.warmup)
        share = math.ceil(round(self.warmup * self.total_steps, 6))
        return min(share, self.total_steps - 1)


@dataclass(frozen=True, slots=True)
class Lora:
    """PEFT's LoraConfig, as far as this build has it; `targets` is `all-linear` or names."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: str | tuple[str, ...] = ("q_proj", "v_proj")
    rslora: bool = False


def trained_parameters(modules: Mapping[str, tuple[int, int]], rank: int) -> int:
    """Parameters of A (rank, in) and B (out, rank) over modules of shape (out, in)."""
    return sum(rank * (out + inner) for out, inner in modules.values())


def checkpoint_bytes(parameters: int) -> int:
    """Bytes of one checkpoint, with a reserve for states and manifest."""
    return parameters * _BYTES_PER_SAVED + (1 << 20)


def memory_bytes(
    config: Mapping[str, Any],
    *,
    parameters: int,
    trained: int,
    rows: int,
    length: int,
    gradient_checkpointing: bool,
) -> int:
    """Memory that a training needs, roughly and rather too much than too little.

    Args:
        config: the model's `config.json`.
        parameters: of the base, counted in float32 (a CPU without fast bfloat16).
        trained: LoRA's.
        rows: of a micro batch.
        length: tokens of the longest row.
        gradient_checkpointing: keeps one layer's activations instead of all.
    """
    hidden = int(config.get("hidden_size", 0))
    layers = int(config.get("num_hidden_layers", 0))
    inner = int(config.get("intermediate_size", 4 * hidden))
    vocabulary = int(config.get("vocab_size", 0))
    per_layer = 4 * (_KEPT_PER_LAYER * hidden + 3 * inner)
    kept = layers * 4 * hidden + per_layer if gradient_checkpointing else layers * per_layer
    # Logits, their float32 copy and their gradient.
    per_token = kept + 3 * 4 * vocabulary
    return _LIBRARIES + parameters * 4 + trained * _BYTES_PER_TRAINED + rows * length * per_token
