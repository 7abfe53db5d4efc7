"""Importance matrices: computed from rows, or read from a file that llama.cpp made.

Responsibility: llama-imatrix's GGUF format both ways, and whether a matrix
belongs to a model. Does not know how activations are collected.

Format (llama.cpp's `tools/imatrix`): per weight the tensors `<name>.in_sum2`, sums
of squared inputs, float32 (columns, experts), and `<name>.counts`, float32
(1, experts).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.errors import DataLoss, FailedPrecondition
from arriero.llama import Header, Importance, TensorInfo, needs_importance, read_header
from arriero.llama.activations import Activations

SUFFIX = ".gguf"
FILE_NAME = "imatrix.gguf"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_TYPE = "imatrix"
_SHOWN = 3


def importance_of(activations: Activations, dataset: str) -> Importance:
    """Mean squares, as llama-quantize weighs columns by; as `read` gives them back."""
    values = {
        name: _means(
            sums.astype(np.float32), np.array([activations.counts[name]], dtype=np.float32)
        )
        for name, sums in activations.sums.items()
    }
    return Importance(values, dataset, activations.sequences)


def write(path: Path, activations: Activations, *, dataset: str, window: int) -> None:
    """Write what was collected as llama-imatrix does.

    Args:
        path: created.
        activations: sums and counts.
        dataset: what they were collected on.
        window: tokens of a sequence at most.
    """
    import gguf

    writer: Any = gguf.GGUFWriter(path, arch="", use_temp_file=False)
    writer.kv_data[0].clear()  # no architecture
    writer.add_type(_TYPE)
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", activations.sequences)
    writer.add_uint32("imatrix.chunk_size", window)
    for name, sums in activations.sums.items():
        writer.add_tensor(name + _SUMS, sums.astype(np.float32).reshape(1, -1))
        writer.add_tensor(name + _COUNTS, np.array([[activations.counts[name]]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(directory: Path) -> Importance:
    """The importance matrix that a report artifact holds.

    Raises:
        FailedPrecondition: no such file, several, or another kind of GGUF.
        DataLoss: a damaged file, or values that are negative or not finite.
    """
    files = sorted(directory.glob("*" + SUFFIX))
    if len(files) != 1:
        raise FailedPrecondition(
            f"the report holds {len(files)} *{SUFFIX} files, expected exactly one: an importance "
            "matrix in llama.cpp's GGUF format (`llama-imatrix -o imatrix.gguf`)",
            reason="NO_IMATRIX",
        )
    (path,) = files
    header = read_header(path)
    if header.metadata.get("general.type") != _TYPE:
        raise FailedPrecondition(
            f"{path.name} is a GGUF file of type {header.metadata.get('general.type')!r}, "
            f"expected {_TYPE!r}",
            reason="NO_IMATRIX",
        )
    tensors = {tensor.name: tensor for tensor in header.tensors}
    data = np.memmap(path, mode="r", dtype=np.uint8)
    values = {}
    for name, tensor in tensors.items():
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        if weight + _COUNTS not in tensors:
            raise DataLoss(f"{path.name} has sums for {weight} but no counts; make it again")
        values[weight] = _means(
            _numbers(data, header, tensor), _numbers(data, header, tensors[weight + _COUNTS])
        )
        # Means of squares; negative ones make llama.cpp abort.
        if not (np.isfinite(values[weight]) & (values[weight] >= 0)).all():
            raise DataLoss(
                f"{path.name} has values for {weight} that are negative or not finite; make it "
                "again"
            )
    if not values:
        raise DataLoss(f"{path.name} holds no sums; expected tensors named *{_SUMS}")
    return Importance(values, path.name, int(header.metadata.get("imatrix.chunk_count", 0)))


def _numbers(
    data: npt.NDArray[np.uint8], header: Header, tensor: TensorInfo
) -> npt.NDArray[np.float32]:
    if tensor.type != "F32":
        raise DataLoss(f"{tensor.name} is {tensor.type}, expected F32")
    start = header.data_offset + tensor.offset
    return data[start : start + tensor.size].view(np.float32)


def _means(
    sums: npt.NDArray[np.float32], counts: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """Sums by counts, per expert; 1 for one that never got a token (llama-quantize's rule)."""
    if not counts.size or sums.size % counts.size:
        raise DataLoss(f"{sums.size} sums do not fit {counts.size} counts")
    rows = sums.reshape(counts.size, -1)
    counts = counts.reshape(-1, 1)
    means = np.where(counts > 0, rows / np.where(counts > 0, counts, 1), 1)
    return means.reshape(-1).astype(np.float32)


def check(importance: Importance, header: Header) -> None:
    """Refuse a matrix that was made for another model.

    Args:
        importance: as computed or read.
        header: of the model's GGUF file, or of its outline.

    Raises:
        FailedPrecondition: no tensor in common, tensors that the model does not
            have, or other columns; with figures.
    """
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    strange = [name for name in importance.values if name not in shapes]
    wrong = [
        f"{name}: {values.size} columns, the model's weight has {_columns(shapes[name])}"
        for name, values in importance.values.items()
        if name in shapes and values.size != _columns(shapes[name])
    ]
    if strange or wrong:
        shown = [f"{name} is not in the model" for name in strange[:_SHOWN]] + wrong[:_SHOWN]
        raise FailedPrecondition(
            f"the importance matrix belongs to another model: {len(strange) + len(wrong)} of "
            f"{len(importance.values)} entries do not fit, such as {'; '.join(shown[:_SHOWN])}; "
            "compute one on this model",
            reason="IMATRIX_MISMATCH",
        )


def _columns(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[2] if len(shape) > 2 else 1)


def uncovered(types: Mapping[str, str], importance: Importance | None) -> list[str]:
    """Tensors whose type needs an importance matrix, but there is none for them."""
    known = importance.values if importance is not None else {}
    return [name for name, kind in types.items() if name not in known and needs_importance(kind)]
