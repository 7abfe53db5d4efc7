"""Quant types and llama.cpp's quantizer.

Responsibility: names of types, and turning one GGUF file into another. Does not
know where files come from, nor how good the result is.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from arriero.errors import DataLoss, FailedPrecondition, Internal, InvalidArgument
from arriero.llama import library
from arriero.llama.cores import threads
from arriero.llama.header import Header, read_header


@dataclass(frozen=True, slots=True)
class QuantType:
    """A file type of llama.cpp.

    Attributes:
        name: as llama.cpp writes it.
        ftype: its `LLAMA_FTYPE_*` number.
        bits: of its main block type, per weight; for estimates.
        needs_imatrix: llama.cpp refuses it without an importance matrix.
    """

    name: str
    ftype: int
    bits: float
    needs_imatrix: bool = False


def _table() -> Mapping[str, QuantType]:
    # Numbers: llama.h, enum llama_ftype. Bits: the block sizes of ggml.h, for the
    # mixed K types about what a 7B model comes out at.
    rows = (
        QuantType("F32", 0, 32),
        QuantType("F16", 1, 16),
        QuantType("BF16", 32, 16),
        QuantType("Q8_0", 7, 8.5),
        QuantType("Q6_K", 18, 6.6),
        QuantType("Q5_K_M", 17, 5.7),
        QuantType("Q5_K_S", 16, 5.6),
        QuantType("Q5_1", 9, 6.0),
        QuantType("Q5_0", 8, 5.6),
        QuantType("Q4_K_M", 15, 4.9),
        QuantType("Q4_K_S", 14, 4.7),
        QuantType("Q4_1", 3, 5.1),
        QuantType("Q4_0", 2, 4.7),
        QuantType("IQ4_NL", 25, 4.7),
        QuantType("IQ4_XS", 30, 4.5),
        QuantType("Q3_K_L", 13, 4.3),
        QuantType("Q3_K_M", 12, 3.9),
        QuantType("Q3_K_S", 11, 3.6),
        QuantType("IQ3_M", 27, 3.8),
        QuantType("IQ3_S", 26, 3.6),
        QuantType("Q2_K", 10, 3.3),
        QuantType("Q2_0", 41, 2.6),
        QuantType("Q1_0", 40, 1.6),
        QuantType("TQ2_0", 37, 2.3),
        QuantType("TQ1_0", 36, 2.0),
        QuantType("MXFP4_MOE", 38, 8.5),
        QuantType("IQ3_XS", 22, 3.5, needs_imatrix=True),
        QuantType("IQ3_XXS", 23, 3.2, needs_imatrix=True),
        QuantType("Q2_K_S", 21, 3.1, needs_imatrix=True),
        QuantType("IQ2_M", 29, 2.9, needs_imatrix=True),
        QuantType("IQ2_S", 28, 2.7, needs_imatrix=True),
        QuantType("IQ2_XS", 20, 2.5, needs_imatrix=True),
        QuantType("IQ2_XXS", 19, 2.3, needs_imatrix=True),
        QuantType("IQ1_M", 31, 2.0, needs_imatrix=True),
        QuantType("IQ1_S", 24, 1.8, needs_imatrix=True),
    )
    return {row.name: row for row in rows}


# By name; largest first, those that need an importance matrix last.
QUANT_TYPES: Mapping[str, QuantType] = _table()
# llama-quantize accepts these short names too.
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

_PROGRESS = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")


def resolve_type(text: str, *, field: str = "type") -> QuantType:
    """The quant type of a name in any case.

    Raises:
        InvalidArgument: unknown, or it needs an importance matrix.
    """
    name = text.strip().upper()
    found = QUANT_TYPES.get(_ALIASES.get(name, name))
    usable = ", ".join(row.name for row in QUANT_TYPES.values() if not row.needs_imatrix)
    if found is None:
        raise InvalidArgument.field(field, f"unknown quant type {text!r}; known types: {usable}")
    if found.needs_imatrix:
        raise InvalidArgument.field(
            field,
            f"{found.name} needs an importance matrix, which this build does not make; "
            f"usable types: {usable}",
        )
    return found


def expected_size(parameters: int, kind: QuantType) -> int:
    """Bytes that a file is expected to need, a tenth more than its weights take."""
    return int(parameters * kind.bits / 8 * 1.1) + (8 << 20)


def quantize(
    source: Path,
    target: Path,
    kind: QuantType,
    *,
    n_threads: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Header:
    """Quantize a GGUF file with `llama_model_quantize`.

    Tensors whose rows do not fill whole blocks get llama.cpp's fallback types.
    The same input gives the same bytes, whatever the number of threads.

    Args:
        source: an F32, F16 or BF16 file.
        target: written; removed again on failure.
        kind: as `resolve_type` returns it.
        n_threads: as of `threads`.
        on_progress: called with tensors done and tensors in all.

    Returns:
        The header of what was written.

    Raises:
        DataLoss: the source is damaged.
        FailedPrecondition: llama.cpp refuses, with its reason.
    """
    read_header(source)
    c = library.initialize()
    if c.llama_ftype_name(kind.ftype) is None:
        raise Internal(f"the linked llama.cpp does not have the file type {kind.name}")
    params = c.llama_model_quantize_default_params()
    params.ftype = kind.ftype
    params.nthread = threads(n_threads)
    last = 0

    def listen(line: str) -> None:
        nonlocal last
        match = _PROGRESS.search(line)
        if match and on_progress is not None and int(match[1]) > last:
            last = int(match[1])
            on_progress(last - 1, int(match[2]))

    library.take_errors()
    with library.listening(listen):
        result = c.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(params)
        )
    if result != 0:
        target.unlink(missing_ok=True)
        raise FailedPrecondition(
            f"llama.cpp cannot quantize {source.name} to {kind.name}: "
            f"{library.take_errors() or f'code {result}'}"
        )
    try:
        return read_header(target)
    except DataLoss:
        target.unlink(missing_ok=True)
        raise
