"""GGUF files that come from outside.

Responsibility: say what a GGUF is (quant type, bits per weight), and turn one
into a Hugging Face model through transformers. Does not quantize or run it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.errors import DataLoss, FailedPrecondition
from arriero.merging.files import write_json
from arriero.merging.gguf_rope import rope_scaling

__all__ = ["GgufFacts", "dequantize", "read_facts"]

_TRACES = (
    "quantization_config",
    "_name_or_path",
    "_model_name_or_path",
    "name_or_path",
    "gguf_file",
    "local_files_only",
    "is_local",
)


# Pre-tokenizers by which llama.cpp takes each digit for itself before GPT-2's own
# splitting (LLAMA_VOCAB_PRE_TYPE_SMOLLM and its like in llama-vocab.cpp).
_SINGLE_DIGITS = frozenset(
    {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}
)


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """What a GGUF's header says.

    Attributes:
        quant_type: as llama.cpp writes it, such as `Q4_1`.
        architecture: such as `llama`.
        elements: weights in the file.
        bits_per_weight: of the tensors' data, as llama.cpp counts it.
        license: what the file says of itself; may be empty.
    """

    quant_type: str
    architecture: str
    elements: int
    bits_per_weight: float
    license: str


def read_facts(path: Path) -> GgufFacts:
    """Read a GGUF's header.

    Raises:
        DataLoss: not GGUF, cut off, or without tensors.
        FailedPrecondition: one part of a split file.
    """
    from arriero.llama import QUANT_TYPES, read_header

    header = read_header(path)
    fields = header.metadata
    if int(fields.get("split.count", 1)) > 1:
        raise FailedPrecondition(
            f"{path.name} is one of {fields['split.count']} parts; join them with "
            "llama-gguf-split --merge and import the whole"
        )
    if not header.parameters:
        raise DataLoss(f"{path.name} holds no tensors; fetch it again")
    number = fields.get("general.file_type")
    named = [row.name for row in QUANT_TYPES.values() if row.ftype == number]
    counts: dict[str, int] = {}
    for tensor in header.tensors:
        counts[tensor.type] = counts.get(tensor.type, 0) + tensor.elements
    return GgufFacts(
        # A file that does not say is called by the type of most of its weights.
        quant_type=named[0] if named else max(counts, key=lambda name: counts[name]),
        architecture=str(fields.get("general.architecture", "")),
        elements=header.parameters,
        bits_per_weight=header.bits_per_weight,
        license=str(fields.get("general.license", "")),
    )


def dequantize(path: Path, target: Path, dtype: str) -> None:
    """Write a GGUF as a Hugging Face model with its tokenizer into `target`.

    The whole model is in memory meanwhile, in float32 tensor by tensor and in
    `dtype` all together.

    Args:
        path: a .gguf file.
        target: directory.
        dtype: `bfloat16`, `float16` or `float32`.

    Raises:
        FailedPrecondition: transformers cannot read this architecture or tokenizer;
            tensors that do not fit it; rope scaling that has no words.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    from arriero.llama import read_header

    header = read_header(path)
    scaling = rope_scaling(path, header)
    logging.disable_progress_bar()
    place = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **place)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            str(path.parent),
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **place,
        )
    except MemoryError:
        raise
    except Exception as error:  # what transformers stumbles over has many types
        if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the file's
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FailedPrecondition(
            f"{path.name} cannot be turned into a model: {said}; import it as gguf, or import "
            "the original model"
        ) from error
    _check_loaded(path, loaded)
    # The weights are dense now; transformers goes on calling the model quantized,
    # refuses to save it so, and would quantize it again when loading.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    model.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
    _match_llama_cpp(header.metadata, target / "tokenizer.json")
    _tidy(target, scaling)


def _check_loaded(path: Path, loaded: Mapping[str, Collection[str]]) -> None:
    """Refuse what transformers fills with random numbers, or leaves out, and only warns of."""
    for key, verb in (("missing_keys", "lacks"), ("unexpected_keys", "has over")):
        if names := sorted(map(str, loaded.get(key) or ())):
            raise FailedPrecondition(
                f"{path.name} {verb} {len(names)} tensors, such as {', '.join(names[:3])}; "
                "import it as gguf, or import the original model"
            )


def _match_llama_cpp(fields: Mapping[str, Any], tokenizer: Path) -> None:
    """Let the tokenizer give the ids that llama.cpp gives.

    transformers splits some GPT-2 style vocabularies otherwise, and puts no space
    before a text that begins with one; trained on its ids, the model would be served
    with others.
    """
    data = json.loads(tokenizer.read_text(encoding="utf-8"))
    if fields.get("tokenizer.ggml.model") == "llama":
        prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
        data["normalizer"] = {
            "type": "Sequence",
            "normalizers": [
                *([{"type": "Prepend", "prepend": "▁"}] if prefix else []),
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        }
        data["pre_tokenizer"] = None
    elif fields.get("tokenizer.ggml.pre") in _SINGLE_DIGITS:
        _split_digits(data)
    else:
        return
    tokenizer.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")


def _split_digits(data: dict[str, Any]) -> None:
    digits = {"type": "Digits", "individual_digits": True}
    found = data.get("pre_tokenizer")
    if digits in (found, *(found or {}).get("pretokenizers", ())):
        return
    data["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [digits, *([found] if found else [])],
    }


def _tidy(target: Path, scaling: Mapping[str, Any]) -> None:
    """Leave no trace of where the file lay, nor of its quantization; say how rope is scaled."""
    for name in ("config.json", "tokenizer_config.json"):
        path = target / name
        data = json.loads(path.read_text(encoding="utf-8"))
        for key in _TRACES:
            data.pop(key, None)
        if scaling and name == "config.json":
            data["rope_parameters"] = {**(data.get("rope_parameters") or {}), **scaling}
        write_json(path, data)
