"""PyTorch checkpoints (`.pth`) written tensor by tensor.

Responsibility: the zip that `torch.save` writes (since torch 1.6): a pickled
state dict that names storages, and each storage as a stored, aligned record. The
data are never in memory together. Does not know what the tensors mean.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from arriero.errors import Internal
from arriero.weights import TensorPlan, dtype_name, tensor_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["PthWriter"]

# torch aligns storages so, and maps them.
_ALIGNMENT = 64
# Of a local header, without name and extra fields; and of the zip64 field in it.
_LOCAL_HEADER, _ZIP64 = 30, 20
# The id of torch's padding field ("FB"), and an extra field's own header.
_PADDING_ID, _EXTRA_HEADER = b"FB", 4
_EPOCH = (1980, 1, 1, 0, 0, 0)
# What pickles call the storages of a type.
_STORAGES = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
}


class PthWriter:
    """One state dict in the making; a context manager.

    Args:
        path: of the file; replaced.
        plan: every tensor, in the order in which they will be written.
    """

    def __init__(self, path: Path, plan: Sequence[TensorPlan]) -> None:
        """Create the file with the pickled state dict."""
        self._name = path.stem
        self._plan = list(plan)
        self._next = 0
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
        try:
            self._record("data.pkl", [memoryview(_pickled(self._plan))])
            self._record("byteorder", [memoryview(b"little")])
        except BaseException:
            self._zip.close()
            raise

    def write(self, name: str, blocks: Iterable[torch.Tensor]) -> None:
        """Write the next tensor in blocks of its rows.

        Raises:
            Internal: not the next one, or of another type or size than planned.
        """
        plan = self._plan[self._next] if self._next < len(self._plan) else None
        if plan is None or plan.name != name:
            raise Internal(f"{name} is not the next tensor of {self._name}")

        def data() -> Iterable[memoryview]:
            for block in blocks:
                if dtype_name(str(block.dtype)) != plan.dtype:
                    raise Internal(f"{name} is {block.dtype}, planned was {plan.dtype}")
                yield tensor_bytes(block)

        written = self._record(f"data/{self._next}", data())
        if written != plan.nbytes:
            raise Internal(f"{name} has {written} bytes, planned were {plan.nbytes}")
        self._next += 1

    def _record(self, name: str, data: Iterable[memoryview]) -> int:
        info = zipfile.ZipInfo(f"{self._name}/{name}", _EPOCH)
        start = self._zip.start_dir + _LOCAL_HEADER + len(info.filename) + _ZIP64 + _EXTRA_HEADER
        padding = -start % _ALIGNMENT
        info.extra = _PADDING_ID + padding.to_bytes(2, "little") + b"Z" * padding
        written = 0
        with self._zip.open(info, "w", force_zip64=True) as record:
            for block in data:
                record.write(block)
                written += block.nbytes
        return written

    def close(self) -> None:
        """Finish the file.

        Raises:
            Internal: planned tensors were not written.
        """
        if self._next == len(self._plan):
            self._record("version", [memoryview(b"3\n")])
        self._zip.close()
        if self._next < len(self._plan):
            raise Internal(f"{self._plan[self._next].name} was planned, but not written")

    def abandon(self) -> None:
        """Close an unfinished file."""
        self._zip.close()

    def __enter__(self) -> PthWriter:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish; what is missing is only complained about when nothing else is wrong."""
        if error is None:
            self.close()
        else:
            self.abandon()


class _Storage:
    """Stands for a storage in the pickle: its record's name, and elements."""

    def __init__(self, key: int, plan: TensorPlan) -> None:
        self.key, self.plan = key, plan


class _Tensor:
    """Stands for a tensor over a whole storage."""

    def __init__(self, storage: _Storage) -> None:
        self.storage = storage


class _Pickler(pickle.Pickler):
    """Writes what `torch.save` would, for tensors that are not there."""

    def persistent_id(self, obj: Any) -> Any:
        """Storages are named, not pickled."""
        if not isinstance(obj, _Storage):
            return None
        import torch

        kind = getattr(torch, _STORAGES[obj.plan.dtype])
        return ("storage", kind, str(obj.key), "cpu", math.prod(obj.plan.shape))

    def reducer_override(self, obj: Any) -> Any:
        """Tensors are rebuilt over their storage."""
        if not isinstance(obj, _Tensor):
            return NotImplemented
        import torch

        shape = obj.storage.plan.shape
        strides, stride = [], 1
        for size in reversed(shape):
            strides.append(stride)
            stride *= size
        return (
            torch._utils._rebuild_tensor_v2,
            (obj.storage, 0, tuple(shape), tuple(reversed(strides)), False, OrderedDict()),
        )


def _pickled(plan: Sequence[TensorPlan]) -> bytes:
    sink = io.BytesIO()
    # Protocol 2 is torch.save's, and the one that its restricted unpickler reads.
    _Pickler(sink, protocol=2).dump(
        {item.name: _Tensor(_Storage(key, item)) for key, item in enumerate(plan)}
    )
    return sink.getvalue()
