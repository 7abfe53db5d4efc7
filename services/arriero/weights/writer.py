"""Write safetensors one tensor at a time.

Responsibility: lay out shards from a plan of names, types and shapes, then
take the data in any order. Does not make the files durable: whoever publishes
them does (fsync).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from arriero.errors import Internal, InvalidArgument
from arriero.weights.layout import DTYPES, TensorPlan, build_header, dtype_name
from arriero.weights.reader import INDEX_SUFFIX

if TYPE_CHECKING:
    import torch

__all__ = ["DEFAULT_SHARD_SIZE", "WeightsWriter", "tensor_bytes"]

DEFAULT_SHARD_SIZE = 5_000_000_000
# One pwrite takes at most 2 GiB on Linux; smaller keeps cancel quick.
_CHUNK = 1 << 28


class WeightsWriter:
    """A checkpoint in the making; a context manager.

    One shard is called `<stem>.safetensors`; several `<stem>-00001-of-00003…`
    with an index, as transformers writes them. A tensor is never split: a shard
    is larger than `max_shard_size` only when one tensor alone is.

    Args:
        directory: exists; files of the same names are replaced.
        plan: every tensor, in the order in which shards are filled.
        max_shard_size: bytes of data per shard.
        metadata: strings for each header; transformers wants `format`.
        stem: `model` or `adapter_model`.

    Raises:
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
        self._places: dict[str, tuple[int, int]] = {}
        self._left = set(self._plans)
        self._descriptors: list[int] = []
        shards = _shards(plan, max_shard_size)
        self.files = [
            directory / _shard_name(stem, i, len(shards)) for i in range(1, len(shards) + 1)
        ]
        try:
            for path, shard in zip(self.files, shards, strict=True):
                self._create(path, shard, metadata or {"format": "pt"})
        except BaseException:
            self._release()
            raise
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
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._descriptors.append(descriptor)
        _write_all(descriptor, memoryview(header), 0)
        os.ftruncate(descriptor, len(header) + sum(item.nbytes for item in shard))
        for name, offset in offsets.items():
            self._places[name] = (descriptor, offset)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, once.

        Raises:
            Internal: not planned so, or written before.
        """
        plan = self._next(name)
        found = (dtype_name(str(tensor.dtype)), tuple(tensor.shape))
        if found != (plan.dtype, plan.shape):
            raise Internal(f"{name} is {found}, planned was {(plan.dtype, plan.shape)}")
        if plan.nbytes:
            self._put(name, tensor_bytes(tensor))
        self._left.discard(name)

    def write_raw(self, name: str, data: memoryview) -> None:
        """Write one tensor's bytes as they are, once.

        Raises:
            Internal: another size than planned, or written before.
        """
        plan = self._next(name)
        if data.nbytes != plan.nbytes:
            raise Internal(f"{name} has {data.nbytes} bytes, planned were {plan.nbytes}")
        self._put(name, data)
        self._left.discard(name)

    def write_rows(self, name: str, blocks: Iterable[torch.Tensor]) -> None:
        """Write one tensor, once, in blocks of its rows, the first rows first.

        Raises:
            Internal: of another type or shape than planned, or written before.
        """
        plan = self._next(name)
        descriptor, offset = self._places[name]
        done = 0
        for block in blocks:
            found = (dtype_name(str(block.dtype)), tuple(block.shape[1:]))
            if found != (plan.dtype, plan.shape[1:]):
                raise Internal(f"{name} has rows {found}, planned was {(plan.dtype, plan.shape)}")
            data = tensor_bytes(block)
            if done + data.nbytes > plan.nbytes:
                raise Internal(f"{name} has more rows than the {plan.shape[0]} that were planned")
            _write_all(descriptor, data, offset + done)
            done += data.nbytes
        if done != plan.nbytes:
            raise Internal(f"{name} has {done} bytes, planned were {plan.nbytes}")
        self._left.discard(name)

    def _next(self, name: str) -> TensorPlan:
        if name not in self._left:
            raise Internal(f"{name} was not planned, or is written already")
        return self._plans[name]

    def _put(self, name: str, data: memoryview) -> None:
        descriptor, offset = self._places[name]
        _write_all(descriptor, data, offset)

    def close(self) -> None:
        """Close the files.

        Raises:
            Internal: planned tensors were not written.
        """
        self._release()
        if self._left:
            raise Internal(
                f"{len(self._left)} planned tensors were not written, such as {min(self._left)}"
            )

    def _release(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

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
            self._release()


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


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    view = data.cast("B") if data.nbytes else data
    done = 0
    while done < view.nbytes:
        done += os.pwrite(descriptor, view[done : done + _CHUNK], offset + done)
