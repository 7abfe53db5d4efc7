"""A base model with LoRA on it.

Responsibility: load the base, put LoRA on it, and save the adapter as PEFT does.
Does not know how it is trained.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.errors import FailedPrecondition
from arriero.training.plan import Lora, Quantization

if TYPE_CHECKING:
    import torch

_README = "README.md"


def load_base(
    directory: Path,
    dtype: torch.dtype,
    device: str,
    quantization: Quantization | None = None,
    whole: tuple[str, ...] = (),
) -> Any:
    """A causal language model from a Hugging Face directory; never runs its code.

    Args:
        directory: the model's.
        dtype: of its weights; where they are quantized, of the rest and of the sums.
        device: `cpu` or `cuda`.
        quantization: of its linear layers, by bitsandbytes.
        whole: names of modules that are not quantized, as they will be trained.

    Raises:
        FailedPrecondition: transformers does not know the architecture, or the
            weights do not fit it; bitsandbytes is missing or refuses.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # PEFT imports it wherever it is installed, needed or not; it warns of kernels it lacks.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # PEFT asks for it by a name that transformers is about to give up.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    packed = {}
    if quantization is not None:
        packed = {
            "quantization_config": _bits_and_bytes(quantization, dtype, whole),
            "device_map": {"": device},
        }
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            **packed,
        )
    except (ValueError, KeyError, RuntimeError, ImportError) as error:
        if "out of memory" in str(error).lower():
            raise
        lines = str(error).strip().splitlines()
        raise FailedPrecondition(
            f"transformers cannot load the model: {lines[0] if lines else type(error).__name__}"
        ) from error
    model.config.use_cache = False
    for module in model.modules():
        # Else bitsandbytes packs 4-bit weights for good at the first validation, on CPUs with
        # AVX512-BF16, and packed ones hand no gradients on: nothing would be trained.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # bitsandbytes' layers are where they belong, and may not be moved.
    return model if packed else model.to(device)


def _bits_and_bytes(quantization: Quantization, dtype: torch.dtype, whole: tuple[str, ...]) -> Any:
    try:
        import bitsandbytes  # type: ignore[import-untyped]  # noqa: F401
    except Exception as error:  # it loads a library of its own, and fails in its own ways
        raise FailedPrecondition(
            f"load_in_{quantization.bits}bit needs bitsandbytes, which cannot be imported here "
            f"({type(error).__name__}: {error}); install it, or train without"
        ) from error
    from transformers import BitsAndBytesConfig

    # It says once per layer that float32 inputs are rounded: in 8 bits they are.
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
    return BitsAndBytesConfig(
        load_in_4bit=quantization.bits == 4,
        load_in_8bit=quantization.bits == 8,
        bnb_4bit_quant_type=quantization.kind,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=dtype,
        # Given any, transformers leaves out only these: the output layer is one of them.
        llm_int8_skip_modules=["lm_head", *whole],
    )


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
        use_dora=lora.dora,
        modules_to_save=list(lora.modules_to_save) or None,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        # Tied embeddings stay tied: one weight is trained, and saved under both names.
        ensure_weight_tying=bool(model.config.tie_word_embeddings and lora.modules_to_save),
    )
    stored = model.dtype
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
    _train_whole(wrapped, stored)
    if lora.dora:
        _exact_magnitudes(wrapped)
    # PEFT takes the directory that the base came from, which means nothing elsewhere.
    wrapped.peft_config["default"].base_model_name_or_path = base
    for module in wrapped.modules():
        # Autocast chooses the type of each product; casting inputs to the float32
        # of LoRA's weights before that is work for nothing (a tenth of a step).
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    return wrapped


def _train_whole(model: Any, stored: torch.dtype) -> None:
    """Give `modules_to_save` float32 weights, and outputs in the base's type as before.

    PEFT leaves their copies in the base's type, whose steps are larger than AdamW's.
    """
    import torch
    from peft.utils.other import ModulesToSaveWrapper

    def narrow(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.to(stored)

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            copy = module.modules_to_save["default"]
            copy.float()
            if isinstance(copy, torch.nn.Embedding) and stored != torch.float32:
                copy.register_forward_hook(narrow)


def _exact_magnitudes(model: Any) -> None:
    """Compute the norms that DoRA divides by in float32, as the merge does.

    PEFT rounds them to the base's type: in bfloat16 every row would be scaled wrongly
    by up to a quarter of a percent.
    """
    import torch
    from peft.tuners.lora.dora import DoraLinearLayer
    from peft.utils.integrations import dequantize_module_weight

    def weight_norm(
        weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, adapter_name: str = ""
    ) -> torch.Tensor:
        return torch.linalg.vector_norm(weight.float() + scaling * lora_weight.float(), dim=1)

    for module in model.modules():
        magnitudes = getattr(module, "lora_magnitude_vector", None)
        if magnitudes and isinstance(magnitudes["default"], DoraLinearLayer):
            layer = magnitudes["default"]
            layer.get_weight_norm = weight_norm
            # B is zero yet, so the norm is the base's own.
            whole = dequantize_module_weight(module.base_layer).float()
            layer.weight.data = torch.linalg.vector_norm(whole, dim=1)


def core(model: Any) -> Any:
    """The transformers model, with or without LoRA on it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def spare_activations(model: Any) -> None:
    """Compute activations again in the backward pass instead of keeping them."""
    base = core(model)
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
