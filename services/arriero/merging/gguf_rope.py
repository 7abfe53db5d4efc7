"""How a GGUF file stretches rotary positions, in Hugging Face's words.

Responsibility: from a file's metadata and its `rope_freqs` tensor, both of which
transformers leaves unread, to entries of `rope_parameters`. Does not know the
rest of a model.

Sources: the keys `*.rope.scaling.*` of the GGUF specification; the formula of
Llama 3.1's scaled rope as Meta published it (`apply_scaling`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.errors import FailedPrecondition
from arriero.llama import Header

__all__ = ["rope_scaling"]

_BASE = 10000.0
_FACTORS = "rope_freqs.weight"
# Of all of Meta's releases. The file has only what follows from them and from the
# context that the model had first, which is found by trying.
_LOW, _HIGH = 1.0, 4.0
_FIRST_CONTEXTS = (8192, *(1 << power for power in range(7, 18)))
_TOLERANCE = 1e-4


def rope_scaling(path: Path, header: Header) -> dict[str, Any]:
    """What `rope_parameters` has to say beside the base; empty: positions are not stretched.

    Args:
        path: of the file.
        header: of the same file.

    Raises:
        FailedPrecondition: stretched in a way that has no words here.
    """
    fields = header.metadata
    prefix = f"{fields.get('general.architecture', '')}.rope."
    factor = float(fields.get(prefix + "scaling.factor", fields.get(prefix + "scale_linear", 0)))
    kind = str(fields.get(prefix + "scaling.type", "linear" if factor else "none"))
    factors = _factors(path, header)
    if factors is not None and kind == "none":
        return _llama3(path, factors, float(fields.get(prefix + "freq_base", _BASE)))
    if factors is None and (kind == "none" or (kind == "linear" and factor in (0, 1))):
        return {}
    if factors is None and kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    native = fields.get(prefix + "scaling.original_context_length")
    if factors is None and kind == "yarn" and factor and native:
        words: dict[str, Any] = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": int(native),
        }
        for name in ("beta_fast", "beta_slow"):
            if (value := fields.get(f"{prefix}scaling.yarn_{name}")) is not None:
                words[name] = float(value)
        return words
    raise _unknown(path, f"of type {kind!r}" + (", and by factors" if factors is not None else ""))


def _factors(path: Path, header: Header) -> npt.NDArray[np.float64] | None:
    """What each pair's frequency is divided by; None where the file has no such tensor."""
    for tensor in header.tensors:
        if tensor.name.startswith("rope_factors_"):
            raise _unknown(path, f"by {tensor.name}")
        if tensor.name == _FACTORS and tensor.type == "F32":
            with path.open("rb") as file:
                file.seek(header.data_offset + tensor.offset)
                return np.frombuffer(file.read(tensor.size), dtype="<f4").astype(np.float64)
    return None


def _llama3(path: Path, factors: npt.NDArray[np.float64], base: float) -> dict[str, Any]:
    factor = round(float(factors.max()), 4)
    if factor == 1:
        return {}
    lengths = 2 * math.pi * base ** (np.arange(factors.size) / factors.size)
    for native in _FIRST_CONTEXTS:
        smooth = np.clip((native / lengths - _LOW) / (_HIGH - _LOW), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if np.allclose(factors, expected, rtol=_TOLERANCE):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": native,
            }
    raise _unknown(path, f"by other factors in {_FACTORS} than Llama 3.1's formula gives")


def _unknown(path: Path, how: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{path.name} stretches rotary positions {how}, for which no rope_parameters are known; "
        "import it as gguf, or import the original model"
    )
