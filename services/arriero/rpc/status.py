"""Errors to `google.rpc.Status` and back: the one file that knows both.

Responsibility: the mapping between `arriero.errors` and gRPC's rich errors
(ErrorInfo always; BadRequest, PreconditionFailure, RetryInfo where they apply).
Does not know who raises or who reads.
"""

from __future__ import annotations

import errno
import logging
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from arriero import errors

__all__ = [
    "DOMAIN",
    "from_rpc_error",
    "from_status",
    "grpc_code",
    "to_status",
    "translated",
]

DOMAIN = "arriero"

# gRPC sends the message percent-encoded (three times its bytes at worst) and the
# details as base64, and peers refuse more than 8 KiB of trailers by default.
_MESSAGE_BYTES = 1000
_STATUS_BYTES = 3600

_DETAILS_KEY = "grpc-status-details-bin"
_RETRY_SECONDS = 1

_BY_CODE: dict[str, type[errors.ArrieroError]] = {
    cls.code: cls
    for cls in (
        errors.InvalidArgument,
        errors.NotFound,
        errors.AlreadyExists,
        errors.PermissionDenied,
        errors.Unauthenticated,
        errors.FailedPrecondition,
        errors.OutOfRange,
        errors.Aborted,
        errors.Cancelled,
        errors.DeadlineExceeded,
        errors.ResourceExhausted,
        errors.Unavailable,
        errors.DataLoss,
        errors.Unimplemented,
        errors.Internal,
    )
}
_BY_REASON: dict[str, type[errors.ArrieroError]] = {
    cls.default_reason: cls for cls in (errors.GateFailed, errors.Preempted)
}

# What gRPC says where nobody listens: the address, and the last of several reasons.
_NOBODY = re.compile(
    r"failed to connect to all addresses.*?ipv[46]:(\S+): (?:.*: )?(.+)", re.DOTALL
)

_log = logging.getLogger(__name__)


def to_status(error: BaseException) -> status_pb2.Status:
    """The status that callers get for an exception.

    What is no `ArrieroError` becomes INTERNAL with a short incident id; the
    traceback goes to the log under that id, never to the caller.
    """
    known = _known(error)
    status = status_pb2.Status(
        code=code_pb2.Code.Value(known.code), message=_cut(known.message, _MESSAGE_BYTES)
    )
    info = error_details_pb2.ErrorInfo(reason=known.reason, domain=DOMAIN)
    for key, value in known.metadata.items():
        info.metadata[key] = _cut(value, 300)
    _add(status, info)
    if known.retryable:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromSeconds(_RETRY_SECONDS)
        _add(status, retry)
    if isinstance(known, errors.FailedPrecondition):
        failure = error_details_pb2.PreconditionFailure()
        failure.violations.add(
            type=known.reason,
            subject=known.metadata.get("subject", ""),
            description=_cut(known.message, _MESSAGE_BYTES),
        )
        _add(status, failure)
    if isinstance(known, errors.InvalidArgument) and known.violations:
        _add(status, _bad_request(known.violations, _STATUS_BYTES - status.ByteSize() - 64))
    return status


def from_status(status: status_pb2.Status) -> errors.ArrieroError:
    """The exception that a status stands for.

    Raises:
        ValueError: the status is OK.
    """
    if status.code == code_pb2.OK:
        raise ValueError("an OK status is no error")
    name = code_pb2.Code.Name(status.code) if status.code in code_pb2.Code.values() else "UNKNOWN"
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    for detail in status.details:
        for message in (info, bad_request):
            if detail.Is(message.DESCRIPTOR):
                detail.Unpack(message)
    reason, metadata = info.reason or None, dict(info.metadata)
    message = status.message or name
    if name == "INVALID_ARGUMENT":
        violations = [
            errors.FieldViolation(v.field, v.description) for v in bad_request.field_violations
        ]
        return errors.InvalidArgument(
            message, violations=violations, reason=reason, metadata=metadata
        )
    if reason == errors.DiskFull.default_reason:
        try:
            needed, free = int(metadata["needed_bytes"]), int(metadata["free_bytes"])
        except (KeyError, ValueError):
            pass  # another service's DISK_FULL: the plain class holds all that is known
        else:
            return errors.DiskFull(message, needed=needed, free=free)
    cls = _BY_CODE.get(name, errors.Internal)
    special = _BY_REASON.get(reason or "")
    if special is not None and special.code == name:
        cls = special
    return cls(message, reason=reason, metadata=metadata)


def from_rpc_error(error: grpc.RpcError) -> errors.ArrieroError:
    """The exception behind a failed call, sync or asyncio."""
    call: Any = error
    code: grpc.StatusCode = call.code() if hasattr(call, "code") else grpc.StatusCode.UNKNOWN
    message = (call.details() if hasattr(call, "details") else None) or str(error)
    trailers = call.trailing_metadata() if hasattr(call, "trailing_metadata") else None
    for key, value in trailers or ():
        if key == _DETAILS_KEY:
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                break
            if status.code == code_pb2.Code.Value(code.name):
                return from_status(status)
    if code is grpc.StatusCode.UNKNOWN:
        return errors.Internal(message)
    if code is grpc.StatusCode.UNAVAILABLE and (found := _NOBODY.match(message)):
        message = f"nobody answers at {found[1]}: {found[2]}"
    return from_status(status_pb2.Status(code=code_pb2.Code.Value(code.name), message=message))


@contextmanager
def translated() -> Iterator[None]:
    """Calls made inside raise `ArrieroError`, not `grpc.RpcError`."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def grpc_code(status: status_pb2.Status) -> grpc.StatusCode:
    """The code as the grpc package has it."""
    return grpc.StatusCode[code_pb2.Code.Name(status.code)]


def _known(error: BaseException) -> errors.ArrieroError:
    """The error itself, or what an exception from elsewhere means to a caller."""
    if isinstance(error, errors.ArrieroError):
        if error.code == "INTERNAL":
            _log.error("%s", error.message, exc_info=error)
        return error
    if isinstance(error, grpc.RpcError):
        upstream = from_rpc_error(error)
        # Our own credentials at another service are no fault of this caller.
        if not isinstance(upstream, errors.Unauthenticated | errors.PermissionDenied):
            return upstream
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return errors.ResourceExhausted(
            f"no space left where {error.filename or 'the service'} is written; free some space",
            reason="DISK_FULL",
        )
    incident = secrets.token_hex(4)
    _log.error("incident %s: %s", incident, error, exc_info=error, extra={"incident": incident})
    return errors.Internal(
        f"internal error, incident {incident}; the service's log has the details under this id",
        metadata={"incident": incident},
    )


def _bad_request(
    violations: tuple[errors.FieldViolation, ...], room: int
) -> error_details_pb2.BadRequest:
    """As many violations as fit into `room` bytes; at least one, cut."""
    message = error_details_pb2.BadRequest()
    for violation in violations:
        message.field_violations.add(
            field=_cut(violation.field, 200), description=_cut(violation.description, 600)
        )
        if message.ByteSize() > room and len(message.field_violations) > 1:
            del message.field_violations[-1]
            break
    return message


def _add(status: status_pb2.Status, detail: Message) -> None:
    status.details.add().Pack(detail)


def _cut(text: str, size: int) -> str:
    data = text.encode("utf-8", errors="replace")
    if len(data) <= size:
        return data.decode("utf-8")
    return data[: size - 3].decode("utf-8", errors="ignore") + "…"
