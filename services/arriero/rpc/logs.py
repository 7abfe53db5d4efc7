"""JSON lines on stderr: one object a line, secrets blotted out.

Responsibility: format and fields of every log line of a process. Does not know
where the lines go from there.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from arriero.rpc import trace

__all__ = ["JsonFormatter", "add_secret", "bind", "configure", "redact"]

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_bound: ContextVar[dict[str, Any] | None] = ContextVar("arriero_log_fields", default=None)
_secrets: set[str] = set()

_BLOT = "[redacted]"
_PATTERNS = (
    re.compile(r"(?i)(\bbearer\s+)[A-Za-z0-9._~+/=-]{4,}"),
    # hub, cloud and forge tokens by their documented prefixes
    re.compile(r"(\b)(?:hf_[A-Za-z0-9]{8,}|AKIA[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{16,})"),
    # name=value and "name": "value"
    re.compile(
        r"(?i)(\b(?:[a-z0-9_]*(?:password|secret|api_?key)|(?:[a-z0-9]+_)*token)"
        r"[\"']?\s*[=:]\s*[\"']?)[^\s\"',;&}]{6,}"
    ),
    # user:password in URLs
    re.compile(r"(://[^\s/:@]+:)[^\s/@]+(?=@)"),
)


def add_secret(value: str) -> None:
    """Blot out this text wherever a log line holds it."""
    if len(value) >= 4:  # shorter ones would blot out ordinary words
        _secrets.add(value)


def redact(text: str) -> str:
    """The text without what looks like, or is known as, a secret."""
    for value in _secrets:
        text = text.replace(value, _BLOT)
    for pattern in _PATTERNS:
        text = pattern.sub(rf"\1{_BLOT}", text)
    return text


@contextmanager
def bind(**fields: Any) -> Iterator[None]:
    """Lines logged inside carry these fields, such as `run`, `stage`, `attempt`."""
    token = _bound.set({**(_bound.get() or {}), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


class JsonFormatter(logging.Formatter):
    """time, level, service, logger, message, trace, bound fields, `extra`, error."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        moment = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname,
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if trace_id := trace.current_id():
            line["trace"] = trace_id
        line.update(_bound.get() or {})
        line.update({k: v for k, v in record.__dict__.items() if k not in _STANDARD})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(_redacted(line), ensure_ascii=False, default=str)


def configure(service: str, *, level: int = logging.INFO) -> None:
    """Send every log line of this process to stderr as JSON; replaces what was set up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)


def _redacted(value: Any) -> Any:
    """The same value with every text in it blotted: before JSON escapes hide a secret."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {k: _redacted(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(v) for v in value]
    return value
