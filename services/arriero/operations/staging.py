"""What an execution has on disk: assignments, outcomes, checkpoints, its log.

Responsibility: find, bring and clear away what jobs and their service leave each
other, also where they share no disk. Does not know when, nor what follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from arriero.errors import ArrieroError
from arriero.operations import logs
from arriero.operations.handoff import Assignment, Outcome
from arriero.operations.records import ExecutionRecord, Records, State
from arriero.store import Store
from arriero.store.files import remove_tree

_log = logging.getLogger(__name__)


class Staging:
    """The staging directories of one service's executions.

    Args:
        service: name, for the store's directories.
        store: where they are.
        records: keep the logs.
        apart: whether service and job meet in the store alone, and share no disk.
    """

    def __init__(self, service: str, store: Store, records: Records, *, apart: bool) -> None:
        self.apart = apart
        self._service = service
        self._store = store
        self._records = records

    def of(self, record: ExecutionRecord) -> Path:
        """An execution's directory, made if missing."""
        return self._store.staging(self._service, record.id)

    def attempt(self, record: ExecutionRecord) -> Path:
        """Directory of the newest attempt."""
        return self.of(record) / "attempts" / str(record.attempt)

    def assignment(self, record: ExecutionRecord) -> Path:
        """What the newest attempt's job is told."""
        return self.attempt(record) / "assignment.json"

    def token(self, record: ExecutionRecord) -> str:
        """What the newest attempt reports with, by its own assignment; blocks."""
        path = self.assignment(record)
        self._store.bring(path)
        try:
            return Assignment.read(path).report_token
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    async def told(self, record: ExecutionRecord) -> Outcome | None:
        """The newest attempt's outcome; one of an earlier attempt is never looked at."""
        if self.apart:
            return await asyncio.to_thread(self._outcome, record)
        return self._outcome(record)

    def _outcome(self, record: ExecutionRecord) -> Outcome | None:
        path = Outcome.path(self.of(record), record.attempt)
        if self.apart:
            self._store.bring(path)
        outcome = Outcome.read(path)
        return outcome if outcome is not None and outcome.attempt == record.attempt else None

    def forget_outcome(self, record: ExecutionRecord) -> None:
        """Of a job that left to be held: it is to speak again when it goes on; blocks."""
        path = Outcome.path(self.of(record), record.attempt)
        path.unlink(missing_ok=True)
        self._store.forget(path)

    def inherit(self, record: ExecutionRecord, ancestors: Sequence[str]) -> None:
        """Go on from the checkpoints of the same work that failed or was cancelled; blocks.

        Args:
            record: of the execution that begins.
            ancestors: executions that ended, the best first.

        Raises:
            Unavailable: a store elsewhere is away; to be called again.
        """
        for old in ancestors:
            source = self._store.root / "staging" / self._service / old
            if inherit_checkpoints(self._store, source, self.of(record)):
                _log.info("%s goes on from the checkpoints of %s", record.id, old)
                return

    # Its log

    def mark(self, record: ExecutionRecord, message: str, level: str) -> None:
        """Add a line of the service's own to an execution's log."""
        if not self._records.has_log(record.id):
            return  # what it would be added to is still to be brought
        log = self._records.log_path(record.id)
        with contextlib.suppress(OSError):
            logs.mark(log, message, attempt=record.attempt, stage=record.stage, level=level)

    def fill_in(self, record: ExecutionRecord, lines: Sequence[str], received: int | None) -> None:
        """Keep a job's last words that did not arrive before it died.

        Args:
            record: of its execution.
            lines: all that it wrote.
            received: as many of them arrived; None when nobody counted.
        """
        if lines and received is not None and len(lines) > received:
            rest = [line.encode() for line in lines[received:]]
            with contextlib.suppress(OSError):
                logs.append(self._records.log_path(record.id), rest)

    # Clearing away

    def forget_attempt(self, record: ExecutionRecord) -> None:
        """Remove what an attempt wrote for itself; its outcome stays as evidence. Blocks."""
        directory = self.attempt(record)
        for name in ("outputs", "scratch"):
            remove_tree(directory / name)
            self._store.forget(directory / name)

    def clean(self, record: ExecutionRecord) -> None:
        """Of work that ended. Blocks.

        Checkpoints of work that did not succeed stay for a retry, until gc.
        """
        staging = self.of(record)
        try:
            checkpoints = staging / "checkpoints"
            if record.state is not State.SUCCEEDED and self.apart:
                self._store.bring(checkpoints)
            kept = checkpoints.is_dir() and any(checkpoints.iterdir())
            gone = staging
            if record.state is not State.SUCCEEDED and kept:
                gone = staging / "attempts"
            remove_tree(gone)
            self._store.forget(gone)
            self._records.keep_log(record.id)
        except (OSError, ArrieroError) as error:
            _log.warning("staging of %s was not removed: %s", record.id, error)


def inherit_checkpoints(store: Store, source: Path, target: Path) -> bool:
    """Move the checkpoints of work that ended to the same work's next execution.

    Raises:
        Unavailable: a store elsewhere is away; to be called again.
    """
    old, new = source / "checkpoints", target / "checkpoints"
    if not new.exists():
        if not old.is_dir():
            store.bring(old)
        if not old.is_dir():
            return False
        old.rename(new)
    store.keep(new)
    shutil.rmtree(source, ignore_errors=True)
    store.forget(source)
    return True
