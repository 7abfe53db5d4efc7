"""What a training is going to do, in numbers.

Responsibility: hyperparameters after all defaults, and what follows from them:
steps, warmup, what is trained. Pure arithmetic; knows neither protos nor torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

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
OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")
METHODS = ("lora", "full")
FOUR_BIT_TYPES = ("nf4", "fp4")
DTYPES = ("auto", "float32", "bfloat16", "float16")


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
        betas, epsilon: of AdamW.
        neftune_alpha: noise on the embeddings; 0 means none.
        eval_steps: optimizer steps between validations; 0 means each epoch's end.
        patience: validations without an improvement of more than `threshold` nats
            after which the training ends; 0 means never.
        load_best: hand on the weights of the lowest validation loss.
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
    fsdp: bool = False
    optimizer: str = "adamw_torch"
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    neftune_alpha: float = 0.0
    eval_steps: int = 0
    patience: int = 0
    threshold: float = 0.0
    load_best: bool = False

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

    def validates_at(self, step: int) -> bool:
        """Whether the held-out rows are looked at after so many steps."""
        every = self.eval_steps or self.steps_per_epoch
        return step > 0 and (step % every == 0 or step == self.total_steps)


@dataclass(frozen=True, slots=True)
class Lora:
    """PEFT's LoraConfig, by its names; `targets` is `all-linear` or names.

    `rank_pattern` and `alpha_pattern` override by module: the first key that matches
    the whole name or a dotted ending of it (PEFT's rule).
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: str | tuple[str, ...] = ("q_proj", "v_proj")
    rslora: bool = False
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """The rank that a module gets."""
        for pattern, rank in self.rank_pattern.items():
            if pattern_matches(pattern, module):
                return rank
        return self.rank

    def parameters(self, modules: Mapping[str, tuple[int, int]]) -> int:
        """Parameters of A (rank, in) and B (out, rank), and of DoRA's magnitudes (out).

        Args:
            modules: those that are targeted, with their shapes (out, in).
        """
        return sum(
            self.rank_of(name) * (out + inner) + (out if self.dora else 0)
            for name, (out, inner) in modules.items()
        )


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the base is held while it is trained on (QLoRA, Dettmers et al. 2023).

    Attributes:
        bits: 4 or 8.
        kind: `nf4` or `fp4`; of 4 bits only.
        double: quantize the scales too; of 4 bits only.
    """

    bits: int
    kind: str = "nf4"
    double: bool = True

    @property
    def name(self) -> str:
        """`nf4`, `fp4` or `int8`."""
        return self.kind if self.bits == 4 else "int8"


def pattern_matches(pattern: str, module: str) -> bool:
    """PEFT's rule for keys of `rank_pattern`; a pattern that is no regular expression: False."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return False
