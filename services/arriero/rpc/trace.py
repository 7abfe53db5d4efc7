"""W3C trace context: one id through every service that a request touches.

Responsibility: parse, make and hand on `traceparent`. Does not know spans,
exporters or gRPC.
"""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar

__all__ = ["HEADER", "adopt", "current_id", "outgoing"]

HEADER = "traceparent"

# https://www.w3.org/TR/trace-context/#traceparent-header, version 00
_PATTERN = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_current: ContextVar[tuple[str, str] | None] = ContextVar("arriero_trace", default=None)


def adopt(header: str | None) -> str:
    """Go on with the trace of a header, or start one; returns the trace id."""
    match = _PATTERN.fullmatch(header or "")
    if match and match[1] != "0" * 32:
        trace_id, flags = match[1], match[3]
    else:
        trace_id, flags = secrets.token_hex(16), "00"
    _current.set((trace_id, flags))
    return trace_id


def current_id() -> str | None:
    """The id of the trace that this task or thread belongs to."""
    trace = _current.get()
    return trace[0] if trace else None


def outgoing() -> str:
    """The header of a call made now: same trace, a span of its own."""
    trace_id, flags = _current.get() or (secrets.token_hex(16), "00")
    return f"00-{trace_id}-{secrets.token_hex(8)}-{flags}"
