"""How fast requests may start.

Responsibility: limits per minute on requests and tokens, and pauses that the
endpoint asks for. Does not know HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

__all__ = ["Pace"]


class _Budget:
    """So much per minute, refilled evenly; may be overdrawn, and is then waited for."""

    def __init__(self, per_minute: int, burst: float, now: float) -> None:
        self._rate = per_minute / 60
        self._most = burst
        self._left = burst
        self._at = now

    def wait(self, now: float, needed: float) -> float:
        """Seconds until so much is left."""
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, (needed - self._left) / self._rate)

    def spend(self, amount: float) -> None:
        self._left -= amount


class Pace:
    """Lets requests start one after the other, as the limits allow.

    Requests start evenly (a burst is what endpoints answer with 429); of tokens
    ten seconds' worth may go at once.

    Args:
        requests_per_minute: 0 means no limit.
        tokens_per_minute: prompt and answer together; 0 means no limit.
        clock: seconds.
        sleep: waits that many.
    """

    def __init__(
        self,
        requests_per_minute: int,
        tokens_per_minute: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._clock, self._sleep = clock, sleep
        now = clock()
        self._requests = _Budget(requests_per_minute, 1, now) if requests_per_minute else None
        self._tokens = (
            _Budget(tokens_per_minute, tokens_per_minute / 6, now) if tokens_per_minute else None
        )
        self._paused_until = 0.0
        self._turn = asyncio.Lock()

    async def start(self, tokens: int) -> None:
        """Return when a request of about so many tokens may start."""
        async with self._turn:
            while (delay := self._delay()) > 0:
                await self._sleep(delay)
            if self._requests:
                self._requests.spend(1)
            if self._tokens:
                self._tokens.spend(tokens)

    def correct(self, expected: int, actual: int) -> None:
        """Say how many tokens it was in the end."""
        if self._tokens:
            self._tokens.spend(actual - expected)

    def pause(self, seconds: float) -> None:
        """Start nothing for so long: the endpoint asked for it."""
        self._paused_until = max(self._paused_until, self._clock() + seconds)

    def _delay(self) -> float:
        now = self._clock()
        delay = self._paused_until - now
        if self._requests:
            delay = max(delay, self._requests.wait(now, 1))
        if self._tokens:
            # No answer's length is known before: tokens may be overdrawn by one request.
            delay = max(delay, self._tokens.wait(now, 0))
        return delay
