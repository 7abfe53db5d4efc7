"""Channels as every Arriero client opens them.

Responsibility: credentials, retries, keepalive, default deadlines and trace
headers of outgoing calls, sync and asyncio. Does not know any service's methods
beyond what `methods` says of them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.rpc import listen, logs, methods, trace
from arriero.settings import ClientSettings

__all__ = ["check_health", "connect", "connect_sync"]

_MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 1),
    # A service that restarts is back within seconds, so ask that often.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # What a connection may take, despite the name: a first packet that is lost is sent
    # again after a second, and a busy server is slow to shake hands.
    ("grpc.min_reconnect_backoff_ms", 3_000),
    # A peer that vanished without a word (power, network) is found out.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # gRPC's core heeds this one, whose default is a minute, beside the one above.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A proxy from the environment is for the internet, not for one's own services.
    ("grpc.enable_http_proxy", 0),
    # Channels to one address from one process do not share a connection's fate.
    ("grpc.use_local_subchannel_pool", 1),
]


def connect(
    address: str, settings: ClientSettings | None = None, *, retries: bool = True
) -> grpc.aio.Channel:
    """An asyncio channel; opening is lazy, so an absent server shows at the first call.

    Idempotent methods are sent again after UNAVAILABLE (about three seconds in
    all) unless `retries` is off, for callers that have another address to try;
    unary calls without a deadline get the settings'.

    Raises:
        InvalidArgument: the address or a certificate is wrong.
        FailedPrecondition: a token would travel in plain text beyond loopback.
    """
    settings = settings or ClientSettings()
    credentials, options = _prepare(address, settings)
    if not retries:
        options.append(("grpc.enable_retries", 0))
    interceptors = _aio_interceptors(settings)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=options, interceptors=interceptors)
    return grpc.aio.secure_channel(address, credentials, options=options, interceptors=interceptors)


def connect_sync(address: str, settings: ClientSettings | None = None) -> grpc.Channel:
    """A blocking channel; otherwise as `connect`."""
    settings = settings or ClientSettings()
    credentials, options = _prepare(address, settings)
    if credentials is None:
        channel = grpc.insecure_channel(address, options=options)
    else:
        channel = grpc.secure_channel(address, credentials, options=options)
    return grpc.intercept_channel(channel, _SyncInterceptor(settings))


def check_health(
    address: str,
    settings: ClientSettings | None = None,
    *,
    service: str = "ready",
    timeout: float = 1.0,
) -> bool:
    """Whether the server at an address says SERVING for a health name; blocks.

    False as well when nobody answers within `timeout` seconds.
    """
    with connect_sync(address, settings) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            answer = stub.Check(request, timeout=timeout)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _prepare(
    address: str, settings: ClientSettings
) -> tuple[grpc.ChannelCredentials | None, list[tuple[str, Any]]]:
    local = listen.is_local(address, field="address")
    if settings.token:
        logs.add_secret(settings.token)
    options = [*_OPTIONS, ("grpc.service_config", methods.service_config())]
    if settings.tls_ca is None:
        if settings.tls_cert or settings.tls_key:
            raise InvalidArgument.field("tls_ca", "a client certificate needs the server's CA too")
        if settings.token and not local and not settings.insecure:
            raise FailedPrecondition(
                f"a token for {address} would travel in plain text; give the server's CA "
                "(ARRIERO_TLS_CA) or allow it with ARRIERO_INSECURE=1",
                reason="INSECURE_TOKEN",
            )
        return None, options
    if (settings.tls_cert is None) != (settings.tls_key is None):
        missing = "tls_cert" if settings.tls_cert is None else "tls_key"
        raise InvalidArgument.field(missing, "mTLS needs both a certificate and its key")
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_read(settings.tls_ca, "tls_ca"),
        private_key=_read(settings.tls_key, "tls_key") if settings.tls_key else None,
        certificate_chain=_read(settings.tls_cert, "tls_cert") if settings.tls_cert else None,
    )
    if settings.tls_server_name:
        options.append(("grpc.ssl_target_name_override", settings.tls_server_name))
    return credentials, options


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument.field(field, f"cannot be read: {error}") from error


class _Details(NamedTuple):
    """Call details with the fields that both of gRPC's own kinds have."""

    method: Any
    timeout: float | None
    metadata: Any
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: Any = None


def _headers(settings: ClientSettings, given: Any) -> list[tuple[str, Any]]:
    headers = list(given or ())
    names = {key for key, _ in headers}
    if settings.token and "authorization" not in names:
        headers.append(("authorization", f"Bearer {settings.token}"))
    if trace.HEADER not in names:
        headers.append((trace.HEADER, trace.outgoing()))
    return headers


def _timeout(settings: ClientSettings, method: Any, given: float | None) -> float | None:
    if given is not None:
        return given
    path = method.decode() if isinstance(method, bytes) else str(method)
    return methods.default_timeout(path, settings.timeout_seconds)


class _SyncInterceptor(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings

    def _details(self, details: Any, *, unary: bool) -> _Details:
        timeout = details.timeout
        if unary:
            timeout = _timeout(self._settings, details.method, timeout)
        return _Details(
            details.method,
            timeout,
            _headers(self._settings, details.metadata),
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )

    def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        return continuation(self._details(client_call_details, unary=True), request)

    def intercept_unary_stream(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        return continuation(self._details(client_call_details, unary=False), request)

    def intercept_stream_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request_iterator: Any
    ) -> Any:
        return continuation(self._details(client_call_details, unary=False), request_iterator)

    def intercept_stream_stream(
        self, continuation: Callable[..., Any], client_call_details: Any, request_iterator: Any
    ) -> Any:
        return continuation(self._details(client_call_details, unary=False), request_iterator)


def _aio_interceptors(settings: ClientSettings) -> list[Any]:
    """One object per kind of call: grpc.aio takes an interceptor for one kind alone."""

    def prepare(details: Any, *, unary: bool) -> grpc.aio.ClientCallDetails:
        timeout = details.timeout
        if unary:
            timeout = _timeout(settings, details.method, timeout)
        return grpc.aio.ClientCallDetails(
            details.method,
            timeout,
            grpc.aio.Metadata(*_headers(settings, details.metadata)),
            details.credentials,
            details.wait_for_ready,
        )

    class UnaryUnary(grpc.aio.UnaryUnaryClientInterceptor):
        async def intercept_unary_unary(
            self, continuation: Any, client_call_details: Any, request: Any
        ) -> Any:
            return await continuation(prepare(client_call_details, unary=True), request)

    class UnaryStream(grpc.aio.UnaryStreamClientInterceptor):
        async def intercept_unary_stream(
            self, continuation: Any, client_call_details: Any, request: Any
        ) -> Any:
            return await continuation(prepare(client_call_details, unary=False), request)

    class StreamUnary(grpc.aio.StreamUnaryClientInterceptor):
        async def intercept_stream_unary(
            self, continuation: Any, client_call_details: Any, request_iterator: Any
        ) -> Any:
            return await continuation(prepare(client_call_details, unary=False), request_iterator)

    class StreamStream(grpc.aio.StreamStreamClientInterceptor):
        async def intercept_stream_stream(
            self, continuation: Any, client_call_details: Any, request_iterator: Any
        ) -> Any:
            return await continuation(prepare(client_call_details, unary=False), request_iterator)

    return [UnaryUnary(), UnaryStream(), StreamUnary(), StreamStream()]
