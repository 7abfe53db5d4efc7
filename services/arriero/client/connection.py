"""One connection of an asyncio client, and how long its calls may take.

Responsibility: opening the channel on first use, in the loop that uses it, and
deadlines by the nature of a call. Does not know what is asked.
"""

from __future__ import annotations

import asyncio

import grpc.aio

from arriero import rpc
from arriero.client.address import orchestrator_address
from arriero.errors import FailedPrecondition
from arriero.settings import ClientSettings

__all__ = ["FOLLOW_SECONDS", "TRANSFER_SECONDS", "Connection"]

# A stream that follows something is opened anew after an hour: a deadline that
# no healthy stream needs, for those whose other end has lost its mind.
FOLLOW_SECONDS = 3600.0
# 140 GB at 10 MB/s take four hours.
TRANSFER_SECONDS = 24 * 3600.0


class Connection:
    """The orchestrator's channel.

    Args:
        address: `host:port`; default: see `orchestrator_address`.
        settings: credentials and the default deadline; default: the environment's.
    """

    def __init__(self, address: str | None, settings: ClientSettings | None) -> None:
        self.settings = settings or ClientSettings.from_env()
        self.address = address or orchestrator_address()
        self._channel: grpc.aio.Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel, opened by the first use.

        Raises:
            FailedPrecondition: another event loop opened it.
        """
        loop = asyncio.get_running_loop()
        if self._channel is None:
            self._channel, self._loop = rpc.connect(self.address, self.settings), loop
        elif loop is not self._loop:
            raise FailedPrecondition(
                "an AsyncClient belongs to the event loop that used it first; make one per loop"
            )
        return self._channel

    async def close(self) -> None:
        """Close the channel; running calls end with `Cancelled`."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None
