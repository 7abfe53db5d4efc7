"""A gRPC server as every Arriero service runs it.

Responsibility: ports, credentials, health, reflection, drain on SIGTERM, and
the end that follows the supervisor's. Does not know any service or store.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from arriero.errors import FailedPrecondition
from arriero.rpc import listen, parent
from arriero.rpc.auth import TokenFile
from arriero.rpc.certificates import server_credentials
from arriero.rpc.interceptor import Guard
from arriero.settings import ServerSettings

__all__ = ["MAX_MESSAGE_BYTES", "Server"]

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
LIVE, READY = "live", "ready"

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# How long health watchers get to hear NOT_SERVING before the port refuses calls.
_GOODBYE_SECONDS = 0.1

_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Two servers on one port would share its calls by chance.
    ("grpc.so_reuseport", 0),
    # Clients ping every 30 s, also between calls. Without the second option (the
    # core's GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS) a watch that has
    # no news for three minutes is cut: "too_many_pings".
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]

_log = logging.getLogger(__name__)


class Server:
    """One service's server.

    Health knows `live` (from start to end), and `ready`, the empty name and
    each service's name (all at once, by `set_ready`, and off while draining).

    Args:
        settings: where to listen and whom to let in.
        name: of the service, for logs.

    Example:
        server = Server(ServerSettings.from_env(), name="dataset")
        server.add(servicer, add_DatasetServiceServicer_to_server, "arriero.v1.DatasetService")
        address = await server.start()
        server.set_ready(True)
        await server.run_until_signal()
    """

    def __init__(self, settings: ServerSettings, *, name: str) -> None:
        self.settings = settings
        self.name = name
        self.address = ""
        self.health_address = ""
        self._services: list[str] = []
        self._adders: list[Callable[[grpc.aio.Server], None]] = []
        self._health = health.aio.HealthServicer()
        self._guard: Guard | None = None
        self._server: grpc.aio.Server | None = None
        self._health_server: grpc.aio.Server | None = None
        self._stopping = asyncio.Event()
        self._draining = False
        self._stopped = False
        self._stop_watching_parent = threading.Event()
        # Held: the event loop keeps weak references to tasks alone.
        self._switch: asyncio.Task[None] | None = None

    def add(
        self,
        servicer: Any,
        add_to_server: Callable[[Any, grpc.aio.Server], None],
        service: str,
    ) -> None:
        """Serve a servicer (before `start`); `service` is its full name in the proto."""
        self._services.append(service)
        self._adders.append(lambda server: add_to_server(servicer, server))

    @property
    def port(self) -> int:
        """The bound port; 0 before `start` and for unix sockets."""
        if not self.address or self.address.startswith("unix:"):
            return 0
        return listen.split(self.address)[1]

    async def start(self) -> str:
        """Listen and serve; returns the bound address. `ready` stays off.

        Raises:
            FailedPrecondition: plain text beyond loopback, or the address is taken.
            InvalidArgument: an address, certificate or token file is wrong.
        """
        settings = self.settings
        credentials = server_credentials(settings)
        if credentials is None:
            listen.check_plaintext(settings.listen, insecure=settings.insecure)
        tokens = TokenFile(settings.token_file) if settings.token_file else None
        supervisor = parent.from_env() if settings.watch_parent else None

        self._guard = Guard(tokens)
        server = grpc.aio.server(interceptors=[self._guard], options=_OPTIONS)
        for add in self._adders:
            add(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (*self._services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), server)
        await self._health.set(LIVE, _SERVING)
        await self._set(_NOT_SERVING)

        self.address = _bind(server, settings.listen, credentials, "listen")
        self._server = server
        if settings.health_listen:
            probes = grpc.aio.server(interceptors=[Guard()], options=_OPTIONS)
            health_pb2_grpc.add_HealthServicer_to_server(self._health, probes)
            self.health_address = _bind(probes, settings.health_listen, None, "health_listen")
            self._health_server = probes
            await probes.start()
        await server.start()
        if supervisor is not None:
            self._follow(supervisor)
        _log.info("%s listens on %s", self.name, self.address)
        if settings.address_file:
            listen.announce(settings.address_file, self.address)
        return self.address

    def set_ready(self, ready: bool) -> asyncio.Task[None]:
        """Switch `ready` and every service's health; ignored while draining.

        Takes effect within a turn of the event loop; await the answer to be sure.
        """

        async def switch() -> None:
            if not self._draining:
                await self._set(_SERVING if ready else _NOT_SERVING)

        self._switch = asyncio.get_running_loop().create_task(switch())
        return self._switch

    def stop_soon(self) -> None:
        """Make `run_until_signal` drain and return; from the event loop's thread."""
        self._stopping.set()

    async def run_until_signal(self) -> None:
        """Serve until SIGTERM, SIGINT or the supervisor's death, then drain and return.

        A second signal ends running calls at once.
        """
        loop = asyncio.get_running_loop()
        impatient = asyncio.Event()

        def on_signal() -> None:
            (impatient if self._stopping.is_set() else self._stopping).set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        try:
            await self._stopping.wait()
            drain = asyncio.create_task(self.stop())
            hurry = asyncio.create_task(impatient.wait())
            await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
            if not drain.done() and self._server is not None:
                await self._server.stop(0)
            await drain
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def stop(self, drain_seconds: float | None = None) -> None:
        """NOT_SERVING, then finish what runs for at most `drain_seconds`, then close."""
        if self._stopped or self._server is None:
            return
        self._stopped = self._draining = True
        self._stop_watching_parent.set()
        grace = self.settings.drain_seconds if drain_seconds is None else drain_seconds
        await self._set(_NOT_SERVING)
        await asyncio.sleep(min(_GOODBYE_SECONDS, grace))
        assert self._guard is not None
        self._guard.end_watches()
        _log.info("%s drains for at most %g s", self.name, grace)
        await self._server.stop(grace)
        if self._health_server is not None:
            await self._health_server.stop(0)
        _log.info("%s stopped", self.name)

    async def _set(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in ("", READY, *self._services):
            await self._health.set(name, status)

    def _follow(self, supervisor: parent.ProcessId) -> None:
        loop = asyncio.get_running_loop()
        grace = self.settings.drain_seconds

        def on_death() -> None:
            _log.warning("supervising process %d is gone; leaving", supervisor.pid)
            with contextlib.suppress(RuntimeError):  # the loop is closed: we are leaving already
                loop.call_soon_threadsafe(self.stop_soon)
            if not self._stop_watching_parent.wait(grace + 5):
                os._exit(1)  # the loop does not answer, and nobody is left to kill us

        parent.watch(supervisor, on_death, stop=self._stop_watching_parent)


def _bind(
    server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None, field: str
) -> str:
    if not address.startswith("unix:"):
        listen.split(address, field=field)  # refuses what is no address, with a better word
    cause: RuntimeError | None = None
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        port, cause = 0, error
    if port == 0:
        raise FailedPrecondition(
            f"{field}: cannot listen on {address}: the address is taken or not this machine's, "
            "or the certificate and key do not belong together",
            reason="CANNOT_LISTEN",
        ) from cause
    if address.startswith("unix:"):
        return address
    host = address.rpartition(":")[0]
    return f"{host}:{port}"
