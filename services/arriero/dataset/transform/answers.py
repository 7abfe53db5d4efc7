"""The log of answers: what was paid for is never asked again.

Responsibility: an append-only file of answers by key, durable before anybody
counts on it, and readable after a kill at any moment. Does not know rows.

A line is a JSON object: `key` and `answer` (text), or `key` and `failure` (why
asking again is useless), or `forgiven` (failures above count no more). The last
line may be torn; it is cut off.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Answers"]

_FORGIVEN = b'{"forgiven": true}\n'
_log = logging.getLogger(__name__)


class Answers:
    """Answers by key; a context manager. Answers stay in the file, memory holds their places.

    Args:
        path: made if missing.
        forgive: forget failures of earlier attempts, so that these are asked again.

    Attributes:
        failures: why, by key.
        prompt_tokens, completion_tokens: of all answers, as the endpoint counts.
    """

    def __init__(self, path: Path, *, forgive: bool) -> None:
        self.failures: dict[str, str] = {}
        self.prompt_tokens = self.completion_tokens = 0
        self._places: dict[str, tuple[int, int]] = {}
        self._waiting: list[bytes] = []
        self._writing = asyncio.Lock()
        self._file = path.open("a+b")
        try:
            self._load(forgive)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def read(self, key: str) -> str | None:
        """The answer, or None where there is none."""
        place = self._places.get(key)
        if place is None:
            return None
        offset, length = place
        return str(json.loads(os.pread(self._file.fileno(), length, offset))["answer"])

    async def add(self, key: str, answer: str, usage: dict[str, int]) -> None:
        """Keep an answer; it is on the disk when this returns."""
        await self._append(key, {"key": key, "answer": answer, "usage": usage})

    async def fail(self, key: str, why: str) -> None:
        """Keep a failure that asking again would not mend."""
        await self._append(key, {"key": key, "failure": why})

    async def _append(self, key: str, entry: dict[str, Any]) -> None:
        self._waiting.append((json.dumps(entry, ensure_ascii=False) + "\n").encode())
        # Whoever gets the lock writes for all who wait: one fsync for many answers.
        async with self._writing:
            lines, self._waiting = self._waiting, []
            if lines:
                start = await asyncio.to_thread(self._write, b"".join(lines))
                for line in lines:
                    self._take(start, line)
                    start += len(line)

    def _write(self, data: bytes) -> int:
        start = self._file.seek(0, os.SEEK_END)
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())
        return start

    def _load(self, forgive: bool) -> None:
        self._file.seek(0)
        start = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            self._take(start, line)
            start += len(line)
        self._file.truncate(start)
        if forgive and self.failures:
            # Said in the file, so that an attempt after a kill knows it too.
            self._write(_FORGIVEN)
            self.failures.clear()

    def _take(self, start: int, line: bytes) -> None:
        if line == _FORGIVEN:
            self.failures.clear()
            return
        try:
            entry = json.loads(line)
            key = str(entry["key"])
            if "failure" in entry:
                self.failures[key] = str(entry["failure"])
                return
            usage = entry["usage"]
            self.prompt_tokens += int(usage.get("prompt_tokens", 0))
            self.completion_tokens += int(usage.get("completion_tokens", 0))
        except (ValueError, KeyError, TypeError, AttributeError):
            _log.warning("a line of the log of answers is damaged; its row is asked again")
            return
        self._places[key] = (start, len(line))
        self.failures.pop(key, None)
