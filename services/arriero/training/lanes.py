"""Threads of one process that work on parts of a micro batch at the same time.

Responsibility: how many, who takes which rows, and what each draws at random. One
thread per part wastes nothing at barriers, which threads that share every operation do:
the operations of a small model take microseconds. Does not know models or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Lanes"]

T = TypeVar("T")
R = TypeVar("R")


class Lanes:
    """The threads.

    Args:
        count: how many; with one, everything happens in the caller's thread.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = max(1, count)
        self._pool = None
        if self.count > 1:
            threads = torch.get_num_threads()
            each = max(1, threads // self.count)
            self._pool = ThreadPoolExecutor(
                self.count, "lane", initializer=torch.set_num_threads, initargs=(each,)
            )
            # The first call in a thread is for that thread, and for those that have had none.
            wait([self._pool.submit(torch.get_num_threads) for _ in range(self.count)])
            torch.set_num_threads(threads)

    def split(self, rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Rows of each part; those that come longest first are dealt evenly."""
        return [rows[lane :: self.count] for lane in range(min(self.count, len(rows)))]

    def run(self, work: Callable[[int, T], R], parts: Iterable[T]) -> list[R]:
        """Do work for all parts, in the order given; raises the first one's error.

        Args:
            work: called with the number of a part and the part.
            parts: at most as many as there are lanes.
        """
        given = list(parts)
        if self._pool is None or len(given) == 1:
            return [work(number, part) for number, part in enumerate(given)]
        done = [self._pool.submit(work, number, part) for number, part in enumerate(given)]
        wait(done)
        return [one.result() for one in done]
