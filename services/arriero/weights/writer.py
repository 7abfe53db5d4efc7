"""Write safetensors one tensor at a time.

Responsibility: lay out shards from a plan of names, types and shapes, then
take the data in any order. Does not know where the data come from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from arriero.errors import Internal, InvalidArgument
from arriero.weights.layout import (
    DTYPES,
    TORCH_NAMES,
    TensorInfo,
    TensorPlan,
    build_header,
    dtype_name,
)
from arriero.weights.reader import INDEX_SUFFIX
from arriero.weights.sink import BUFFER, Sink, SinkFile, Written

if TYPE_CHECKING:
    import torch

__all__ = ["BUFFER", "DEFAULT_SHARD_SIZE", "WeightsWriter", "tensor_bytes"]

DEFAULT_SHARD_SIZE = 5_000_000_000


class WeightsWriter:
    """A checkpoint in the making; a context manager.

    One shard is called `<stem>.safetensors`; several `<stem>-00001-of-00003…`
    with an index, as transformers writes them. A tensor is never split: a shard
    is larger than `max_shard_size` only when one tensor alone is.

    Files are written, hashed and synced by other threads; closing waits for them.
    Digests are known of the shards whose tensors came in `order`.

    Args:
        directory: exists; files of the same names are replaced.
        plan: every tensor, in the order in which shards are filled.
        max_shard_size: bytes of data per shard.
        metadata: strings for each header; transformers wants `format`.
        stem: `model` or `adapter_model`.

    Attributes:
        files: the shards.
        order: every name, as the tensors lie in the files.
        digests: by file name, once closed.

    Raises:
        DiskFull: no room for a shard, with figures, before a byte is written.
        InvalidArgument: an empty plan, a name twice, a shard size below one.
    """

    def __init__(
        self,
        directory: Path,
        plan: Sequence[TensorPlan],
        *,
        max_shard_size: int = DEFAULT_SHARD_SIZE,
        metadata: Mapping[str, str] | None = None,
        stem: str = "model",
    ) -> None:
        """Create the files with their headers, in full length."""
        if max_shard_size < 1:
            raise InvalidArgument.field(
                "max_shard_size", f"{max_shard_size} is not a size; expected bytes, at least 1"
            )
        if not plan:
            raise InvalidArgument("no tensors to write; expected at least one")
        self._plans = {item.name: item for item in plan}
        if len(self._plans) != len(plan):
            raise InvalidArgument("a tensor is planned twice; expected each name once")
        self._places: dict[str, tuple[SinkFile, int]] = {}
        self.digests: dict[str, Written] = {}
        self._sink = Sink()
        shards = _shards(plan, max_shard_size)
        self._left = {item.name: item.nbytes for item in plan}
        self.files = [
            directory / _shard_name(stem, i, len(shards)) for i in range(1, len(shards) + 1)
        ]
        try:
            for path, shard in zip(self.files, shards, strict=True):
                self._create(path, shard, metadata or {"format": "pt"})
        except BaseException:
            self._sink.abandon()
            raise
        self.order = list(self._places)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(item.nbytes for item in plan)},
                "weight_map": {
                    item.name: path.name
                    for path, shard in zip(self.files, shards, strict=True)
                    for item in shard
                },
            }
            path = directory / f"{stem}.safetensors{INDEX_SUFFIX}"
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _create(self, path: Path, shard: Sequence[TensorPlan], metadata: Mapping[str, str]) -> None:
        header, offsets = build_header(shard, metadata)
        file = self._sink.add(path, len(header) + sum(item.nbytes for item in shard))
        self._sink.put(file, 0, memoryview(header))
        for name, offset in offsets.items():
            self._places[name] = (file, offset)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, once.

        Raises:
            Internal: not planned so, or written before.
        """
        plan = self._whole(name)
        found = (dtype_name(str(tensor.dtype)), tuple(tensor.shape))
        if found != (plan.dtype, plan.shape):
            raise Internal(f"{name} is {found}, planned was {(plan.dtype, plan.shape)}")
        if plan.nbytes:
            data = tensor_bytes(tensor)
            self._sink.put(*self._take(name, data.nbytes), data)
        else:
            self._take(name, 0)

    def next_rows(self, name: str, count: int) -> torch.Tensor:
        """Memory for the next rows of a tensor, to be filled before the next call.

        Saves copying what was just computed. `BUFFER` bytes at most.

        Args:
            name: of the tensor, of one dimension or more.
            count: rows; they follow those before, the first call's begin the tensor.

        Raises:
            Internal: more than planned.
        """
        import torch

        plan = self._planned(name)
        shape = (count, *plan.shape[1:])
        dtype: torch.dtype = getattr(torch, TORCH_NAMES[plan.dtype])
        size = TensorPlan(name, plan.dtype, shape).nbytes
        if not size:
            self._take(name, 0)
            return torch.empty(shape, dtype=dtype)
        data = self._sink.room(*self._take(name, size), size)
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def write_raw(self, name: str, data: memoryview) -> None:
        """Write one tensor's bytes as they are, once.

        Raises:
            Internal: another size than planned, or written before.
        """
        self._check_size(name, data)
        self._sink.put(*self._take(name, data.nbytes), data)

    def write_rows(self, name: str, blocks: Iterable[torch.Tensor]) -> None:
        """Write one tensor, once, in blocks of its rows, the first rows first.

        Raises:
            Internal: of another type or shape than planned, or written before.
        """
        plan = self._whole(name)
        done = 0
        for block in blocks:
            found = (dtype_name(str(block.dtype)), tuple(block.shape[1:]))
            if found != (plan.dtype, plan.shape[1:]):
                raise Internal(f"{name} has rows {found}, planned was {(plan.dtype, plan.shape)}")
            data = tensor_bytes(block)
            done += data.nbytes
            self._sink.put(*self._take(name, data.nbytes), data)
        if done != plan.nbytes:
            raise Internal(f"{name} has {done} bytes, planned were {plan.nbytes}")
        self._left.pop(name, None)

    def copy(self, name: str, source: TensorInfo, data: memoryview) -> None:
        """Write one tensor's bytes as another file has them, once.

        Args:
            name: of the tensor.
            source: where the bytes lie; that file must not change meanwhile.
            data: the same bytes, mapped.

        Raises:
            Internal: another size than planned, or written before.
        """
        self._check_size(name, data)
        place = self._take(name, data.nbytes)
        self._sink.put_file(*place, data, source.file, source.start)

    def _planned(self, name: str) -> TensorPlan:
        if name not in self._left:
            raise Internal(f"{name} was not planned, or is written already")
        return self._plans[name]

    def _whole(self, name: str) -> TensorPlan:
        plan = self._planned(name)
        if self._left[name] != plan.nbytes:
            raise Internal(f"{name} is written in part already")
        return plan

    def _check_size(self, name: str, data: memoryview) -> None:
        plan = self._whole(name)
        if data.nbytes != plan.nbytes:
            raise Internal(f"{name} has {data.nbytes} bytes, planned were {plan.nbytes}")

    def _take(self, name: str, size: int) -> tuple[SinkFile, int]:
        """Where the next bytes of a tensor go."""
        plan, left = self._plans[name], self._left.get(name, 0)
        if size > left:
            raise Internal(f"{name} has more rows than planned: more than {plan.nbytes} bytes")
        file, offset = self._places[name]
        if size == left:
            self._left.pop(name, None)
        else:
            self._left[name] = left - size
        return file, offset + plan.nbytes - left

    def close(self) -> None:
        """Wait until all is on the disk, and close the files.

        Raises:
            Internal: planned tensors were not written.
            DiskFull: the disk filled up meanwhile.
        """
        if self._left:
            self._sink.abandon()
            raise Internal(
                f"{len(self._left)} planned tensors were not written, such as {min(self._left)}"
            )
        self.digests = self._sink.close()

    def __enter__(self) -> WeightsWriter:
        """Itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; what is missing is only complained about when nothing else is wrong."""
        if error is None:
            self.close()
        else:
            self._sink.abandon()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's data, row by row; no copy where it lies so already."""
    import torch

    if not tensor.numel():
        return memoryview(b"")
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())


def _shards(plan: Sequence[TensorPlan], limit: int) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for item in plan:
        if item.dtype not in DTYPES:
            raise InvalidArgument(f"{item.name}: {item.dtype} is not one of {', '.join(DTYPES)}")
        if shards[-1] and size + item.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.nbytes
    return shards


def _shard_name(stem: str, number: int, count: int) -> str:
    if count == 1:
        return f"{stem}.safetensors"
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"
