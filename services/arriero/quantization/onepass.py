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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import numpy.typing as npt

from arriero.errors import Internal
from arriero.llama import Header, TensorInfo, quantize_rows, row_bytes
from arriero.quantization.converter import Outline
from arriero.weights import MergedWeights, TensorPlan, Weights

if TYPE_CHECKING:
    import torch

# Numbers of a block: 4 MB as float32, small enough to stay in the cache.
_BLOCK = 1 << 20
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
    """A file to fill: it exists in full length, with its header.

    Attributes:
        path: of the file.
        header: what it says.
    """

    path: Path
    header: Header


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
) -> None:
    """Read the model once and write every tensor of every target.

    Args:
        outline: where tensors come from.
        outline_header: what its file says: the types between model and targets.
        source: the model's tensors.
        targets: files to fill, all with the outline's tensors.
        importance: importance matrix by GGUF tensor name; may be empty.
        n_threads: blocks that are worked on at a time.
        tick: called with numbers done and in all.
        check: called a few times a second; what it raises ends the work.

    Raises:
        DataLoss: weights that are not finite.
    """
    import torch

    before = torch.get_num_threads()
    # Parallel over blocks: threads inside of an operation would only wait for each other.
    torch.set_num_threads(1)
    try:
        with _Filling(outline, outline_header, source, targets, importance) as filling:
            _in_parallel(filling, list(filling.blocks()), n_threads, tick, check)
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
    """The open files, and how one block gets into each of them."""

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
        self._descriptors: list[int] = []
        self._places = [
            {tensor.name: (tensor, target.header.data_offset) for tensor in target.header.tensors}
            for target in targets
        ]
        try:
            self._outline_file = self._open(outline.path, os.O_RDONLY)
            self._files = [self._open(target.path, os.O_WRONLY) for target in targets]
        except BaseException:
            self._close()
            raise

    def _open(self, path: Path, flags: int) -> int:
        self._descriptors.append(os.open(path, flags))
        return self._descriptors[-1]

    def _close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def blocks(self) -> Iterator[_Block]:
        """All blocks; heads that are permuted stay whole."""
        for tensor in self._header.tensors:
            columns, rows = _extent(tensor)
            origin = self._outline.origins[tensor.name]
            step = max(1, _BLOCK // columns)
            if origin.heads and rows > 1:  # a bias is one row
                head = rows // origin.heads
                step = max(head, step // head * head)
            for start in range(0, rows, step):
                yield _Block(tensor, start, min(start + step, rows))

    def write(self, block: _Block) -> None:
        """Compute a block and write it to every file."""
        columns = block.tensor.shape[0]
        values = self._values(block)
        weights = self._importance.get(block.tensor.name)
        for descriptor, places in zip(self._files, self._places, strict=True):
            tensor, data_offset = places[block.tensor.name]
            stride = row_bytes(tensor.type, columns)
            if tensor.type == "F32":
                out = values.reshape(-1).view(np.uint8)
            else:
                out = self._buffer("out", (block.stop - block.start) * stride)
                quantize_rows(tensor.type, values, out, weights)
            _write_all(descriptor, out, data_offset + tensor.offset + block.start * stride)

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
    """Work on blocks, in order, and stop at the first error."""
    done, total = 0, sum(block.size for block in blocks)
    rest = iter(blocks)
    running: dict[concurrent.futures.Future[None], _Block] = {}
    pool = concurrent.futures.ThreadPoolExecutor(n_threads, thread_name_prefix="quantize")
    try:
        while True:
            check()
            tick(done, total)
            # Two for each thread: one to work on, one to take next.
            while len(running) < 2 * n_threads and (block := next(rest, None)) is not None:
                running[pool.submit(filling.write, block)] = block
            if not running:
                return
            ended, _ = concurrent.futures.wait(
                running, _POLL_SECONDS, concurrent.futures.FIRST_COMPLETED
            )
            for future in ended:
                done += running.pop(future).size
                future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _write_all(descriptor: int, data: npt.NDArray[np.uint8], offset: int) -> None:
    view: memoryview = data.data
    done = 0
    while done < view.nbytes:
        done += os.pwrite(descriptor, view[done:], offset + done)
