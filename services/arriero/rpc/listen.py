"""Where a server may listen: addresses read, refused where they expose, announced.

Responsibility: `host:port` and `unix:` addresses, the rule that plain text stays
on this machine, and the file that tells others. Does not open any socket.
"""

from __future__ import annotations

import ipaddress
import os
import tempfile
from pathlib import Path

from arriero.errors import FailedPrecondition, InvalidArgument

__all__ = ["announce", "check_plaintext", "is_local", "split"]


def split(address: str, *, field: str = "listen") -> tuple[str, int]:
    """Host and port of `host:port` or `[v6]:port`.

    Raises:
        InvalidArgument: neither.
    """
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InvalidArgument.field(
            field, f"{address!r} is not host:port, [v6 address]:port or unix:/path"
        )
    return host, int(port)


def is_local(address: str, *, field: str = "listen") -> bool:
    """Whether only this machine can reach the address."""
    if address.startswith("unix:"):
        return True
    host, _ = split(address, field=field)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_plaintext(address: str, *, insecure: bool, field: str = "listen") -> None:
    """Refuse plain text beyond loopback.

    Raises:
        FailedPrecondition: the address is reachable from elsewhere and nobody
            said that this is wanted.
    """
    if not insecure and not is_local(address, field=field):
        raise FailedPrecondition(
            f"{field}: {address} is reachable from other machines and TLS is not set up; give a "
            "certificate and key (ARRIERO_SERVER_TLS_CERT, ARRIERO_SERVER_TLS_KEY), listen on "
            "127.0.0.1, or allow plain text with ARRIERO_SERVER_INSECURE=1",
            reason="INSECURE_LISTEN",
        )


def announce(path: Path, address: str) -> None:
    """Write the bound address; readers wait for the file to appear, so it appears whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(address + "\n")
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
