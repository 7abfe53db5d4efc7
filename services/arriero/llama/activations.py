"""What goes into each weight of a model: the makings of an importance matrix.

Responsibility: run sequences through a model and add up squared inputs of its
matrix products, as llama-imatrix does. Does not know files or datasets.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.errors import FailedPrecondition, Internal
from arriero.llama import library
from arriero.llama.context import Batch, Context
from arriero.llama.model import Model

# Tokens of one sequence: llama-imatrix's default context.
WINDOW = 512
_PRODUCT, _EXPERTS = b"MUL_MAT", b"MUL_MAT_ID"


@dataclass(slots=True)
class Activations:
    """Sums over all tokens that went through a model.

    Attributes:
        sums: GGUF tensor name -> sum of squares of each input column, float64,
            shape (columns,). Weights of the blocks only, as llama-imatrix collects
            them by default: embeddings and output layer are left out.
        counts: GGUF tensor name -> rows that were added up.
        sequences: that were evaluated.
    """

    sums: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    sequences: int = 0


def collect(
    path: Path,
    sequences: Iterable[Sequence[int]],
    *,
    n_threads: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Activations:
    """Evaluate sequences, each alone from position 0, in windows of `WINDOW` tokens.

    Args:
        path: a GGUF file, precise enough (F32, F16, BF16 or Q8_0).
        sequences: token ids as they are: no BOS is added.
        n_threads: as of `Context`.
        on_progress: called with the tokens evaluated so far.

    Raises:
        FailedPrecondition: a mixture of experts, whose inputs depend on the routing.
        InvalidArgument: ids outside of the vocabulary.
    """
    found = Activations()
    watcher = _Watcher(found)
    done = 0
    with (
        Model(path) as model,
        Context(
            model, n_ctx=WINDOW, n_batch=WINDOW, n_threads=n_threads, on_eval=watcher.callback
        ) as context,
    ):
        batch = Batch(WINDOW)
        for ids in sequences:
            for start in range(0, len(ids), WINDOW):
                window = ids[start : start + WINDOW]
                context.check_ids(window)
                context.clear()
                batch.clear()
                # All rows are outputs: the last block is computed for outputs only.
                batch.extend(window, start=0, sequence=0, outputs="all")
                context.decode(batch)
                if watcher.error is not None:
                    raise watcher.error
                found.sequences += 1
                done += len(window)
                if on_progress is not None:
                    on_progress(done)
    return found


class _Watcher:
    """llama.cpp's evaluation callback: asked before each operation, told after it."""

    def __init__(self, found: Activations) -> None:
        self._found = found
        self._functions = _functions()
        self.error: Exception | None = None
        # An exception must not pass through C: it is kept, and the computation stops.
        self.callback = library.binding().ggml_backend_sched_eval_callback(self._called)

    def _called(self, tensor: int, ask: bool, _data: object) -> bool:
        try:
            return self._wanted(tensor) if ask else self._add(tensor)
        except Exception as error:
            self.error = error
            return False

    def _wanted(self, pointer: int) -> bool:
        operation = self._functions["ggml_op_desc"](pointer)
        if operation not in (_PRODUCT, _EXPERTS):
            return False
        weight = _Tensor.from_address(_Tensor.from_address(pointer).src[0])
        name: bytes = weight.name
        if not (name.startswith(b"blk.") and name.endswith(b".weight")):
            return False
        if operation == _EXPERTS:
            raise FailedPrecondition(
                f"{name.decode()} belongs to a mixture of experts, for which no importance "
                "matrix is computed; give one that llama-imatrix made"
            )
        return True

    def _add(self, pointer: int) -> bool:
        product = _Tensor.from_address(pointer)
        weight = _Tensor.from_address(product.src[0])
        given = _Tensor.from_address(product.src[1])
        if given.type != 0 or given.nb[0] != 4:
            raise Internal(f"inputs of {weight.name.decode()} are of type {given.type}, not F32")
        columns, rows = given.ne[0], given.ne[1] * given.ne[2] * given.ne[3]
        if given.nb[1] != 4 * columns or (rows != given.ne[1] and given.nb[2] != rows * 4):
            raise Internal(f"inputs of {weight.name.decode()} do not lie in one piece")
        data = np.ctypeslib.as_array(
            ctypes.cast(given.data, ctypes.POINTER(ctypes.c_float)), shape=(rows, columns)
        )
        name = weight.name.decode()
        squares = np.square(data).sum(axis=0, dtype=np.float64)
        sums = self._found.sums.get(name)
        self._found.sums[name] = squares if sums is None else sums + squares
        self._found.counts[name] = self._found.counts.get(name, 0) + rows
        return True


class _Tensor(ctypes.Structure):
    """ggml_tensor (ggml.h), as far as it is looked at."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


@functools.cache
def _functions() -> dict[str, Any]:
    return library.functions({"ggml_op_desc": (ctypes.c_char_p, [ctypes.c_void_p])})
