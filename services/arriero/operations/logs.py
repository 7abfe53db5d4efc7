"""The kept log of an execution: whatever its jobs wrote, as numbered lines.

Responsibility: read the file back, JSON lines and raw ones, and follow it while
it grows. Does not know who writes to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from arriero.operations.handoff import canonical
from arriero.operations.records import now
from arriero.v1 import job_pb2

_LONGEST = 16_384
_LEVELS = {"DEBUG", "INFO", "WARNING", "ERROR"}


def mark(path: Path, message: str, *, attempt: int, stage: str, level: str = "INFO") -> None:
    """Append a line of the service's own, such as the start of an attempt."""
    line = {"time": now(), "level": level, "message": message, "attempt": attempt, "stage": stage}
    with path.open("ab") as file:
        # A job that was killed may have left half a line.
        if file.tell() and not _ends_with_newline(path):
            file.write(b"\n")
        file.write(canonical(line) + b"\n")


def append(path: Path, lines: Sequence[bytes], *, node: int = 0, lost: int = 0) -> None:
    """Append lines of a job on another machine; `lost` ones before them are counted.

    Raw lines of other machines than the first say which; JSON lines say it themselves.
    """
    with path.open("ab") as file:
        if file.tell() and not _ends_with_newline(path):
            file.write(b"\n")
        if lost:
            file.write(b"(%d lines did not arrive)\n" % lost)
        for line in lines:
            mine = b"" if node == 0 or line.startswith(b"{") else b"[node %d] " % node
            file.write(mine + line + b"\n")


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"


class LogReader:
    """Reads a log from its beginning; `read` gives what came since the last call.

    Raw lines (a library's print, a crash's stack) take time and attempt from
    the line before them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._number = 0
        self._last = job_pb2.LogLine()

    def read(self, *, ended: bool, after: int = 0) -> Iterator[job_pb2.LogLine]:
        """The new lines that have a number above `after`.

        A line without its end is left for later, unless the work has `ended`.
        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            for data in file:
                if not data.endswith(b"\n") and not ended:
                    return
                self._offset += len(data)
                self._number += 1
                line = self._parse(data)
                if self._number > after:
                    yield line

    def _parse(self, data: bytes) -> job_pb2.LogLine:
        line = job_pb2.LogLine()
        line.CopyFrom(self._last)
        line.number = self._number
        fields = _fields(data)
        if fields is None:
            line.level, line.message = "INFO", _shown(data[: 4 * _LONGEST])[:_LONGEST]
            return line
        _set_time(line.time, fields.get("time"))
        level = str(fields.get("level", "INFO")).replace("CRITICAL", "ERROR")
        line.level = level if level in _LEVELS else "INFO"
        message = str(fields["message"])
        if error := fields.get("error"):
            message = f"{message}\n{error}"
        line.message = message[:_LONGEST]
        if isinstance(fields.get("attempt"), int):
            line.attempt = fields["attempt"]
        if isinstance(fields.get("stage"), str):
            line.stage = fields["stage"]
        self._last = job_pb2.LogLine(time=line.time, attempt=line.attempt, stage=line.stage)
        return line


def _fields(data: bytes) -> dict[str, Any] | None:
    if not data.startswith(b"{"):
        return None
    try:
        fields = json.loads(data)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and "message" in fields else None


def _set_time(target: Timestamp, text: Any) -> None:
    if isinstance(text, str):
        try:
            target.FromJsonString(text)
        except ValueError:
            return


def tail(path: Path, lines: int = 3, size: int = 8192) -> list[str]:
    """The last raw lines of a log, for messages about jobs that said nothing else."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - size))
            data = file.read()
    except FileNotFoundError:
        return []
    raw = [line for line in data.split(b"\n") if line.strip() and _fields(line) is None]
    return [_shown(line)[:300] for line in raw[-lines:]]


def _shown(data: bytes) -> str:
    """A raw line as a terminal leaves it: a progress bar rewrites what it wrote."""
    return data.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
