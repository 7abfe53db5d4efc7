"""What running jobs report: progress, and lines of their logs.

Responsibility: believe only the current attempt of an execution, and keep what it
says. Does not know how the job runs, nor who reads.
"""

from __future__ import annotations

import contextlib
import hmac
import time
from collections.abc import Mapping, Sequence

from arriero.errors import ArrieroError, FailedPrecondition, Unauthenticated, Unavailable
from arriero.operations import logs
from arriero.operations.attempts import Execution
from arriero.operations.handoff import to_json
from arriero.operations.records import Records
from arriero.v1 import types_pb2

_PROGRESS_SECONDS = 2.0


class Reports:
    """Reports to one engine.

    Args:
        records: where they are kept.
        executions: by id; those that may report are among them.
    """

    def __init__(self, records: Records, executions: Mapping[str, Execution]) -> None:
        self._records = records
        self._executions = executions
        self._saved: dict[str, float] = {}

    def progress(
        self, execution_id: str, attempt: int, token: str, progress: types_pb2.Progress
    ) -> None:
        """Take a job's progress; kept in memory, and on disk every two seconds.

        Raises:
            Unauthenticated: not the token of the current attempt.
            FailedPrecondition: the attempt is not the current one.
            Unavailable: the service has only just started.
        """
        record = self._speaker(execution_id, attempt, token).record
        record.progress = to_json(progress)
        if time.monotonic() - self._saved.get(record.id, 0.0) >= _PROGRESS_SECONDS:
            self._saved[record.id] = time.monotonic()
            with contextlib.suppress(ArrieroError):
                self._records.save(record, durable=False)

    def lines(
        self,
        execution_id: str,
        attempt: int,
        token: str,
        *,
        node: int,
        first: int,
        lines: Sequence[bytes],
    ) -> int:
        """Keep lines that a job on another machine wrote; the number of the last one kept.

        Lines that are kept already are left out; what got lost on the way is said.

        Raises:
            Unauthenticated, FailedPrecondition, Unavailable: as `progress`.
        """
        execution = self._speaker(execution_id, attempt, token)
        last = execution.received.get(node)
        if last is not None and first <= last:
            lines, first = lines[last + 1 - first :], last + 1
        if lines:
            lost = 0 if last is None else first - last - 1
            logs.append(self._records.log_path(execution_id), lines, node=node, lost=lost)
            execution.received[node] = first + len(lines) - 1
        return execution.received.get(node, 0)

    def forget(self, execution_id: str) -> None:
        """Of work that ended."""
        self._saved.pop(execution_id, None)

    def _speaker(self, execution_id: str, attempt: int, token: str) -> Execution:
        execution = self._executions.get(execution_id)
        if execution is None or execution.record.state.ended:
            raise FailedPrecondition(f"execution {execution_id!r} does not run here")
        record = execution.record
        if attempt != record.attempt:
            raise FailedPrecondition(
                f"attempt {attempt} is over, the current one is {record.attempt}"
            )
        if not execution.token:
            raise Unavailable("the service is taking up what it left; report again")
        if not hmac.compare_digest(token.encode(), execution.token.encode()):
            raise Unauthenticated("not the token of this attempt")
        return execution
