"""Which replica gets the next request.

Responsibility: one channel per ready replica, those that say they are well first,
of them the one with fewest in flight; looked up again every few seconds. Does not
know what is asked of a replica.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from arriero import rpc
from arriero.errors import ArrieroError, NotFound, Unavailable
from arriero.settings import ClientSettings
from arriero.v1 import orchestrator_pb2 as pb

__all__ = ["Replica", "Replicas"]

REFRESH_SECONDS = 3.0
# How long a replica that did not answer is asked last.
_SHUN_SECONDS = 5.0
# Between attempts to hear from a replica how it is.
_LISTEN_SECONDS = 1.0


@dataclass(slots=True)
class Replica:
    """A ready replica: where it is, how much it has to do for us."""

    address: str
    channel: grpc.aio.Channel
    in_flight: int = 0
    last_used: float = 0.0
    shunned_until: float = 0.0
    # What it says itself: its engine may have died, or it drains, before the
    # orchestrator hears of it.
    well: bool = True
    gone: bool = False
    listener: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Close the channel, which nobody uses any more."""
        if self.listener is not None:
            self.listener.cancel()
        await self.channel.close()

    async def listen(self) -> None:
        """Hear from the replica how it is, for as long as it is known."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        while True:
            try:
                async for said in stub.Watch(health_pb2.HealthCheckRequest(service="ready")):
                    self.well = said.status == health_pb2.HealthCheckResponse.SERVING
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    self.well = True
                    return
            self.well = False
            await asyncio.sleep(_LISTEN_SECONDS)


class Replicas:
    """The replicas of one endpoint.

    Args:
        name: of the endpoint.
        look_up: asks the orchestrator for the endpoint as it is.
        settings: credentials for the replicas.
    """

    def __init__(
        self,
        name: str,
        look_up: Callable[[], Awaitable[pb.Endpoint]],
        settings: ClientSettings,
    ) -> None:
        self._name = name
        self._look_up = look_up
        self._settings = settings
        self._replicas: dict[str, Replica] = {}
        self._looked_up = float("-inf")
        self._refreshing: asyncio.Task[None] | None = None
        self._state = "not looked up"
        # Why the last look-up brought nothing; told when no replica is known.
        self._error: ArrieroError | None = None

    @asynccontextmanager
    async def one(
        self, *, without: Collection[str] = (), instead: ArrieroError | None = None
    ) -> AsyncIterator[Replica]:
        """The ready replica with fewest requests in flight, counted while inside.

        Args:
            without: addresses that were tried already.
            instead: raised when there is none left; default: Unavailable.

        Raises:
            Unavailable: there is none (left).
            NotFound: there is no such endpoint.
            ArrieroError: none is known, and the orchestrator's answer was this.
        """
        await self._fresh()
        choice = self._choose(without)
        if choice is None:
            await self.refresh()  # a replica may have come since
            choice = self._choose(without)
        if choice is None and (instead or self._error) is not None:
            raise instead or self._error  # type: ignore[misc]
        if choice is None:
            tried = f"; did not answer: {', '.join(sorted(without))}" if without else ""
            raise Unavailable(
                f"endpoint {self._name} has no ready replica ({self._state}){tried}",
                reason="NO_READY_REPLICA",
            )
        choice.in_flight += 1
        choice.last_used = time.monotonic()
        try:
            yield choice
        finally:
            choice.in_flight -= 1
            if choice.gone and choice.in_flight == 0:
                await choice.close()

    def shun(self, replica: Replica) -> None:
        """It did not answer: ask it last for a while."""
        replica.shunned_until = time.monotonic() + _SHUN_SECONDS
        self._looked_up = float("-inf")

    async def refresh(self) -> None:
        """Look the replicas up now; a look-up that runs already is joined."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
        await asyncio.shield(self._refreshing)

    async def close(self) -> None:
        """Close every channel."""
        if self._refreshing is not None:
            self._refreshing.cancel()
        for replica in self._replicas.values():
            await replica.close()
        self._replicas.clear()

    async def _fresh(self) -> None:
        if time.monotonic() - self._looked_up < REFRESH_SECONDS:
            return
        if not self._replicas:
            await self.refresh()
        elif self._refreshing is None or self._refreshing.done():
            # Known replicas serve; the request need not wait for news.
            self._refreshing = asyncio.create_task(self._refresh())

    async def _refresh(self) -> None:
        try:
            endpoint = await self._look_up()
        except ArrieroError as error:
            self._looked_up, self._error = time.monotonic(), error
            # Serving needs no orchestrator: what was known still serves, unless
            # the answer is that the endpoint is no more.
            if not isinstance(error, NotFound):
                return
            endpoint = pb.Endpoint()
        else:
            self._looked_up, self._error = time.monotonic(), None
        self._state = f"{endpoint.ready_replicas} of {endpoint.desired_replicas} are ready"
        ready = {
            replica.address
            for replica in endpoint.replicas
            if replica.state == pb.REPLICA_STATE_READY and replica.address
        }
        for address in ready - self._replicas.keys():
            channel = rpc.connect(address, self._settings, retries=False)
            self._replicas[address] = replica = Replica(address, channel)
            replica.listener = asyncio.create_task(replica.listen())
        for address in self._replicas.keys() - ready:
            replica = self._replicas.pop(address)
            replica.gone = True
            if replica.in_flight == 0:
                await replica.close()

    def _choose(self, without: Collection[str]) -> Replica | None:
        now = time.monotonic()
        left = [r for r in self._replicas.values() if r.address not in without]
        return min(
            left,
            key=lambda r: (not r.well, r.shunned_until > now, r.in_flight, r.last_used),
            default=None,
        )
