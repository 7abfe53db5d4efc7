"""`python -m arriero.gateway`: the HTTP gateway.

Responsibility: wiring only: from the environment to a served application, and
its orderly end. Does not know the API.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from prometheus_client import CollectorRegistry

from arriero.client import AsyncClient
from arriero.errors import ArrieroError, FailedPrecondition
from arriero.gateway.app import build
from arriero.gateway.settings import GatewaySettings
from arriero.metrics import GatewayMetrics
from arriero.rpc import listen, logs, parent
from arriero.rpc.auth import TokenFile
from arriero.rpc.certificates import Certificate
from arriero.settings import ServerSettings

_log = logging.getLogger(__name__)
_RENEW_SECONDS = 1.0


class _Server(uvicorn.Server):
    """uvicorn's server, which ends in order after a signal instead of dying by it again."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop accepting at the first signal, and waiting at the second."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)

        def on_signal() -> None:
            self.force_exit, self.should_exit = self.should_exit, True

        for number in numbers:
            loop.add_signal_handler(number, on_signal)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


async def serve() -> None:
    """Run until SIGTERM, SIGINT or the supervisor's death."""
    settings = ServerSettings.from_env()
    limits = GatewaySettings.from_env()
    if settings.tls_cert is None:
        listen.check_plaintext(settings.listen, insecure=settings.insecure)
    tokens = TokenFile(settings.token_file) if settings.token_file else None
    page = GatewayMetrics(CollectorRegistry())
    async with AsyncClient() as client:
        config = uvicorn.Config(
            build(client, settings=limits, tokens=tokens, page=page),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            ssl_ca_certs=str(settings.tls_client_ca) if settings.tls_client_ca else None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if settings.tls_client_ca else ssl.CERT_NONE,
        )
        server = _Server(config)
        supervisor = parent.from_env() if settings.watch_parent else None
        if supervisor is not None:
            parent.watch(supervisor, lambda: setattr(server, "should_exit", True))
        with _bound(settings.listen) as bound:
            host, port = bound.getsockname()[:2]
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            _log.info("gateway listens on %s", address)
            if settings.address_file:
                listen.announce(settings.address_file, address)
            renewal = asyncio.create_task(_renew(config))
            try:
                await server.serve(sockets=[bound])
            finally:
                renewal.cancel()
    _log.info("gateway stopped")


async def _renew(config: uvicorn.Config) -> None:
    """Show a renewed certificate from its files' change on."""
    if not config.ssl_certfile or not config.ssl_keyfile:
        return
    certificate = Certificate(Path(config.ssl_certfile), Path(config.ssl_keyfile))
    while True:
        await asyncio.sleep(_RENEW_SECONDS)
        if certificate.renewed() is not None and config.ssl is not None:
            config.ssl.load_cert_chain(certificate.cert, certificate.key)


def _bound(address: str) -> socket.socket:
    """A socket that listens there already: who reads the address may connect."""
    host, port = listen.split(address)
    try:
        return socket.create_server(
            (host, port),
            family=socket.AF_INET6 if ":" in host else socket.AF_INET,
            backlog=1024,
        )
    except OSError as error:
        raise FailedPrecondition(
            f"listen: cannot listen on {address}: {error.strerror or error}; choose another "
            "address in ARRIERO_LISTEN",
            reason="CANNOT_LISTEN",
        ) from error


def main() -> None:
    """Run until a signal."""
    logs.configure("gateway")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        asyncio.run(serve())
    except ArrieroError as error:
        _log.error("%s", error.message, extra={"reason": error.reason})
        sys.exit(1)


if __name__ == "__main__":
    main()
