"""What a LLaMA-family configuration says that the tensors must be.

Responsibility: expected names and shapes from `config.json`, and the size of a
tokenizer from its files. Does not load anything, and knows no other families.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arriero.errors import DataLoss, FailedPrecondition
from arriero.weights import TensorInfo
from arriero.weights.config import is_tied, read_config

__all__ = [
    "LLAMA_FAMILY",
    "check_model",
    "expected_tensors",
    "is_tied",
    "read_config",
    "tokenizer_size",
]

# Architectures whose tensors are named and shaped as LLaMA's (extra ones, such as
# Qwen's biases and norms, are allowed).
LLAMA_FAMILY = (
    "LlamaForCausalLM",
    "LLaMAForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SmolLM3ForCausalLM",
)
_SHOWN = 3
# More than any model has; a configuration that says so is damaged, or means harm.
_MOST_LAYERS = 10_000
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
_INTEGERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")


def expected_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes that every LLaMA-family model of this configuration has.

    Raises:
        FailedPrecondition: a size is missing or no positive integer.
    """
    hidden, inner, layers, heads, vocabulary = (_size(config, name) for name in _SIZES)
    groups = _size(config, "num_key_value_heads", heads)
    head = _size(config, "head_dim", hidden // heads)
    if layers > _MOST_LAYERS:
        raise FailedPrecondition(
            f"config.json says num_hidden_layers {layers}; expected at most {_MOST_LAYERS}"
        )
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    if not is_tied(config):
        shapes["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (heads * head, hidden),
            prefix + "self_attn.k_proj.weight": (groups * head, hidden),
            prefix + "self_attn.v_proj.weight": (groups * head, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, heads * head),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (inner, hidden),
            prefix + "mlp.up_proj.weight": (inner, hidden),
            prefix + "mlp.down_proj.weight": (hidden, inner),
        }
    return shapes


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None and default is not None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = f"says {name} {value!r}" if name in config else f"lacks a size, {name}"
        raise FailedPrecondition(
            f"config.json {found}; expected {', '.join(_SIZES)} as positive integers"
        )
    return value


def tokenizer_size(directory: Path) -> int | None:
    """One more than the largest id of `tokenizer.json` and `added_tokens.json`.

    None when neither is there (SentencePiece alone is not opened).

    Raises:
        DataLoss: one of them is damaged.
    """
    largest = -1
    try:
        path = directory / "tokenizer.json"
        if path.is_file():
            data = json.loads(path.read_text(encoding="utf-8"))
            entries = data["model"].get("vocab", {})
            # Unigram models list [piece, score]; the others map piece to id.
            ids = range(len(entries)) if isinstance(entries, list) else entries.values()
            largest = max([largest, *ids, *(token["id"] for token in data["added_tokens"])])
        path = directory / "added_tokens.json"
        if path.is_file():
            largest = max([largest, *json.loads(path.read_text(encoding="utf-8")).values()])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataLoss(f"{path.name} is not a tokenizer's file: {error}; fetch it again") from error
    return largest + 1 if largest >= 0 else None


def check_model(directory: Path, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Hold configuration, tensors and tokenizer against each other.

    Returns:
        Warnings: what is odd, but may work.

    Raises:
        FailedPrecondition: what cannot work: a quantized checkpoint, missing
            tensors, other shapes, fewer embedding rows than the tokenizer has ids.
    """
    config = read_config(directory)
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
        raise FailedPrecondition(
            f"the model is quantized already ({method}); import the one that it was made from, "
            "adapters cannot be folded into quantized weights"
        )
    warnings: list[str] = []
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise FailedPrecondition(
            f"config.json says architectures {names!r}; expected a list, such as "
            '["LlamaForCausalLM"]'
        )
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, dict):
            raise FailedPrecondition(
                f"config.json says {key} {config[key]!r}; expected an object with rope_type"
            )
    if not any(name in LLAMA_FAMILY for name in names):
        warnings.append(
            f"architecture {', '.join(map(str, names)) or 'not named'} is not of the LLaMA family "
            f"({', '.join(LLAMA_FAMILY)}): tensors were not checked, later stages may refuse it"
        )
        return warnings
    if "auto_map" in config:
        warnings.append("config.json asks for code of its own (auto_map), which is never run")
    _check_tensors(expected_tensors(config), tensors)
    size = tokenizer_size(directory)
    rows = tensors["model.embed_tokens.weight"].shape[0]
    if size is None:
        if not (directory / "tokenizer.model").is_file():
            warnings.append("it has no tokenizer: rows cannot be prepared with it")
    elif size > rows:
        raise FailedPrecondition(
            f"the tokenizer has {size} ids, the embeddings {rows} rows; expected at least as "
            "many rows: use the model's own tokenizer, or the model that was extended for this one"
        )
    return warnings


def _check_tensors(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo]
) -> None:
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise FailedPrecondition(
            f"{len(missing)} of {len(expected)} tensors that config.json asks for are missing, "
            f"such as {', '.join(missing[:_SHOWN])}; configuration and weights do not belong "
            "together, or a shard was left out"
        )
    wrong = [
        f"{name} is {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if tensors[name].shape != shape
    ]
    if wrong:
        raise FailedPrecondition(
            f"{len(wrong)} tensors have other shapes than config.json says: "
            f"{'; '.join(wrong[:_SHOWN])}; configuration and weights do not belong together"
        )
    packed = [name for name in expected if tensors[name].dtype in _INTEGERS]
    if packed:
        raise FailedPrecondition(
            f"{len(packed)} weights are integers, such as {packed[0]} "
            f"({tensors[packed[0]].dtype}): the model is quantized already; import the one that it "
            "was made from"
        )
