"""Rows of numbers into ggml's blocks, and the headers of the files that hold them.

Responsibility: the two steps that `llama_model_quantize` does inside, by the very
functions that it does them with. Does not know where rows come from.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.errors import DataLoss, Internal
from arriero.llama import library
from arriero.llama.header import TYPE_NUMBERS, Header, block_of, read_header

# GGML_QNT_VERSION (ggml.h), as in the files that the converter writes.
_QUANTIZATION_VERSION = 2


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of one row in a ggml type.

    Raises:
        Internal: the columns are not whole blocks.
    """
    elements, size = block_of(kind)
    if columns % elements:
        raise Internal(f"{columns} columns are not whole {kind} blocks")
    return columns // elements * size


def needs_importance(kind: str) -> bool:
    """Whether ggml refuses to quantize to a type without an importance matrix."""
    return bool(_functions()["ggml_quantize_requires_imatrix"](TYPE_NUMBERS[kind]))


def quantize_rows(
    kind: str,
    rows: npt.NDArray[np.float32],
    out: npt.NDArray[np.uint8],
    importance: npt.NDArray[np.float32] | None = None,
) -> None:
    """Quantize rows; other Python threads run meanwhile.

    Each row stands for itself: cutting a tensor anywhere gives the same bytes.

    Args:
        kind: ggml type, such as `Q4_K`.
        rows: float32, shape (rows, columns), contiguous.
        out: uint8, rows * row_bytes(kind, columns) long, contiguous.
        importance: float32, shape (columns,).

    Raises:
        DataLoss: rows that are not finite, which would make broken blocks.
    """
    functions = _functions()
    count, columns = rows.shape
    size = count * row_bytes(kind, columns)
    if not (rows.flags.c_contiguous and out.flags.c_contiguous) or out.nbytes != size:
        raise Internal(f"{out.nbytes} bytes for {rows.shape} as {kind}, expected {size}")
    number = TYPE_NUMBERS[kind]
    weights = None if importance is None else importance.ctypes.data
    functions["ggml_quantize_chunk"](
        number, rows.ctypes.data, out.ctypes.data, 0, count, columns, weights
    )
    # What llama.cpp validates when it quantizes and when it loads with checks.
    if not functions["ggml_validate_row_data"](number, out.ctypes.data, size):
        raise DataLoss(
            f"quantizing to {kind} gives broken blocks: the weights hold NaN or infinite numbers"
        )


def write_header(
    source: Path,
    target: Path,
    *,
    file_type: int,
    types: Mapping[str, str],
    metadata: Mapping[str, str | int],
) -> Header:
    """Create a GGUF file in full length, its tensors' bytes still zero (and sparse).

    Metadata and their order are those that `llama_model_quantize` writes.

    Args:
        source: the GGUF file that would be quantized; only its header is read.
        target: created.
        file_type: `LLAMA_FTYPE_*` number.
        types: GGUF tensor name -> ggml type, in the order of the file.
        metadata: added at the end; integers become uint32, as in llama-quantize.

    Raises:
        DataLoss: the source is damaged, or the target cannot be written.
    """
    read_header(source)
    library.initialize()
    f = _functions()
    tensors = ctypes.c_void_p()
    read = f["gguf_init_from_file"](
        str(source).encode(), _InitParams(no_alloc=True, ctx=ctypes.pointer(tensors))
    )
    if not read:
        raise DataLoss(f"llama.cpp cannot read the header of {source.name}")
    made = f["gguf_init_empty"]()
    try:
        f["gguf_set_kv"](made, read)
        f["gguf_set_val_u32"](made, b"general.quantization_version", _QUANTIZATION_VERSION)
        f["gguf_set_val_u32"](made, b"general.file_type", file_type)
        for key, value in metadata.items():
            if isinstance(value, str):
                f["gguf_set_val_str"](made, key.encode(), value.encode())
            else:
                f["gguf_set_val_u32"](made, key.encode(), value)
        for name, kind in types.items():
            f["gguf_add_tensor"](made, f["ggml_get_tensor"](tensors, name.encode()))
            f["gguf_set_tensor_type"](made, name.encode(), TYPE_NUMBERS[kind])
        if not f["gguf_write_to_file"](made, str(target).encode(), True):
            raise DataLoss(f"llama.cpp cannot write {target.name}")
        length = target.stat().st_size
        alignment = int(f["gguf_get_alignment"](made))
        if types:
            last = f["gguf_get_n_tensors"](made) - 1
            length += int(f["gguf_get_tensor_offset"](made, last))
            end = int(f["gguf_get_tensor_size"](made, last))
            length += (end + alignment - 1) // alignment * alignment
    finally:
        f["gguf_free"](made)
        f["gguf_free"](read)
        f["ggml_free"](tensors)
    with target.open("r+b") as file:
        file.truncate(length)
    return read_header(target)


class _InitParams(ctypes.Structure):
    """gguf_init_params (gguf.h)."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p)))


@functools.cache
def _functions() -> dict[str, Any]:
    """ggml's and gguf's C functions that llama.h does not declare."""
    pointer, text, long = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_quantize_chunk": (
            ctypes.c_size_t,
            [ctypes.c_int, pointer, pointer, long, long, long, pointer],
        ),
        "ggml_quantize_requires_imatrix": (ctypes.c_bool, [ctypes.c_int]),
        "ggml_validate_row_data": (ctypes.c_bool, [ctypes.c_int, pointer, ctypes.c_size_t]),
        "ggml_get_tensor": (pointer, [pointer, text]),
        "ggml_free": (None, [pointer]),
        "gguf_init_from_file": (pointer, [text, _InitParams]),
        "gguf_init_empty": (pointer, []),
        "gguf_free": (None, [pointer]),
        "gguf_set_kv": (None, [pointer, pointer]),
        "gguf_set_val_u32": (None, [pointer, text, ctypes.c_uint32]),
        "gguf_set_val_str": (None, [pointer, text, text]),
        "gguf_add_tensor": (None, [pointer, pointer]),
        "gguf_set_tensor_type": (None, [pointer, text, ctypes.c_int]),
        "gguf_write_to_file": (ctypes.c_bool, [pointer, text, ctypes.c_bool]),
        "gguf_get_alignment": (ctypes.c_size_t, [pointer]),
        "gguf_get_n_tensors": (long, [pointer]),
        "gguf_get_tensor_offset": (ctypes.c_size_t, [pointer, long]),
        "gguf_get_tensor_size": (ctypes.c_size_t, [pointer, long]),
    }
    return library.functions(signatures)
