"""Rows that are said twice.

Responsibility: of equal, or of similar rows, find all but the first. Does not
know where rows come from.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from arriero.dataset.batches import NEAR, Answer
from arriero.dataset.shingles import FINGERPRINT_BYTES, band_shape

Mask = npt.NDArray[np.bool_]


class Duplicates:
    """Collects what tells rows apart, and finds the rows that come again.

    Fingerprints are held in memory, 16 bytes a row; shingles and bands on disk,
    a band at a time in memory. A context manager.

    Args:
        how: `exact` or `near`.
        threshold: Jaccard similarity of word shingles from which rows are near.
        directory: for the files.
    """

    def __init__(self, how: str, threshold: float, directory: Path) -> None:
        self._how, self._threshold, self._directory = how, threshold, directory
        self._prints = bytearray()
        self._sizes = bytearray()
        self._bands: list[Path] = []
        if how == NEAR:
            directory.mkdir(parents=True, exist_ok=True)
            self._shingles = (directory / "shingles").open("wb+")
            self._bands = [
                directory / f"band-{number}" for number in range(band_shape(threshold)[0])
            ]
            self._files = [path.open("wb") for path in self._bands]

    def __enter__(self) -> Duplicates:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._how == NEAR:
            for file in (self._shingles, *self._files):
                file.close()
            shutil.rmtree(self._directory, ignore_errors=True)

    def add(self, answer: Answer) -> None:
        """Take what `batches.read` says about the next rows."""
        self._prints += answer["prints"]
        if self._how != NEAR:
            return
        self._sizes += answer["sizes"]
        self._shingles.write(answer["shingles"])
        found = np.frombuffer(answer["bands"], dtype=np.uint64).reshape(-1, len(self._files))
        for column, file in zip(found.T, self._files, strict=True):
            file.write(column.tobytes())

    def find(self, usable: Mask) -> tuple[Mask, Mask]:
        """Usable rows that equal one before, and those that are only near one.

        Of a group of rows that are alike the first is kept.
        """
        prints = np.frombuffer(self._prints, dtype=f"V{FINGERPRINT_BYTES}")
        rows = np.flatnonzero(usable)
        _, first = np.unique(prints[rows], return_index=True)
        equal = usable.copy()
        equal[rows[first]] = False
        near = np.zeros(len(usable), dtype=np.bool_)
        if self._how == NEAR:
            self._find_near(usable & ~equal, near)
        return equal, near

    def _find_near(self, candidates: Mask, near: Mask) -> None:
        self._shingles.flush()
        for file in self._files:
            file.flush()
        sizes = np.frombuffer(self._sizes, dtype=np.int32)
        starts = np.cumsum(sizes, dtype=np.int64) - sizes
        fd = self._shingles.fileno()

        def shingles(row: int) -> npt.NDArray[np.uint32]:
            data = os.pread(fd, 4 * int(sizes[row]), 4 * int(starts[row]))
            return np.frombuffer(data, dtype=np.uint32)

        for path in self._bands:
            rows = np.flatnonzero(candidates & ~near & (sizes > 0))
            band = np.fromfile(path, dtype=np.uint64)[rows]
            order = np.argsort(band, kind="stable")
            band, rows = band[order], rows[order]
            edges = np.flatnonzero(np.diff(band)) + 1
            begins = np.concatenate(([0], edges))
            ends = np.concatenate((edges, [len(band)]))
            several = ends - begins > 1
            for begin, end in zip(begins[several], ends[several], strict=True):
                kept: list[npt.NDArray[np.uint32]] = []
                for row in rows[begin:end]:
                    mine = shingles(row)
                    if any(_similar(mine, other, self._threshold) for other in kept):
                        near[row] = True
                    else:
                        kept.append(mine)


def _similar(one: npt.NDArray[np.uint32], other: npt.NDArray[np.uint32], threshold: float) -> bool:
    """Whether two sets, sorted, have at least that Jaccard similarity."""
    small, large = sorted((len(one), len(other)))
    if small < threshold * large:
        return False
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared >= threshold * (len(one) + len(other) - shared)
