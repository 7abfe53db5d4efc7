"""A base model with LoRA on it.

Responsibility: load the base, put LoRA on it, and save the adapter as PEFT does.
Does not know how it is trained.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.errors import FailedPrecondition
from arriero.training.plan import Lora

if TYPE_CHECKING:
    import torch

_README = "README.md"


def load_base(directory: Path, dtype: torch.dtype, device: str) -> Any:
    """A causal language model from a Hugging Face directory; never runs its code.

    Raises:
        FailedPrecondition: transformers does not know the architecture, or the
            weights do not fit it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (ValueError, KeyError, RuntimeError) as error:
        if "out of memory" in str(error).lower():
            raise
        lines = str(error).strip().splitlines()
        raise FailedPrecondition(
            f"transformers cannot load the model: {lines[0] if lines else type(error).__name__}"
        ) from error
    model.config.use_cache = False
    return model.to(device)


def attach(model: Any, lora: Lora, *, base: str, seed: int) -> Any:
    """Put LoRA on a model; its weights are float32 whatever the base's are.

    Args:
        model: from `load_base`.
        lora: what to put on it.
        base: the base's digest, recorded in the adapter.
        seed: of A; B starts at zero.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        use_rslora=lora.rslora,
    )
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
    # PEFT takes the directory that the base came from, which means nothing elsewhere.
    wrapped.peft_config["default"].base_model_name_or_path = base
    for module in wrapped.modules():
        # Autocast chooses the type of each product; casting inputs to the float32
        # of LoRA's weights before that is work for nothing (a tenth of a step).
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    return wrapped


def spare_activations(model: Any) -> None:
    """Compute activations again in the backward pass instead of keeping them."""
    base = model.get_base_model()
    # transformers 5.23 renamed it; 6 is going to drop the old name.
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    # The reentrant kind gives no gradients where inputs need none, as here.
    enable({"use_reentrant": False})


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """What the optimizer moves, by name, in the model's order."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def save(model: Any, directory: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`."""
    # `auto` would ask the hub whether the base's vocabulary was resized.
    model.save_pretrained(str(directory), save_embedding_layers=False)
    # PEFT's model card is a form that nobody filled in.
    (directory / _README).unlink(missing_ok=True)
