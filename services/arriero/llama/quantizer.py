"""Quant types and llama.cpp's quantizer.

Responsibility: names of types, turning one GGUF file into another, and which
type each tensor would get. Does not know where files come from, nor how good
the result is.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.cores import threads
from arriero.errors import DataLoss, FailedPrecondition, Internal, InvalidArgument
from arriero.llama import library
from arriero.llama.header import TYPE_NUMBERS, Header, block_of, read_header


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

# `[  3/ 272] blk.0.attn_k.weight - [576, 192, 1, 1], type = bf16, size = 0.2 MiB -> 0.1 MiB (q5_0)`
_PROGRESS = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")
_TENSOR = re.compile(
    r"\[\s*\d+/\s*\d+\]\s+(?P<name>\S+)\s+- \[[^\]]*\], type =\s*(?P<old>\S+), size = "
    r"[^(]*(?:\((?P<new>\S+)\))?"
)
# `warning: blk.0.attn_k.weight - ncols 576 not divisible by 256 (required for type q4_K) -> ...`
_FALLBACK = re.compile(r"(?P<name>\S+)\s+- ncols\s+\d+ not divisible .* -> falling back to")


def resolve_type(text: str, *, field: str = "type", imatrix: bool = True) -> QuantType:
    """The quant type of a name in any case.

    Args:
        text: as somebody wrote it.
        field: of the spec, for the message.
        imatrix: whether there is an importance matrix.

    Raises:
        InvalidArgument: unknown, or it needs an importance matrix and there is none.
    """
    name = text.strip().upper()
    found = QUANT_TYPES.get(_ALIASES.get(name, name))
    if found is None:
        raise InvalidArgument.field(
            field, f"unknown quant type {text!r}; known types: {', '.join(QUANT_TYPES)}"
        )
    if found.needs_imatrix and not imatrix:
        usable = ", ".join(row.name for row in QUANT_TYPES.values() if not row.needs_imatrix)
        raise InvalidArgument.field(
            field,
            f"{found.name} needs an importance matrix: name rows (or a report that holds one) in "
            f"the field imatrix; types without: {usable}",
        )
    return found


def resolve_tensor_type(text: str, *, field: str = "type") -> str:
    """The type of single tensors (`Q6_K`, not `Q4_K_M`, which is a mixture), in ggml's words.

    Raises:
        InvalidArgument: there is no such type, or nothing can be quantized to it.
    """
    name = text.strip().upper()
    if name not in _TENSOR_TYPES:
        raise InvalidArgument.field(
            field, f"unknown tensor type {text!r}; known types: {', '.join(_TENSOR_TYPES)}"
        )
    return name


# Of ggml's types those that `ggml_quantize_chunk` makes.
_TENSOR_TYPES = tuple(
    name for name in TYPE_NUMBERS if name not in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")
)


@dataclass(frozen=True)
class Importance:
    """How much each input column of each tensor matters.

    Attributes:
        values: GGUF tensor name -> mean square of its inputs, float32, shape
            (columns,), or (experts * columns,).
        dataset: what it was computed on, for the file's metadata.
        chunks: sequences that it was computed on.
    """

    values: Mapping[str, npt.NDArray[np.float32]]
    dataset: str = ""
    chunks: int = 0

    def metadata(self) -> dict[str, str | int]:
        """What llama-quantize notes about it in the files that it makes."""
        return {
            "quantize.imatrix.dataset": self.dataset,
            "quantize.imatrix.entries_count": len(self.values),
            "quantize.imatrix.chunks_count": self.chunks,
        }


_SHOWN = 3


@dataclass(frozen=True)
class Recipe:
    """How to quantize, besides the type.

    Attributes:
        tensor_types: regular expression over GGUF tensor names -> ggml type; the
            first that is found in a name wins, as with llama-quantize's `--tensor-type`.
        output_tensor_type: ggml type of `output.weight`.
        token_embedding_type: ggml type of `token_embd.weight`.
        importance: importance matrix.
    """

    tensor_types: Mapping[str, str] = field(default_factory=dict)
    output_tensor_type: str = ""
    token_embedding_type: str = ""
    importance: Importance | None = None


@dataclass(frozen=True, slots=True)
class TypePlan:
    """What llama.cpp would make of a file.

    Attributes:
        types: GGUF tensor name -> ggml type, in the order of the made file.
        fallbacks: tensors whose rows do not fill the blocks of the type that was
            meant for them.
    """

    types: Mapping[str, str]
    fallbacks: tuple[str, ...]


def expected_size(parameters: int, kind: QuantType) -> int:
    """Bytes that a file is expected to need, a tenth more than its weights take."""
    return int(parameters * kind.bits / 8 * 1.1) + (8 << 20)


def quantize(
    source: Path,
    target: Path,
    kind: QuantType,
    *,
    recipe: Recipe | None = None,
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
        recipe: overrides and importance matrix.
        n_threads: as of `threads`.
        on_progress: called with tensors done and tensors in all.

    Returns:
        The header of what was written.

    Raises:
        DataLoss: the source is damaged.
        FailedPrecondition: llama.cpp refuses, with its reason.
    """
    last = 0

    def listen(line: str) -> None:
        nonlocal last
        match = _PROGRESS.search(line)
        if match and on_progress is not None and int(match[1]) > last:
            last = int(match[1])
            on_progress(last - 1, int(match[2]))

    try:
        _run(source, target, kind, recipe or Recipe(), listen, n_threads=n_threads)
        return read_header(target)
    except (FailedPrecondition, DataLoss):
        target.unlink(missing_ok=True)
        raise


def plan_types(source: Path, kind: QuantType, recipe: Recipe | None = None) -> TypePlan:
    """The types that `quantize` would choose, by a dry run of llama.cpp's own.

    Args:
        source: a GGUF file; its tensors' contents are not looked at, so a sparse
            file with nothing but a header will do.
        kind: as `resolve_type` returns it.
        recipe: overrides and importance matrix, which both change the choice.

    Raises:
        DataLoss: the source is damaged.
        FailedPrecondition: llama.cpp refuses, with its reason; or an override asks
            for a type that does not fit a tensor, and llama.cpp has no fallback for that.
    """
    types: dict[str, str] = {}
    fallbacks: dict[str, None] = {}

    def listen(line: str) -> None:
        if match := _TENSOR.search(line):
            types[match["name"]] = (match["new"] or match["old"].rstrip(",")).upper()
        elif match := _FALLBACK.search(line):
            fallbacks[match["name"]] = None

    header = _run(
        source, source.with_suffix(".dry"), kind, recipe or Recipe(), listen, dry_run=True
    )
    unknown = sorted({name for name in types.values() if name not in TYPE_NUMBERS})
    if len(types) != len(header.tensors) or unknown:
        raise Internal(
            f"llama.cpp's dry run names {len(types)} of {len(header.tensors)} tensors"
            + (f", and the unknown types {', '.join(unknown)}" if unknown else "")
        )
    wrong = [
        f"{tensor.name} has rows of {tensor.shape[0]} numbers, {types[tensor.name]} has blocks of "
        f"{block_of(types[tensor.name])[0]}"
        for tensor in header.tensors
        if tensor.shape[0] % block_of(types[tensor.name])[0]
    ]
    if wrong:
        raise FailedPrecondition(
            f"{kind.name}: {len(wrong)} tensors are given a type that their rows do not fit: "
            f"{'; '.join(wrong[:_SHOWN])}; give them another one, such as Q8_0 or Q5_0 with blocks "
            "of 32, in tensor_types, output_tensor_type or token_embedding_type",
            reason="TYPE_DOES_NOT_FIT",
        )
    return TypePlan(types, tuple(fallbacks))


def _run(
    source: Path,
    target: Path,
    kind: QuantType,
    recipe: Recipe,
    listen: Callable[[str], None],
    *,
    n_threads: int = 1,
    dry_run: bool = False,
) -> Header:
    header = read_header(source)
    c = library.initialize()
    if c.llama_ftype_name(kind.ftype) is None:
        raise Internal(f"the linked llama.cpp does not have the file type {kind.name}")
    params = c.llama_model_quantize_default_params()
    params.ftype = kind.ftype
    params.nthread = threads(n_threads)
    params.dry_run = dry_run
    kept = _set_recipe(c, params, recipe)
    library.take_errors()
    with library.listening(listen):
        result = c.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(params)
        )
    del kept
    if result != 0:
        raise FailedPrecondition(
            f"llama.cpp cannot quantize {source.name} to {kind.name}: "
            f"{library.take_errors() or f'code {result}'}"
        )
    return header


def _set_recipe(c: Any, params: Any, recipe: Recipe) -> list[Any]:
    """Fill in pointers; returns what must live as long as they are used."""
    kept: list[Any] = []
    for name in ("output_tensor_type", "token_embedding_type"):
        if chosen := getattr(recipe, name):
            setattr(params, name, TYPE_NUMBERS[chosen])
    if recipe.tensor_types:
        overrides = (c.llama_model_tensor_override * (len(recipe.tensor_types) + 1))()
        for slot, (pattern, chosen) in zip(overrides, recipe.tensor_types.items(), strict=False):
            slot.pattern, slot.type = pattern.encode(), TYPE_NUMBERS[chosen]
        params.tt_overrides = overrides
        kept.append(overrides)
    if recipe.importance is not None:
        entries = list(recipe.importance.values.items())
        data = (c.llama_model_imatrix_data * (len(entries) + 1))()
        for slot, (tensor, values) in zip(data, entries, strict=False):
            values = np.ascontiguousarray(values, dtype=np.float32)
            slot.name, slot.size = tensor.encode(), values.size
            slot.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            kept.append(values)
        params.imatrix = data
        facts = recipe.importance.metadata()
        pairs = (c.llama_model_kv_override * (len(facts) + 1))()
        for pair, (key, value) in zip(pairs, facts.items(), strict=False):
            pair.key = key.encode()
            if isinstance(value, str):
                pair.tag, pair.value.val_str = _OVERRIDE_STRING, value.encode()[:127]
            else:
                pair.tag, pair.value.val_i64 = _OVERRIDE_INTEGER, value
        params.kv_overrides = pairs
        kept += [data, pairs]
    return kept


# llama_model_kv_override_type (llama.h); a string of it holds 127 bytes.
_OVERRIDE_INTEGER, _OVERRIDE_STRING = 0, 3
