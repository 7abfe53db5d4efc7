"""GGUF headers: what a file says it holds, checked against its size.

Responsibility: parse and validate a header without llama.cpp, and add metadata
to a file. Does not know tensors' contents, nor what any key means to llama.cpp.

The format is described in ggml's `docs/gguf.md`; all numbers are little-endian.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from arriero.errors import DataLoss, InvalidArgument

MAGIC = b"GGUF"
# Version 1 had 32-bit lengths and is refused by llama.cpp too.
VERSIONS = (2, 3)
_SMALLEST = 24  # magic, version and two counts
_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_TENSORS = 1 << 20
_MAX_NAME = 63
# Far above any vocabulary or template: a hostile header must not cost minutes or memory.
_MAX_STRINGS = 1 << 24
_MAX_STRING = 1 << 26

_STRING, _ARRAY = 8, 9
_SCALARS: Mapping[int, struct.Struct] = {
    kind: struct.Struct("<" + code)
    for kind, code in {
        0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
    }.items()
}  # fmt: skip

# ggml type -> (name, elements of a block, bytes of a block), from ggml.h.
_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
# ggml's number of a type, by its name.
TYPE_NUMBERS: Mapping[str, int] = {name: number for number, (name, _, _) in _TYPES.items()}


def block_of(kind: str) -> tuple[int, int]:
    """Elements and bytes of a block of a ggml type, such as `Q4_K`."""
    _, elements, size = _TYPES[TYPE_NUMBERS[kind]]
    return elements, size


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        name: such as `blk.0.attn_q.weight`.
        shape: fastest dimension first, as GGUF has it.
        type: such as `Q4_K`.
        offset: of its first byte from the start of the data section.
        size: bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    size: int

    @property
    def elements(self) -> int:
        """Weights that it holds."""
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class Header:
    """A validated header.

    Attributes:
        version: of the format.
        metadata: scalars and strings by key.
        arrays: lengths of the arrays by key.
        tensors: in the order of the file.
        data_offset: where the data section starts.
        size: of the file, in bytes.
        alignment: of the data section and of each tensor in it, in bytes.
    """

    version: int
    metadata: Mapping[str, Any]
    arrays: Mapping[str, int]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    size: int
    alignment: int
    _metadata_end: int

    @cached_property
    def parameters(self) -> int:
        """Weights in the file."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data per weight, as llama.cpp counts it (no metadata)."""
        return 8.0 * sum(tensor.size for tensor in self.tensors) / max(1, self.parameters)


class _Cursor:
    """Reads numbers and strings, never past the end of the file."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self._data = data
        self._name = name
        self.position = 0

    def fail(self, what: str) -> DataLoss:
        return DataLoss(
            f"{self._name} is not a whole GGUF file: {what} at byte {self.position} of "
            f"{len(self._data)}; fetch or convert it again"
        )

    def skip(self, length: int) -> int:
        """Move on; returns where the skipped bytes start."""
        start = self.position
        if length < 0 or length > len(self._data) - start:
            raise self.fail(f"the header needs {length} more bytes")
        self.position += length
        return start

    def scalar(self, kind: int) -> Any:
        form = _SCALARS.get(kind)
        if form is None:
            raise self.fail(f"unknown value type {kind}")
        return form.unpack_from(self._data, self.skip(form.size))[0]

    def string(self) -> str:
        length: int = self.scalar(10)
        if length > _MAX_STRING:
            raise self.fail(f"a string of {length} bytes")
        start = self.skip(length)
        return bytes(self._data[start : start + length]).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A string or a number."""
        return self.string() if kind == _STRING else self.scalar(kind)

    def array(self) -> int:
        """Walk over an array; returns its length."""
        element: int = self.scalar(4)
        count: int = self.scalar(10)
        if element == _STRING:
            unpack = _SCALARS[10].unpack_from
            if count > _MAX_STRINGS:
                raise self.fail(f"an array of {count} strings")
            for _ in range(count):
                self.skip(unpack(self._data, self.skip(8))[0])
        elif element in _SCALARS:
            self.skip(count * _SCALARS[element].size)
        else:
            raise self.fail(f"arrays of type {element} do not exist")
        return count


def read_header(path: Path) -> Header:
    """Parse a GGUF header and check that every tensor lies within the file.

    Raises:
        DataLoss: not a GGUF file, another version, or cut off.
    """
    size = path.stat().st_size
    if size < _SMALLEST:
        raise DataLoss(f"{path.name} is not a GGUF file: it has only {size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(_Cursor(data, path.name), data[:4], size)


def _parse(cursor: _Cursor, magic: bytes, size: int) -> Header:
    cursor.skip(4)
    if magic != MAGIC:
        raise cursor.fail(f"it starts with {magic!r}, expected {MAGIC!r}")
    version = cursor.scalar(4)
    if version not in VERSIONS:
        raise cursor.fail(f"version {version}, expected one of {VERSIONS}")
    tensor_count, pair_count = cursor.scalar(10), cursor.scalar(10)
    if tensor_count > _MAX_TENSORS or pair_count > _MAX_TENSORS:
        raise cursor.fail(f"{tensor_count} tensors and {pair_count} metadata pairs")
    metadata: dict[str, Any] = {}
    arrays: dict[str, int] = {}
    for _ in range(pair_count):
        key, kind = cursor.string(), cursor.scalar(4)
        if not key or key in metadata or key in arrays:
            raise cursor.fail(f"metadata key {key!r} is empty or there twice")
        if kind == _ARRAY:
            arrays[key] = cursor.array()
        else:
            metadata[key] = cursor.value(kind)
    metadata_end = cursor.position
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.fail(f"alignment {alignment!r}, expected a power of two")
    tensors = tuple(_tensor(cursor) for _ in range(tensor_count))
    data_offset = _aligned(cursor.position, alignment)
    for tensor in tensors:
        end = data_offset + tensor.offset + tensor.size
        if tensor.offset % alignment or end > size:
            raise cursor.fail(
                f"tensor {tensor.name} ends at byte {end}: the file is cut off or damaged"
            )
    return Header(version, metadata, arrays, tensors, data_offset, size, alignment, metadata_end)


def _tensor(cursor: _Cursor) -> TensorInfo:
    name = cursor.string()
    if len(name) > _MAX_NAME:
        raise cursor.fail(f"a tensor name of {len(name)} characters")
    dimensions = cursor.scalar(4)
    if dimensions > _MAX_DIMENSIONS:
        raise cursor.fail(f"tensor {name} has {dimensions} dimensions")
    shape = tuple(int(cursor.scalar(10)) for _ in range(dimensions))
    kind, offset = cursor.scalar(4), cursor.scalar(10)
    if kind not in _TYPES:
        raise cursor.fail(f"tensor {name} has the unknown type {kind}")
    type_name, elements, length = _TYPES[kind]
    rows = 1
    for extent in shape[1:]:
        rows *= extent
    first = shape[0] if shape else 1
    if first % elements:
        raise cursor.fail(f"tensor {name}: {first} columns are not whole {type_name} blocks")
    return TensorInfo(name, shape, type_name, offset, first // elements * length * rows)


def _aligned(position: int, alignment: int) -> int:
    return (position + alignment - 1) // alignment * alignment


def insert_metadata(path: Path, values: Mapping[str, str]) -> None:
    """Add string metadata to a GGUF file, in place.

    The data section is moved towards the end within the file, so no second copy
    is needed; a crash in the middle leaves the file unusable: work on one that
    nobody else has.

    Raises:
        DataLoss: not a whole GGUF file.
        InvalidArgument: a key is there already.
    """
    header = read_header(path)
    taken = [key for key in values if key in header.metadata or key in header.arrays]
    if taken:
        raise InvalidArgument(f"{path.name} already has the metadata {', '.join(taken)}")
    pairs = b"".join(
        _string(key) + struct.pack("<I", _STRING) + _string(value) for key, value in values.items()
    )
    with path.open("r+b") as file:
        head = bytearray(file.read(header.data_offset))
        count = len(header.metadata) + len(header.arrays) + len(values)
        struct.pack_into("<Q", head, 16, count)
        head[header._metadata_end : header._metadata_end] = pairs
        infos_end = header._metadata_end + len(pairs) + _infos_size(header)
        data_offset = _aligned(infos_end, header.alignment)
        head = head[:infos_end] + bytes(data_offset - infos_end)
        _move(file.fileno(), header.data_offset, data_offset, header.size - header.data_offset)
        file.seek(0)
        file.write(head)


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _infos_size(header: Header) -> int:
    """Bytes of the tensor table: name, dimensions, shape, type, offset of each."""
    return sum(
        8 + len(tensor.name.encode()) + 4 + 8 * len(tensor.shape) + 4 + 8
        for tensor in header.tensors
    )


def _move(descriptor: int, source: int, target: int, length: int, chunk: int = 8 << 20) -> None:
    """Move bytes towards the end of a file, from the last chunk to the first."""
    done = 0
    while done < length:
        part = min(chunk, length - done)
        start = length - done - part
        data = os.pread(descriptor, part, source + start)
        written = 0
        while written < len(data):
            written += os.pwrite(descriptor, data[written:], target + start + written)
        done += part
