"""A model's weights with more rows in its embeddings, one tensor at a time.

Responsibility: the new rows of `embed_tokens` and `lm_head`, and every other
tensor byte by byte. Does not know where ids come from.

A new row is the mean of the rows of the old tokens that its text was cut into
before, so that the model begins by reading it as it read those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.errors import FailedPrecondition
from arriero.weights.layout import TensorInfo, TensorPlan
from arriero.weights.reader import Weights
from arriero.weights.writer import WeightsWriter

__all__ = ["HEAD", "INPUT", "check", "resize"]

INPUT, HEAD = "embed_tokens.weight", "lm_head.weight"
_BLOCK = 4096
_STORED: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}

Rows = npt.NDArray[Any]


def check(weights: Weights, *, tied: bool) -> list[str]:
    """The names of the tensors with a row for each token, the input embedding first.

    Raises:
        FailedPrecondition: there is none, or not a head where the model needs one.
    """
    inputs = [name for name in weights if name == INPUT or name.endswith(f".{INPUT}")]
    heads = [name for name in weights if name == HEAD or name.endswith(f".{HEAD}")]
    if len(inputs) != 1 or len(heads) > 1 or not (heads or tied):
        raise FailedPrecondition(
            f"the model has {len(inputs)} tensors {INPUT} and {len(heads)} {HEAD}; expected one "
            "each (the second may be left out where the config ties them)"
        )
    names = inputs + heads
    for name in names:
        info = weights[name]
        if info.dtype not in _STORED or len(info.shape) != 2:
            raise FailedPrecondition(
                f"{name} is {info.dtype} of shape {list(info.shape)}; expected rows of "
                f"{', '.join(_STORED)}: extend the model before it is quantized"
            )
    return names


def resize(
    weights: Weights,
    target: Path,
    names: Sequence[str],
    *,
    rows: int,
    origins: Mapping[int, Sequence[int]],
    tokens: int,
    scratch: Path,
    report: Callable[[int, int], None],
) -> None:
    """Write the model with `rows` rows in the named tensors.

    Args:
        weights: of the model.
        target: directory.
        names: from `check`.
        rows: from now on, at least what the tensors have.
        origins: old ids by new id; the mean of these rows is taken, of all old tokens'
            rows where there are none.
        tokens: old ones; rows from here on that `origins` does not name are padding.
        scratch: directory for one tensor at a time.
        report: called with bytes done and in all.
    """
    plan = [
        TensorPlan(name, info.dtype, (rows, info.shape[1]) if name in names else info.shape)
        for name, info in weights.items()
    ]
    total, done = sum(item.nbytes for item in plan), 0
    with WeightsWriter(target, plan) as writer:
        for item in plan:
            report(done, total)
            if item.name in names:
                place = scratch / "rows.bin"
                grown = _grown(weights, item.name, rows, origins, tokens, place)
                writer.write_raw(item.name, memoryview(grown).cast("B"))  # type: ignore[arg-type]
                del grown
                place.unlink()
            else:
                writer.write_raw(item.name, weights.raw(item.name))
            done += item.nbytes
    report(total, total)


def _grown(
    weights: Weights,
    name: str,
    rows: int,
    origins: Mapping[int, Sequence[int]],
    tokens: int,
    place: Path,
) -> Rows:
    info = weights[name]
    old = np.frombuffer(weights.raw(name), dtype=_STORED[info.dtype]).reshape(info.shape)
    # In a file: a large vocabulary's rows alone may be more than the memory there is.
    new = np.memmap(place, dtype=old.dtype, mode="w+", shape=(rows, info.shape[1]))
    for start in range(0, len(old), _BLOCK):
        end = min(start + _BLOCK, len(old))
        new[start:end] = old[start:end]
    mean = _mean(old, range(tokens), info)
    for number in range(tokens, rows):
        ids = origins.get(number)
        if ids:
            new[number] = _stored(_mean(old, ids, info), info)
        elif number in origins or number >= len(old):
            new[number] = _stored(mean, info)
    return new


def _mean(old: Rows, ids: Sequence[int], info: TensorInfo) -> Rows:
    total = np.zeros(old.shape[1], dtype=np.float64)
    for start in range(0, len(ids), _BLOCK):
        total += _floats(old[list(ids[start : start + _BLOCK])], info).sum(0, dtype=np.float64)
    return np.asarray(total / len(ids), dtype=np.float32)


def _floats(stored: Rows, info: TensorInfo) -> Rows:
    if info.dtype != "BF16":
        return stored.astype(np.float32)
    return (stored.astype(np.uint32) << 16).view(np.float32)


def _stored(values: Rows, info: TensorInfo) -> Rows:
    """float32 in the tensor's type, rounded to nearest, ties to even."""
    if info.dtype != "BF16":
        return values.astype(_STORED[info.dtype])
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
