"""GGUF files that come from outside.

Responsibility: say what a GGUF is (quant type, bits per weight), and turn one
into a Hugging Face model through transformers. Does not quantize or run it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from arriero.errors import DataLoss, FailedPrecondition

__all__ = ["GgufFacts", "dequantize", "read_facts"]


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """What a GGUF's header says.

    Attributes:
        quant_type: as llama.cpp writes it, such as `Q4_1`.
        architecture: such as `llama`.
        elements: weights in the file.
        bits_per_weight: of the whole file.
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
        DataLoss: not GGUF, or cut off.
        FailedPrecondition: one part of a split file.
    """
    from gguf import GGUFReader, LlamaFileType

    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise DataLoss(
                f"{path.name} ({size} bytes) is not a GGUF file: it does not start with 'GGUF'"
            )
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        ends = [tensor.data_offset + tensor.n_bytes for tensor in reader.tensors]
    except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
        raise DataLoss(
            f"{path.name} is cut off or damaged ({type(error).__name__}: {error}); fetch it again"
        ) from error
    if max(ends, default=0) > size:
        raise DataLoss(f"{path.name} is cut off: it has {size} bytes, its header {max(ends)}")
    if int(fields.get("split.count", 1)) > 1:
        raise FailedPrecondition(
            f"{path.name} is one of {fields['split.count']} parts; join them with "
            "llama-gguf-split --merge and import the whole"
        )
    elements = sum(int(tensor.n_elements) for tensor in reader.tensors)
    if not elements:
        raise DataLoss(f"{path.name} holds no tensors; fetch it again")
    kind = _quant_type(fields.get("general.file_type"), LlamaFileType)
    if not kind:
        kind = _commonest(reader)
    return GgufFacts(
        quant_type=kind,
        architecture=str(fields.get("general.architecture", "")),
        elements=elements,
        bits_per_weight=8 * size / elements,
        license=str(fields.get("general.license", "")),
    )


def _quant_type(value: object, file_types: type) -> str:
    try:
        name: str = file_types(value).name
    except ValueError:
        return ""
    return name.removeprefix("MOSTLY_").removeprefix("ALL_")


def _commonest(reader: object) -> str:
    """The type of most weights, for files that name none."""
    counts: dict[str, int] = {}
    for tensor in reader.tensors:  # type: ignore[attr-defined]
        name = tensor.tensor_type.name
        counts[name] = counts.get(name, 0) + math.prod(int(n) for n in tensor.shape)
    return max(counts, key=lambda name: counts[name])


def dequantize(path: Path, target: Path, dtype: str) -> None:
    """Write a GGUF as a Hugging Face model with its tokenizer into `target`.

    The whole model is in memory meanwhile, in float32 tensor by tensor and in
    `dtype` all together.

    Args:
        path: a .gguf file.
        target: directory.
        dtype: `bfloat16`, `float16` or `float32`.

    Raises:
        FailedPrecondition: transformers cannot read this architecture or tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **place)
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), dtype=getattr(torch, dtype), **place
        )
    except (ValueError, KeyError, NotImplementedError, AttributeError) as error:
        raise FailedPrecondition(
            f"{path.name} cannot be turned into a model: {str(error).strip().splitlines()[0]}; "
            "import it as gguf, or import the original model"
        ) from error
    # The weights are dense now; with this left in, loading would quantize them again.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    model.save_pretrained(str(target))
    tokenizer.save_pretrained(str(target))
    _tidy(target)


def _tidy(target: Path) -> None:
    """Leave no trace of where the file lay, nor of its quantization."""
    for name in ("config.json", "tokenizer_config.json"):
        path = target / name
        data = json.loads(path.read_text(encoding="utf-8"))
        for key in ("quantization_config", "_name_or_path", "name_or_path", "gguf_file"):
            data.pop(key, None)
        path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
