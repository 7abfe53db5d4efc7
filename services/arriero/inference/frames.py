"""The pipe between a replica's front end and its engine: framed JSON messages.

Responsibility: whole messages over a byte stream, both ways. Does not know what
they say. JSON and not pickle, so that neither side can make the other run code.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

_HEADER = struct.Struct("<I")
# A prompt of a million characters is far below; more is a defect.
MAX_BYTES = 64 * 1024 * 1024

Frame = dict[str, Any]


def encode(frame: Frame) -> bytes:
    """Length and body of one message."""
    body = json.dumps(frame, separators=(",", ":")).encode()
    if len(body) > MAX_BYTES:
        raise ValueError(f"a message of {len(body)} bytes; at most {MAX_BYTES} fit")
    return _HEADER.pack(len(body)) + body


def send(connection: socket.socket, frame: Frame) -> None:
    """Send one message, blocking."""
    connection.sendall(encode(frame))


def receive(connection: socket.socket) -> Frame | None:
    """The next message, blocking; None when the other side has closed."""
    header = _exactly(connection, _HEADER.size)
    if header is None:
        return None
    body = _exactly(connection, _HEADER.unpack(header)[0])
    return None if body is None else json.loads(body)


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = connection.recv(count - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


async def read(reader: asyncio.StreamReader) -> Frame | None:
    """The next message; None when the other side has closed."""
    try:
        header = await reader.readexactly(_HEADER.size)
        frame: Frame = json.loads(await reader.readexactly(_HEADER.unpack(header)[0]))
        return frame
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
