"""Rotary positions of a model's configuration and of its GGUF file, as numbers.

Responsibility: the angle by which each pair of dimensions turns per token, as
transformers computes it from `config.json` and as llama.cpp does from a file's
metadata. Does not know who judges the difference.

Comparing the frequencies instead of the words for them catches whatever gets lost
between the two, under whichever name. Sources: RoFormer (Su et al. 2021), YaRN
(Peng et al. 2023), the Llama 3.1 release; llama.cpp's `ggml_rope_yarn`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.llama import Header

Frequencies = npt.NDArray[np.float64]

_BASE = 10000.0
# llama.cpp's defaults of YaRN, transformers' too.
_BETA_FAST, _BETA_SLOW = 32.0, 1.0
_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class Rope:
    """How positions turn.

    Attributes:
        kind: `default`, `linear`, `dynamic`, `yarn`, `llama3`; another word when
            it is not known here, and `frequencies` then are those without scaling.
        frequencies: radians per token of each pair of dimensions, shape (dims / 2,).
        attention: factor of cosine and sine (YaRN's temperature).
        context: tokens that the model says it is for.
        base: the frequencies' base.
    """

    kind: str
    frequencies: Frequencies
    attention: float
    context: int
    base: float

    @property
    def known(self) -> bool:
        """Whether `frequencies` can be relied on."""
        return self.kind in ("default", "linear", "dynamic", "yarn", "llama3")


def of_config(config: Mapping[str, Any]) -> Rope:
    """What transformers makes of `config.json`, up to the context that it names.

    Within that context dynamic NTK scaling changes nothing yet.
    """
    scaling: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = scaling.get("full_attention", scaling)
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default").lower()
    base = float(scaling.get("rope_theta") or config.get("rope_theta") or _BASE)
    heads = int(config["num_attention_heads"])
    head = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    partial = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    dims = int(head * float(partial))
    context = int(config.get("max_position_embeddings") or 0)
    plain = _plain(base, dims)
    factor = float(scaling.get("factor") or 1.0)
    native = int(
        scaling.get("original_max_position_embeddings")
        or config.get("original_max_position_embeddings")
        or context
    )
    attention = 1.0
    if kind == "linear":
        plain = plain / factor
    elif kind == "llama3":
        plain = _llama3(plain, factor, native, scaling)
    elif kind == "yarn":
        beta = (
            float(scaling.get("beta_fast") or _BETA_FAST),
            float(scaling.get("beta_slow") or _BETA_SLOW),
        )
        plain = _yarn(plain, base, dims, factor, native, beta, bool(scaling.get("truncate", True)))
        attention = _temperature(factor, scaling)
    return Rope(kind, plain, attention, context, base)


def of_file(path: Path, header: Header) -> Rope:
    """What llama.cpp makes of a GGUF file's metadata and its `rope_freqs` tensor."""
    found = header.metadata
    prefix = f"{found.get('general.architecture', '')}."

    def number(key: str, default: float) -> float:
        return float(found.get(prefix + key, default))

    heads = number("attention.head_count", 1)
    head = number("attention.key_length", number("embedding_length", 0) // max(heads, 1))
    dims = int(number("rope.dimension_count", head))
    base = number("rope.freq_base", _BASE)
    context = int(number("context_length", 0))
    factor = number("rope.scaling.factor", number("rope.scale_linear", 0)) or 1.0
    kind = str(found.get(prefix + "rope.scaling.type", "none" if factor == 1.0 else "linear"))
    frequencies = _plain(base, dims)
    attention = number("rope.scaling.attn_factor", 1.0)
    if kind == "yarn":
        beta = (
            number("rope.scaling.yarn_beta_fast", _BETA_FAST),
            number("rope.scaling.yarn_beta_slow", _BETA_SLOW),
        )
        native = int(number("rope.scaling.original_context_length", context))
        frequencies = _yarn(frequencies, base, dims, factor, native, beta, truncate=True)
        attention *= _mscale(factor)
        if log_multiplier := number("rope.scaling.yarn_log_multiplier", 0):
            attention /= _mscale(factor, log_multiplier)
    elif kind == "linear":
        frequencies = frequencies / factor
    factors = _tensor(path, header, _FACTORS)
    if factors is not None and factors.shape == frequencies.shape:
        frequencies = frequencies / factors
        kind = "llama3" if kind == "none" else kind
    return Rope("default" if kind == "none" else kind, frequencies, attention, context, base)


def difference(expected: Rope, found: Rope) -> float:
    """The largest relative difference of any frequency or of the attention factor.

    Infinite where the number of dimensions differs.
    """
    if expected.frequencies.shape != found.frequencies.shape:
        return math.inf
    apart = np.abs(found.frequencies / expected.frequencies - 1.0)
    return max(float(apart.max(initial=0.0)), abs(found.attention / expected.attention - 1.0))


def _plain(base: float, dims: int) -> Frequencies:
    result: Frequencies = base ** (-np.arange(0, dims, 2, dtype=np.float64) / max(dims, 1))
    return result


def _yarn(
    plain: Frequencies,
    base: float,
    dims: int,
    factor: float,
    native: int,
    beta: tuple[float, float],
    truncate: bool,
) -> Frequencies:
    """Fast dimensions keep their frequency, slow ones are divided by `factor`."""

    def turns_at(rotations: float) -> float:
        return dims * math.log(native / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = turns_at(beta[0]), turns_at(beta[1])
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / max(high - low, 0.001), 0, 1)
    mixed: Frequencies = plain * (1 - ramp) + plain / factor * ramp
    return mixed


def _llama3(
    plain: Frequencies, factor: float, native: int, scaling: Mapping[str, Any]
) -> Frequencies:
    """Long wavelengths are divided by `factor`, with a smooth passage to short ones."""
    low = float(scaling.get("low_freq_factor") or 1.0)
    high = float(scaling.get("high_freq_factor") or 4.0)
    turns = native * plain / (2 * math.pi)
    smooth = np.clip((turns - low) / max(high - low, 1e-9), 0, 1)
    result: Frequencies = plain * ((1 - smooth) / factor + smooth)
    return result


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _temperature(factor: float, scaling: Mapping[str, Any]) -> float:
    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)
    over, under = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if over and under:
        return _mscale(factor, float(over)) / _mscale(factor, float(under))
    return _mscale(factor)


def _tensor(path: Path, header: Header, name: str) -> Frequencies | None:
    """A float32 tensor of a file; None where there is none."""
    for tensor in header.tensors:
        if tensor.name == name and tensor.type == "F32":
            with path.open("rb") as file:
                file.seek(header.data_offset + tensor.offset)
                return np.frombuffer(file.read(tensor.size), dtype="<f4").astype(np.float64)
    return None
