"""What a model's weights amount to, from their headers alone.

Responsibility: count weights and bytes, and tell the dominant type. Does not know
tensors' contents or llama.cpp.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from arriero.errors import FailedPrecondition
from arriero.weights import TensorInfo, TensorPlan, Weights

# safetensors' word -> the converter's, for the GGUF type that holds it without loss.
_EXACT = {"F64": "f32", "F32": "f32", "BF16": "bf16"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights of a model.

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
        return _EXACT.get(self.dtype, "f16")

    @classmethod
    def of(cls, tensors: Iterable[TensorInfo | TensorPlan]) -> Self:
        """Add up tensors.

        Raises:
            FailedPrecondition: there are none.
        """
        by_dtype: Counter[str] = Counter()
        parameters = largest = 0
        for tensor in tensors:
            by_dtype[tensor.dtype] += tensor.nbytes
            parameters += (count := math.prod(tensor.shape))
            largest = max(largest, count)
        if not by_dtype:
            raise FailedPrecondition("the model's *.safetensors files hold no tensors")
        return cls(parameters, by_dtype.total(), largest, by_dtype.most_common(1)[0][0])


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read the headers of a model's safetensors files.

    Raises:
        FailedPrecondition: no safetensors files.
        DataLoss: a file is missing, cut off or no safetensors.
    """
    return Checkpoint.of(Weights.open(directory).values())
