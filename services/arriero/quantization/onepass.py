"""Model and adapters into quantized files, block by block of rows, read once.

Responsibility: make the tensors of several GGUF files from a model's tensors,
with nothing in between on disk. Does not know what the files' headers say, nor
which type a tensor gets.

The bytes are those of merge, convert and llama-quantize one after the other:
each step works on rows that do not depend on each other, and rounds where that
chain does: to the merged model's type, to the converter's, to the quant type.
"""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import numpy.typing as npt

from arriero.errors import DataLoss, Internal
from arriero.llama import Header, TensorInfo, quantize_rows, row_bytes
from arriero.quantization.converter import Outline
from arriero.weights import MergedWeights, TensorPlan, Weights
from arriero.weights.sink import Sink, SinkFile, Written

if TYPE_CHECKING:
    import torch

# Numbers of a block: 4 MB as float32, small enough to stay in the cache.
_BLOCK = 1 << 20
# Blocks for each thread that are in the making or made: files are written in order.
_AHEAD = 4
_POLL_SECONDS = 0.2


class Source(Protocol):
    """Tensors of a model, by rows."""

    def __getitem__(self, name: str, /) -> TensorPlan:
        """Type and shape of a tensor."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor, in its type."""


class Stored:
    """A model's tensors as they lie on disk."""

    def __init__(self, weights: Weights) -> None:
        """Take an opened model."""
        self._weights = weights

    def __getitem__(self, name: str) -> TensorPlan:
        """Type and shape of a tensor."""
        info = self._weights[name]
        return TensorPlan(name, info.dtype, info.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor, in its type."""
        return self._weights.tensor(name)[start:stop]


class Merged:
    """A model's tensors with adapters folded in.

    `MergedWeights` has one place for intermediate values, so each thread opens
    its own; that reads headers only.
    """

    def __init__(self, open_weights: Callable[[], MergedWeights]) -> None:
        """Take what opens model and adapters."""
        self._open = open_weights
        self._plans = open_weights()
        self._local = threading.local()

    def __getitem__(self, name: str) -> TensorPlan:
        """Type and shape of a merged tensor."""
        return self._plans[name]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a merged tensor, in its type."""
        weights: MergedWeights | None = getattr(self._local, "weights", None)
        if weights is None:
            weights = self._local.weights = self._open()
        return weights.rows(name, start, stop)


def obstacle(outline: Outline, source: Source) -> str:
    """Why the one pass cannot make this model's tensors; empty when it can."""
    if outline.obstacle:
        return outline.obstacle
    for name, origin in outline.origins.items():
        if origin.source is not None:
            try:
                shape = source[origin.source].shape
            except KeyError:
                return f"{name} comes from {origin.source}, which the model does not have"
            if len(shape) > 2:
                return f"{origin.source} has {len(shape)} dimensions"
    return ""


@dataclass(frozen=True, slots=True)
class Target:
    """A file to fill: it exists, with its header; the rest of it is made anew.

    Attributes:
        path: of the file.
        header: what it says.
        scratch: nobody needs its digest, nor the file when the machine stops.
    """

    path: Path
    header: Header
    scratch: bool = False


def fill(
    outline: Outline,
    outline_header: Header,
    source: Source,
    targets: Sequence[Target],
    *,
    importance: Mapping[str, npt.NDArray[np.float32]],
    n_threads: int,
    tick: Callable[[int, int], None],
    check: Callable[[], None],
) -> dict[str, Written]:
    """Read the model once and write every tensor of every target.

    The files are hashed and pushed to the disk meanwhile.

    Args:
        outline: where tensors come from.
        outline_header: what its file says: the types between model and targets.
        source: the model's tensors.
        targets: files to fill, all with the outline's tensors.
        importance: importance matrix by GGUF tensor name; may be empty.
        n_threads: blocks that are worked on at a time.
        tick: called with numbers done and in all.
        check: called a few times a second; what it raises ends the work.

    Returns:
        Digests of the targets that stay, by file name; they are on the disk.

    Raises:
        DataLoss: weights that are not finite.
        DiskFull: no room for the targets, with figures, before a block is made.
    """
    import torch

    before = torch.get_num_threads()
    # Parallel over blocks: threads inside of an operation would only wait for each other.
    torch.set_num_threads(1)
    try:
        with _Filling(outline, outline_header, source, targets, importance) as filling:
            _in_parallel(filling, list(filling.blocks()), n_threads, tick, check)
            return filling.close()
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows [start, stop) of a GGUF tensor."""

    tensor: TensorInfo
    start: int
    stop: int

    @property
    def size(self) -> int:
        return (self.stop - self.start) * self.tensor.shape[0]


class _Filling:
    """The open files, and what a block is in each of them."""

    def __init__(
        self,
        outline: Outline,
        outline_header: Header,
        source: Source,
        targets: Sequence[Target],
        importance: Mapping[str, npt.NDArray[np.float32]],
    ) -> None:
        self._outline = outline
        self._header = outline_header
        self._source = source
        self._importance = importance
        self._local = threading.local()
        # Memory of blocks that were written.
        self._spare: deque[npt.NDArray[np.uint8]] = deque()
        self._targets = targets
        self._places = [
            {tensor.name: tensor for tensor in target.header.tensors} for target in targets
        ]
        self._outline_file = os.open(outline.path, os.O_RDONLY)
        self._sink = Sink()
        try:
            self._files = [self._begin(target) for target in targets]
        except BaseException:
            self._leave()
            raise

    def _begin(self, target: Target) -> SinkFile:
        with target.path.open("rb") as file:
            head = file.read(target.header.data_offset)
        made = self._sink.add(target.path, target.header.size, scratch=target.scratch)
        self._sink.put(made, 0, memoryview(head))
        return made

    def _leave(self) -> None:
        os.close(self._outline_file)
        self._sink.abandon()

    def close(self) -> dict[str, Written]:
        """Wait until everything is on the disk; returns digests by file name."""
        return self._sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    def blocks(self) -> Iterator[_Block]:
        """All blocks, as they lie in the targets; heads that are permuted stay whole."""
        between = {tensor.name: tensor for tensor in self._header.tensors}
        for name in self._places[0]:
            tensor = between[name]
            columns, rows = _extent(tensor)
            origin = self._outline.origins[name]
            step = max(1, _BLOCK // columns)
            if origin.heads and rows > 1:  # a bias is one row
                head = rows // origin.heads
                step = max(head, step // head * head)
            for start in range(0, rows, step):
                yield _Block(tensor, start, min(start + step, rows))

    def make(self, block: _Block) -> list[npt.NDArray[np.uint8]]:
        """The bytes of a block in each target; threads may do so side by side."""
        columns = block.tensor.shape[0]
        values = self._values(block)
        if not np.isfinite(values).all():
            # Most types would take it: blocks of a NaN are zeros or noise, and some abort.
            raise DataLoss(
                f"{self._outline.origins[block.tensor.name].source or block.tensor.name} holds NaN "
                "or infinite numbers; fetch or make the model again, or look for the adapter that "
                "brought them"
            )
        weights = self._importance.get(block.tensor.name)
        made = []
        for places in self._places:
            kind = places[block.tensor.name].type
            out = self._room((block.stop - block.start) * row_bytes(kind, columns))
            if kind == "F32":
                out[:] = values.reshape(-1).view(np.uint8)
            else:
                quantize_rows(kind, values, out, weights)
            made.append(out)
        return made

    def put(self, block: _Block, made: Sequence[npt.NDArray[np.uint8]]) -> None:
        """Have a block written that was made; its memory is used again."""
        columns, rows = _extent(block.tensor)
        for out, file, target, places in zip(
            made, self._files, self._targets, self._places, strict=True
        ):
            tensor = places[block.tensor.name]
            offset = target.header.data_offset + tensor.offset
            self._sink.put(file, offset + block.start * row_bytes(tensor.type, columns), out.data)
            if block.stop == rows:
                # Up to where the next tensor begins, or the file ends.
                gap = bytes(-tensor.size % target.header.alignment)
                self._sink.put(file, offset + tensor.size, memoryview(gap))
            self._spare.append(out if out.base is None else out.base)

    def _values(self, block: _Block) -> npt.NDArray[np.float32]:
        """float32, shape (rows, columns), rounded as the converter's file would be."""
        import torch

        columns = block.tensor.shape[0]
        count = block.stop - block.start
        values = self._buffer("values", 4 * block.size).view(np.float32).reshape(count, columns)
        origin = self._outline.origins[block.tensor.name]
        if origin.source is None:
            self._read_constant(block, values)
            return values
        wide = torch.from_numpy(values)
        plan = self._source[origin.source]
        vector = len(plan.shape) == 1
        merged = (
            self._source.rows(origin.source, 0, columns).reshape(1, columns)
            if vector
            else self._source.rows(origin.source, block.start, block.stop)
        )
        # The converter's file may be narrower than the model, in a model of mixed types.
        narrow = {"F16": torch.float16, "BF16": torch.bfloat16}.get(block.tensor.type)
        if narrow not in (None, merged.dtype):
            merged = merged.to(torch.float32).to(narrow)
        if origin.heads and not vector:
            _, rows = _extent(block.tensor)
            half = rows // origin.heads // 2
            # Rows (head, half, pair) become (head, pair, half): conversion/llama.py, `permute`.
            merged = merged.reshape(-1, 2, half, columns).swapaxes(1, 2).reshape(count, columns)
        elif origin.heads:
            merged = merged.reshape(origin.heads, 2, -1).swapaxes(1, 2).reshape(1, columns)
        wide.copy_(merged)
        return values

    def _read_constant(self, block: _Block, values: npt.NDArray[np.float32]) -> None:
        if block.tensor.type != "F32":
            raise Internal(f"{block.tensor.name} is made as {block.tensor.type}, expected F32")
        offset = self._header.data_offset + block.tensor.offset + 4 * block.start * values.shape[1]
        if os.preadv(self._outline_file, [values.reshape(-1).view(np.uint8).data], offset) != (
            values.nbytes
        ):
            raise Internal(f"the outline ends within {block.tensor.name}")

    def _room(self, size: int) -> npt.NDArray[np.uint8]:
        """Memory for a block that waits to be written."""
        try:
            buffer = self._spare.popleft()
        except IndexError:
            buffer = np.empty(size, dtype=np.uint8)
        if buffer.nbytes < size:
            buffer = np.empty(size, dtype=np.uint8)
        return buffer[:size]

    def _buffer(self, name: str, size: int) -> npt.NDArray[np.uint8]:
        """Memory of this thread, used again for every block."""
        buffer: npt.NDArray[np.uint8] | None = getattr(self._local, name, None)
        if buffer is None or buffer.nbytes < size:
            buffer = np.empty(size, dtype=np.uint8)
            setattr(self._local, name, buffer)
        return buffer[:size]


def _extent(tensor: TensorInfo) -> tuple[int, int]:
    """Columns and rows of a tensor; a vector is one row."""
    return tensor.shape[0], tensor.elements // tensor.shape[0]


def _in_parallel(
    filling: _Filling,
    blocks: Sequence[_Block],
    n_threads: int,
    tick: Callable[[int, int], None],
    check: Callable[[], None],
) -> None:
    """Make blocks side by side, have them written in order, and stop at the first error."""
    done, total = 0, sum(block.size for block in blocks)
    rest = iter(blocks)
    running: deque[tuple[_Block, concurrent.futures.Future[list[npt.NDArray[np.uint8]]]]] = deque()
    pool = concurrent.futures.ThreadPoolExecutor(n_threads, thread_name_prefix="quantize")
    try:
        while True:
            check()
            tick(done, total)
            while len(running) < _AHEAD * n_threads and (block := next(rest, None)) is not None:
                running.append((block, pool.submit(filling.make, block)))
            if not running:
                return
            concurrent.futures.wait([running[0][1]], _POLL_SECONDS)
            while running and running[0][1].done():
                block, future = running.popleft()
                filling.put(block, future.result())
                done += block.size
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
