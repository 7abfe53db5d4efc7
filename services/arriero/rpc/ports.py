"""Ports on loopback for processes that are about to start.

Responsibility: pick ports that are free and likely to stay so. Does not know what
will listen on them.
"""

from __future__ import annotations

import random
import socket
from pathlib import Path

from arriero.errors import Unavailable

# How many ports below the kernel's own range are candidates.
SPAN = 12_000


def free_port(preferred: int | None = None) -> int:
    """A port that is free on loopback now: `preferred` if it is.

    Others lie below the range from which the kernel serves outgoing connections and
    whoever asks for any port: those it may give away before the process listens.

    Raises:
        Unavailable: none is free.
    """
    first = _ephemeral()
    below = range(max(1024, first - SPAN), first)
    if len(below) < 200:  # the kernel gives out nearly all
        below = range(1024, 65536)
    likely = random.sample(below, 200)
    for port in ([preferred] if preferred else []) + likely:
        if is_free(port):
            return port
    raise Unavailable("no free port on 127.0.0.1")


def is_free(port: int) -> bool:
    """Whether something could listen on this port of loopback now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _ephemeral() -> int:
    """The first port that the kernel gives out by itself."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 49152  # RFC 6335, section 6
