"""Processes that do batches side by side, with answers in the order of the batches.

Responsibility: start workers when there is enough to do, keep each busy, and
say so when one dies. Does not know what a batch is about.

Workers are started anew, never forked, and leave when the pipe to them closes:
none outlives its job.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from arriero.dataset.batches import Answer, Batches, read
from arriero.dataset.formats import RowFormat
from arriero.dataset.worker import receive, send
from arriero.errors import Internal, ResourceExhausted

# Batches under way for each worker: one in work, one waiting.
_AHEAD = 2

T = TypeVar("T")
# What the answer is for, the rows' format, the rows.
Batch = tuple[T, RowFormat, list[Any]]


class Crew:
    """Does batches in this process, or in several.

    A context manager.

    Args:
        batches: how rows are encoded here.
        processes: how many; 1 works in this process.
    """

    def __init__(self, batches: Batches, processes: int) -> None:
        self._batches = batches
        self._count = processes if processes > 1 else 0
        self._idle: deque[subprocess.Popen[bytes]] = deque()
        self._workers: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Crew:
        if self._count:
            for _ in range(self._count):
                worker = subprocess.Popen(
                    [sys.executable, "-m", "arriero.dataset.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    # Each has its core: threads inside would only get in each other's way.
                    env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
                )
                assert worker.stdin is not None
                self._workers.append(worker)
                send(worker.stdin, ("settings", {}, [], self._batches.settings.to_dict()))
            self._idle.extend(self._workers)
            self._pool = ThreadPoolExecutor(max_workers=self._count)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            if kind is not None:
                worker.kill()
            try:
                if worker.stdin is not None:
                    worker.stdin.close()
            except OSError:  # it died with a batch half written to it
                pass
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()

    def read(
        self, batches: Iterable[Batch[T]], dedup: str, threshold: float
    ) -> Iterator[tuple[T, Answer]]:
        """`batches.read` of each batch, in order."""
        return self._do("read", batches, [(dedup, threshold)])

    def encode(self, batches: Iterable[Batch[T]], samples: int) -> Iterator[tuple[T, Answer]]:
        """`Batches.encode` of each batch, in order; the first also renders `samples` rows."""
        return self._do("encode", batches, [samples, 0])

    def _do(
        self, task: str, batches: Iterable[Batch[T]], arguments: list[Any]
    ) -> Iterator[tuple[T, Answer]]:
        """The last argument holds for all batches after those that have their own."""
        waiting: deque[tuple[T, Future[Answer]]] = deque()
        for number, (what, form, values) in enumerate(batches):
            argument = arguments[min(number, len(arguments) - 1)]
            if self._pool is None:
                answer = (
                    read(form, values, *argument)
                    if task == "read"
                    else self._batches.encode(form, values, argument)
                )
                yield what, answer
                continue
            sent = (task, {"name": form.name, "columns": dict(form.columns)}, values, argument)
            waiting.append((what, self._pool.submit(self._ask, sent)))
            if len(waiting) >= self._count * _AHEAD:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()

    def _ask(self, question: Any) -> Answer:
        with self._lock:
            worker = self._idle.popleft()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            send(worker.stdin, question)
            answer: Answer = receive(worker.stdout)
        except (EOFError, BrokenPipeError) as error:
            code = worker.wait()
            if code >= 0:
                raise Internal(
                    f"a process that prepares rows ended with exit code {code} (a defect; the "
                    "operation's log has the details)"
                ) from error
            raise ResourceExhausted(
                f"a process that prepares rows was ended by signal {-code}, most often the "
                "kernel's, out of memory: set num_proc lower, or give the service more memory",
                reason="OUT_OF_MEMORY",
            ) from error
        with self._lock:
            self._idle.append(worker)
        return answer
