"""How a job ended, and what follows from it.

Responsibility: from an exit code and an outcome to one verdict: done, again, or
failed. Does not know processes or records.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from arriero.errors import ArrieroError, Preempted, ResourceExhausted, Unavailable
from arriero.operations.handoff import EXIT_TRY_AGAIN, Outcome, to_json
from arriero.rpc.status import to_status

# What shells and launchers add to a signal's number.
_SHELL = 128


class Next(Enum):
    """What an ending asks for."""

    PUBLISH = auto()
    AGAIN = auto()
    FAIL = auto()


@dataclass(frozen=True)
class Ending:
    """A job's end.

    `status` is a `google.rpc.Status` as JSON; `counted` is False when the attempt
    was not the job's to lose (preemption, the service's own death).
    """

    next: Next
    status: dict[str, Any]
    counted: bool = True

    @property
    def message(self) -> str:
        """The status in words."""
        return str(self.status.get("message", "done"))


def ending_of(
    code: int | None,
    outcome: Outcome | None,
    last_lines: Sequence[str] = (),
    *,
    oom_killed: bool | None = None,
    evicted: str = "",
    problem: ArrieroError | None = None,
) -> Ending:
    """The verdict on a job.

    An outcome is the job's own word and wins over the exit code, which
    launchers in between are known to change.

    Args:
        code: exit code, -n for signal n; None when nobody saw it end.
        outcome: what the job wrote, if it got that far.
        last_lines: of its log, for jobs that wrote no outcome.
        oom_killed: whether the kernel killed for memory meanwhile; None: not known.
        evicted: why the place took the job away, where that was not the job's doing.
        problem: why it never ran, or what the place knows better than the exit code.
    """
    if outcome is not None:
        if outcome.ok:
            return Ending(Next.PUBLISH, {})
        again = outcome.retryable or outcome.preempted
        return Ending(
            Next.AGAIN if again else Next.FAIL,
            dict(outcome.status),
            counted=not outcome.preempted,
        )
    if evicted:
        return _again(
            Preempted(f"the job was taken away ({evicted}); it goes on from its checkpoint"),
            counted=False,
        )
    if problem is not None:
        following = Next.AGAIN if problem.retryable else Next.FAIL
        return Ending(following, to_json(to_status(problem)))
    if code is None or code == EXIT_TRY_AGAIN:
        return _again(
            Preempted("the job ended with its service; it starts again from its checkpoint"),
            counted=False,
        )
    said = f"; it last wrote: {' | '.join(last_lines)}" if last_lines else ""
    if code in (-signal.SIGKILL, _SHELL + signal.SIGKILL):
        return _again(_killed(oom_killed, said))
    if code == -signal.SIGTERM:
        return _again(
            Preempted("the job was told to stop (SIGTERM) before it could save"), counted=False
        )
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return _again(Unavailable(f"the job crashed with {name}{said}", reason="JOB_CRASHED"))
    return _again(
        Unavailable(
            f"the job exited with code {code} and left no outcome{said}", reason="JOB_CRASHED"
        )
    )


def reason_of(status: Mapping[str, Any] | None) -> str:
    """The reason (`OUT_OF_MEMORY`) that a status as JSON carries; empty without one."""
    details = (status or {}).get("details") or ()
    return next((str(item["reason"]) for item in details if "reason" in item), "")


def _killed(oom_killed: bool | None, said: str) -> ArrieroError:
    advice = f"use smaller batches or shorter rows, or a machine with more memory{said}"
    if oom_killed:
        return ResourceExhausted(
            f"the job was killed by the kernel's out-of-memory killer; {advice}",
            reason="OUT_OF_MEMORY",
        )
    if oom_killed is None:
        return ResourceExhausted(
            f"the job was killed (SIGKILL), probably because memory ran out; {advice}",
            reason="OUT_OF_MEMORY",
        )
    return Unavailable(
        "the job was killed (SIGKILL), by somebody or a watchdog: the kernel counted no kill "
        f"for want of memory{said}",
        reason="JOB_KILLED",
    )


def _again(error: ArrieroError, *, counted: bool = True) -> Ending:
    return Ending(Next.AGAIN, to_json(to_status(error)), counted)
