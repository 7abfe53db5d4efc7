"""The tensors of a directory, mapped lazily.

Responsibility: find every tensor of a sharded or whole safetensors checkpoint
and give it without reading the rest. Does not know what the tensors mean.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from arriero.errors import DataLoss, FailedPrecondition, NotFound
from arriero.weights.layout import TORCH_NAMES, TensorInfo, read_header

if TYPE_CHECKING:
    import torch

__all__ = ["INDEX_SUFFIX", "Weights", "same_bytes"]

INDEX_SUFFIX = ".index.json"
_COMPARE = 1 << 24
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")


class Weights(Mapping[str, TensorInfo]):
    """Name -> `TensorInfo` of a checkpoint, and the tensors themselves.

    Tensors share the files' pages (private, copy on write): nothing is read
    before it is touched, and changing one changes no file.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Take tensors that were found; `open` finds them."""
        self._tensors = dict(tensors)
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, directory: Path, stem: str = "model") -> Weights:
        """Read the headers of `<stem>.safetensors`, or of the shards its index names.

        Other safetensors files in the directory are left alone when there is an
        index or a `<stem>.safetensors`; without either all files count.

        Raises:
            FailedPrecondition: no safetensors at all, or tensors of an unknown type.
            DataLoss: a shard that the index names is missing, a tensor is not
                where the index says, a file is cut off or not safetensors.
        """
        index = directory / f"{stem}.safetensors{INDEX_SUFFIX}"
        if index.is_file():
            return cls(_indexed(index))
        whole = directory / f"{stem}.safetensors"
        if whole.is_file():
            return cls(read_header(whole))
        return cls(_unindexed(directory, stem))

    @classmethod
    def open_file(cls, path: Path) -> Weights:
        """The tensors of one file.

        Raises:
            NotFound: no such file.
            DataLoss: cut off, or not safetensors.
        """
        return cls(read_header(path))

    def __getitem__(self, name: str) -> TensorInfo:
        """Where a tensor lies."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Names, file by file, in the order of their data."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self._tensors.values())

    @property
    def elements(self) -> int:
        """Numbers in all tensors together."""
        return sum(math.prod(info.shape) for info in self._tensors.values())

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors, in order."""
        return list(dict.fromkeys(info.file for info in self._tensors.values()))

    @property
    def altered(self) -> frozenset[str]:
        """Tensors whose values are not the files'; none, but in a view that changes some."""
        return frozenset()

    def raw(self, name: str) -> memoryview:
        """A tensor's bytes, as the file has them."""
        info = self[name]
        if not info.nbytes:
            return memoryview(b"")
        return memoryview(self._map(info.file))[info.start : info.start + info.nbytes]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor on the CPU, in its own type, over the file's pages."""
        import torch

        info = self[name]
        dtype: torch.dtype = getattr(torch, TORCH_NAMES[info.dtype])
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        flat = torch.frombuffer(
            self._map(info.file),
            dtype=dtype,
            count=math.prod(info.shape),
            offset=info.start,
        )
        return flat.reshape(info.shape)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as file:
                # Copy on write: torch wants writable memory, the file stays as it is.
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[path]


def same_bytes(one: memoryview, other: memoryview) -> bool:
    """Whether two stretches of bytes are equal."""
    # numpy compares many bytes at once, a memoryview one by one.
    if not one.nbytes:
        return not other.nbytes
    ours, theirs = (np.frombuffer(data, dtype=np.uint8) for data in (one, other))
    return ours.size == theirs.size and all(
        np.array_equal(ours[i : i + _COMPARE], theirs[i : i + _COMPARE])
        for i in range(0, ours.size, _COMPARE)
    )


def _indexed(index: Path) -> dict[str, TensorInfo]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(places, dict) or not places:
            raise ValueError("weight_map names no tensor")
        wanted = {str(name): str(file) for name, file in places.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise DataLoss(
            f"{index.name} is not a safetensors index: {error}; expected a JSON object with "
            "weight_map"
        ) from error
    headers: dict[str, dict[str, TensorInfo]] = {}
    for file in dict.fromkeys(wanted.values()):
        if file != Path(file).name or file in {"", ".", ".."}:
            raise DataLoss(f"{index.name} names the file {file!r}; expected a plain file name")
        try:
            headers[file] = read_header(index.parent / file)
        except NotFound as error:
            count = sum(place == file for place in wanted.values())
            raise DataLoss(
                f"{index.name} names {file} for {count} tensors, but it is missing; "
                "fetch the shard that is missing"
            ) from error
    absent = [name for name, file in wanted.items() if name not in headers[file]]
    if absent:
        raise DataLoss(
            f"{index.name} places {absent[0]} in {wanted[absent[0]]}, which does not hold it "
            f"({len(absent)} such tensors); index and shards belong to different checkpoints"
        )
    return {
        name: info
        for file, header in headers.items()
        for name, info in header.items()
        if wanted.get(name) == file
    }


def _unindexed(directory: Path, stem: str) -> dict[str, TensorInfo]:
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise FailedPrecondition(
            f"{directory.name} holds no weights: expected {stem}.safetensors, or shards and "
            f"{stem}.safetensors{INDEX_SUFFIX}"
        )
    tensors: dict[str, TensorInfo] = {}
    numbers: dict[tuple[str, int], set[int]] = {}
    for path in paths:
        if found := _SHARD.fullmatch(path.name):
            numbers.setdefault((found["stem"], int(found["count"])), set()).add(
                int(found["number"])
            )
        for name, info in read_header(path).items():
            if name in tensors:
                raise DataLoss(
                    f"{name} is in {tensors[name].file.name} and in {path.name}, and there is "
                    f"no {stem}.safetensors{INDEX_SUFFIX} to say which; keep one"
                )
            tensors[name] = info
    for (name, count), present in numbers.items():
        if missing := sorted(set(range(1, count + 1)) - present):
            raise DataLoss(
                f"{len(missing)} of {count} shards of {name} are missing, the first is number "
                f"{missing[0]}; fetch them"
            )
    return tensors
