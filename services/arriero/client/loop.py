"""An event loop in a thread, for blocking callers.

Responsibility: run coroutines and async generators from other threads, and pass
interruptions on. Does not know gRPC or what is run.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

from arriero.errors import Cancelled, FailedPrecondition

__all__ = ["LoopThread"]

_T = TypeVar("_T")


class LoopThread:
    """An event loop in a daemon thread, started by the first use."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of a coroutine; Ctrl-C cancels it.

        Raises:
            FailedPrecondition: the loop was stopped before.
            Cancelled: the loop was stopped meanwhile.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._started(work))
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise Cancelled("the client was closed while the call ran") from None
        except BaseException:
            future.cancel()
            raise

    def each(self, items: AsyncGenerator[_T, None]) -> Iterator[_T]:
        """The items of an async generator; closed with the iterator."""
        try:
            while True:
                try:
                    item = self.run(_next(items))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if not self._closed:
                self.run(_close(items))

    def stop(self) -> None:
        """Cancel what runs, and end the loop and its thread."""
        with self._lock:
            self._closed = True
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None:
            asyncio.run_coroutine_threadsafe(_cancel_all(), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    @property
    def used(self) -> bool:
        """Whether the loop runs."""
        return self._loop is not None

    def _started(self, work: Coroutine[Any, Any, Any]) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._closed:
                work.close()
                raise FailedPrecondition("the client is closed; make a new one")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._loop.set_exception_handler(_handle)
                self._thread = threading.Thread(
                    target=self._loop.run_forever, name="arriero-client", daemon=True
                )
                self._thread.start()
            return self._loop


def _handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Report what went wrong in a callback, but for news that came too late for anybody.

    grpc hands events of all loops round in whichever polls, also those of a closed one.
    """
    error = context.get("exception")
    if not (isinstance(error, RuntimeError) and "Event loop is closed" in str(error)):
        loop.default_exception_handler(context)


async def _next(items: AsyncGenerator[_T, None]) -> _T:
    return await anext(items)


async def _close(items: AsyncGenerator[Any, None]) -> None:
    with contextlib.suppress(RuntimeError):  # still running: it was cancelled and ends itself
        await items.aclose()


async def _cancel_all() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
