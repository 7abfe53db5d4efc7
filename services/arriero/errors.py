"""Every error that Arriero raises on purpose, and what may be done about it.

Responsibility: one tree of exceptions, each with the name of its canonical
gRPC code and its retry verdict. Does not know gRPC (`rpc.status` maps the tree
to `google.rpc.Status` and back).

    ArrieroError                 code                 retryable
    ├── InvalidArgument          INVALID_ARGUMENT     no
    ├── NotFound                 NOT_FOUND            no
    ├── AlreadyExists            ALREADY_EXISTS       no
    ├── PermissionDenied         PERMISSION_DENIED    no
    ├── Unauthenticated          UNAUTHENTICATED      no
    ├── FailedPrecondition       FAILED_PRECONDITION  no
    │   └── GateFailed           FAILED_PRECONDITION  no
    ├── OutOfRange               OUT_OF_RANGE         no
    ├── Aborted                  ABORTED              no
    ├── Cancelled                CANCELLED            no
    ├── DeadlineExceeded         DEADLINE_EXCEEDED    no
    ├── ResourceExhausted        RESOURCE_EXHAUSTED   yes
    │   └── DiskFull             RESOURCE_EXHAUSTED   no
    ├── Unavailable              UNAVAILABLE          yes
    │   └── Preempted            UNAVAILABLE          yes
    ├── DataLoss                 DATA_LOSS            no
    ├── Unimplemented            UNIMPLEMENTED        no
    └── Internal                 INTERNAL             no
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong field: its path (`stages[2].train.lora.r`) and what is wrong."""

    field: str
    description: str


class ArrieroError(Exception):
    """Base of the tree.

    Args:
        message: one sentence for people: what was found, what was expected,
            what to do.
        reason: UPPER_SNAKE_CASE word for programs (`google.rpc.ErrorInfo.reason`);
            default: the class's own.
        metadata: figures for programs, as strings.
    """

    code = "INTERNAL"
    retryable = False
    default_reason = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata: dict[str, str] = dict(metadata or {})

    def at(self, field: str) -> Self:
        """The same error, said of a field, or of one inside of it when it names that already.

        The message begins with the field's path, and `metadata["field"]` holds it.
        """
        inner = self.metadata.get("field", "")
        path = f"{field}.{inner}" if inner else field
        text = self.message.removeprefix(f"{inner}: ") if inner else self.message
        self.message = f"{path}: {text}"
        self.args = (self.message,)
        self.metadata["field"] = path
        return self


class InvalidArgument(ArrieroError):
    """The caller's request is wrong, whatever the state of the system."""

    code = "INVALID_ARGUMENT"
    default_reason = "INVALID_ARGUMENT"

    def __init__(
        self,
        message: str,
        *,
        violations: Iterable[FieldViolation] = (),
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.violations: tuple[FieldViolation, ...] = tuple(violations)

    @classmethod
    def field(cls, field: str, description: str) -> InvalidArgument:
        """The usual case: one field, named."""
        return cls(f"{field}: {description}", violations=[FieldViolation(field, description)])


class NotFound(ArrieroError):
    """No such run, artifact, endpoint, file."""

    code = "NOT_FOUND"
    default_reason = "NOT_FOUND"


class AlreadyExists(ArrieroError):
    """The name is taken."""

    code = "ALREADY_EXISTS"
    default_reason = "ALREADY_EXISTS"


class PermissionDenied(ArrieroError):
    """Known caller, not allowed."""

    code = "PERMISSION_DENIED"
    default_reason = "PERMISSION_DENIED"


class Unauthenticated(ArrieroError):
    """No token, or a wrong one."""

    code = "UNAUTHENTICATED"
    default_reason = "UNAUTHENTICATED"


class FailedPrecondition(ArrieroError):
    """Not now: the system's state must change first."""

    code = "FAILED_PRECONDITION"
    default_reason = "FAILED_PRECONDITION"


class GateFailed(FailedPrecondition):
    """A gate refused an artifact, which is kept, quarantined."""

    default_reason = "GATE_FAILED"


class OutOfRange(ArrieroError):
    """Past the end of what exists."""

    code = "OUT_OF_RANGE"
    default_reason = "OUT_OF_RANGE"


class Aborted(ArrieroError):
    """Lost a race, such as a compare-and-set; read again and decide."""

    code = "ABORTED"
    default_reason = "ABORTED"


class Cancelled(ArrieroError):
    """Somebody asked for the end."""

    code = "CANCELLED"
    default_reason = "CANCELLED"


class DeadlineExceeded(ArrieroError):
    """Took longer than the caller wanted to wait."""

    code = "DEADLINE_EXCEEDED"
    default_reason = "DEADLINE_EXCEEDED"


class ResourceExhausted(ArrieroError):
    """Queue full, out of memory, quota: may pass later or smaller."""

    code = "RESOURCE_EXHAUSTED"
    retryable = True
    default_reason = "RESOURCE_EXHAUSTED"


class DiskFull(ResourceExhausted):
    """Too little space; `needed` and `free` in bytes."""

    retryable = False
    default_reason = "DISK_FULL"

    def __init__(self, message: str, *, needed: int, free: int) -> None:
        super().__init__(message, metadata={"needed_bytes": str(needed), "free_bytes": str(free)})
        self.needed = needed
        self.free = free


class Unavailable(ArrieroError):
    """The other side is away; trying again is right."""

    code = "UNAVAILABLE"
    retryable = True
    default_reason = "UNAVAILABLE"


class Preempted(Unavailable):
    """The job was told to leave and kept its checkpoint; not an attempt lost."""

    default_reason = "PREEMPTED"


class DataLoss(ArrieroError):
    """Bytes are not what their digest says."""

    code = "DATA_LOSS"
    default_reason = "DATA_LOSS"


class Unimplemented(ArrieroError):
    """This build does not do that."""

    code = "UNIMPLEMENTED"
    default_reason = "UNIMPLEMENTED"


class Internal(ArrieroError):
    """A defect of Arriero."""

    default_reason = "INTERNAL"
