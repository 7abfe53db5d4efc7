"""The HTTP port that shows a registry.

Responsibility: where it listens. Does not know what is shown.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server

from arriero.errors import InvalidArgument

__all__ = ["serve"]


def serve(
    registry: CollectorRegistry,
    *,
    listen: str | None = None,
    address_file: Path | None = None,
) -> tuple[str, Callable[[], None]]:
    """Serve the registry over HTTP; returns the bound `host:port` and how to stop.

    Args:
        registry: what is shown.
        listen: `host:port`; default `ARRIERO_METRICS_LISTEN`, else `127.0.0.1:0`.
        address_file: gets the bound address; default `ARRIERO_METRICS_ADDRESS_FILE`.

    Raises:
        InvalidArgument: `listen` is no `host:port`, or cannot be bound.
    """
    text = listen or os.environ.get("ARRIERO_METRICS_LISTEN") or "127.0.0.1:0"
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidArgument.field("ARRIERO_METRICS_LISTEN", f"{text!r} is not host:port")
    try:
        server, thread = start_http_server(int(port), addr=host.strip("[]"), registry=registry)
    except OSError as error:
        raise InvalidArgument.field(
            "ARRIERO_METRICS_LISTEN",
            f"cannot listen on {text}: {error.strerror}; choose another port, or 0 for a free one",
        ) from error
    address = f"{host}:{server.server_address[1]}"
    named = os.environ.get("ARRIERO_METRICS_ADDRESS_FILE")
    path = address_file or (Path(named) if named else None)
    if path is not None:
        part = path.with_name(path.name + ".part")
        part.write_text(address + "\n", encoding="utf-8")
        part.replace(path)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return address, stop
