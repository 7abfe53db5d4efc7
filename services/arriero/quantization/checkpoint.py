"""What a model directory holds, from its safetensors headers alone.

Responsibility: count weights and bytes, and tell the dominant dtype. Does not
know tensors' contents or llama.cpp.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from arriero.errors import DataLoss, FailedPrecondition

# The safetensors library refuses larger headers too.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights of a model directory.

    Attributes:
        parameters: numbers stored.
        size: bytes of all tensors.
        largest: numbers in the largest tensor.
        dtype: as safetensors writes it (`F32`, `BF16`, ...), of most bytes.
    """

    parameters: int
    size: int
    largest: int
    dtype: str

    @property
    def exact_type(self) -> str:
        """The GGUF type, as the converter takes it, that holds these weights without loss."""
        return {"F32": "f32", "BF16": "bf16"}.get(self.dtype, "f16")


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read the headers of all safetensors files of a model.

    Raises:
        FailedPrecondition: no safetensors files.
        DataLoss: a file is cut off or no safetensors.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FailedPrecondition(
            "the model has no *.safetensors files; expected a Hugging Face model directory"
        )
    by_dtype: Counter[str] = Counter()
    parameters = largest = 0
    for path in files:
        for dtype, count, size in _tensors(path):
            by_dtype[dtype] += size
            parameters += count
            largest = max(largest, count)
    if not by_dtype:
        raise FailedPrecondition("the model's *.safetensors files hold no tensors")
    return Checkpoint(parameters, by_dtype.total(), largest, by_dtype.most_common(1)[0][0])


def _tensors(path: Path) -> list[tuple[str, int, int]]:
    """dtype, numbers and bytes of each tensor (format: the safetensors README)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):  # at least `{}`
            raise DataLoss(f"{path.name} is not a safetensors file, or it is cut off")
        try:
            header = json.loads(file.read(length))
            found = []
            for name, tensor in header.items():
                if name == "__metadata__":
                    continue
                count = 1
                for extent in tensor["shape"]:
                    count *= int(extent)
                start, end = tensor["data_offsets"]
                if not 0 <= start <= end <= size - 8 - length:
                    raise DataLoss(f"{path.name} is cut off: tensor {name} ends past its end")
                found.append((str(tensor["dtype"]), count, end - start))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataLoss(f"{path.name} has a damaged safetensors header: {error}") from error
    return found
