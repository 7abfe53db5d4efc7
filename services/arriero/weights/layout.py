"""The safetensors file format: headers, types, places.

Responsibility: parse and build headers. Does not read or write tensor data.

Format: https://github.com/huggingface/safetensors#format — eight bytes of
header length (little endian), a JSON header, then the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.errors import DataLoss, FailedPrecondition, NotFound

__all__ = [
    "DTYPES",
    "TORCH_NAMES",
    "TensorInfo",
    "TensorPlan",
    "build_header",
    "dtype_name",
    "read_header",
]

# Bytes per element of the types that a LLaMA-family checkpoint may hold.
DTYPES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
# The same types as torch calls them.
TORCH_NAMES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
# safetensors' own cap (MAX_HEADER_SIZE).
_MAX_HEADER = 100_000_000
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `start` is its offset in `file`, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor that is to be written; `dtype` in safetensors' words (`BF16`)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * DTYPES[self.dtype]


def dtype_name(torch_name: str) -> str:
    """`bfloat16` (or `torch.bfloat16`) as safetensors writes it: `BF16`.

    Raises:
        FailedPrecondition: a type that is not read or written here.
    """
    plain = torch_name.removeprefix("torch.")
    for name, torch_word in TORCH_NAMES.items():
        if torch_word == plain:
            return name
    raise FailedPrecondition(
        f"tensors of type {plain} are not supported; expected one of "
        f"{', '.join(TORCH_NAMES.values())}"
    )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, in the order of their data; the data stay unread.

    Raises:
        NotFound: no such file.
        DataLoss: cut off, or not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(_LENGTH_BYTES)
            length = int.from_bytes(first, "little")
            if first.startswith(b"version "):
                raise DataLoss(
                    f"{path.name} is a Git LFS pointer of {size} bytes, not weights; "
                    "run `git lfs pull` where it comes from"
                )
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER):
                raise _damaged(path, f"its header of {length} bytes does not fit {size} bytes")
            text = file.read(length)
    except FileNotFoundError as error:
        raise NotFound(f"{path.name} does not exist in {path.parent.name}") from error
    try:
        header = json.loads(text)
    except ValueError as error:
        raise _damaged(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    data = _LENGTH_BYTES + length
    tensors = [
        _entry(path, name, entry, data, size)
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    tensors.sort(key=lambda info: (info.start, info.nbytes))
    end = data
    for info in tensors:
        if info.start != end:
            raise _damaged(path, f"{info.name} starts at byte {info.start}, expected {end}")
        end += info.nbytes
    if end != size:
        raise _damaged(path, f"it has {size} bytes, its header describes {end}")
    return {info.name: info for info in tensors}


def _entry(path: Path, name: str, entry: Any, data: int, size: int) -> TensorInfo:
    try:
        dtype = str(entry["dtype"])
        shape = tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the entry of {name!r} is not one: {error}") from error
    if dtype not in DTYPES:
        raise FailedPrecondition(
            f"{name} in {path.name} has type {dtype}; expected one of {', '.join(DTYPES)}"
        )
    if not 0 <= begin <= end or min(shape, default=0) < 0:
        raise _damaged(path, f"{name} has shape {shape} at bytes {begin} to {end}")
    if data + end > size:
        raise _damaged(path, f"it is cut off: {name} ends at byte {data + end}, the file at {size}")
    expected = math.prod(shape) * DTYPES[dtype]
    if end - begin != expected:
        raise _damaged(path, f"{name} has {end - begin} bytes, its shape {shape} needs {expected}")
    return TensorInfo(name, dtype, shape, path, data + begin, end - begin)


def _damaged(path: Path, found: str) -> DataLoss:
    return DataLoss(
        f"{path.name} is not a whole safetensors file: {found}; fetch it or make it again"
    )


def build_header(
    plans: Iterable[TensorPlan], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and each tensor's offset in the file.

    Data are laid out by falling element size, so that each tensor is aligned
    to its element; within one size in the order given.
    """
    ordered = sorted(plans, key=lambda plan: -DTYPES[plan.dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for plan in ordered:
        offsets[plan.name] = end
        header[plan.name] = {
            "dtype": plan.dtype,
            "shape": list(plan.shape),
            "data_offsets": [end, end + plan.nbytes],
        }
        end += plan.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    start = _LENGTH_BYTES + len(text)
    return (
        len(text).to_bytes(_LENGTH_BYTES, "little") + text,
        {name: start + offset for name, offset in offsets.items()},
    )
