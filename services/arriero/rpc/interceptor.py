"""What happens around every call on the server's side.

Responsibility: trace, authentication, roles, error mapping, audit and access lines,
and the early end of watches when the server drains. Does not know any service.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_status import rpc_status

from arriero.errors import Unavailable, Unimplemented
from arriero.rpc import auth, logs, methods, roles, trace
from arriero.rpc.status import grpc_code, to_status

__all__ = ["Guard"]

_access = logging.getLogger("arriero.access")
_audit = logging.getLogger("arriero.audit")

# What tells calls apart in an audit line, where a request has it.
_NAMES = ("name", "id", "ref", "tag", "replicas")

_Behaviour = Callable[[Any, Any], Any]
_Around = Callable[[_Behaviour, Any, Any], Awaitable[Any]]


class Guard(grpc.aio.ServerInterceptor):
    """The one interceptor of a server."""

    def __init__(self, tokens: auth.TokenFile | None = None) -> None:
        self._tokens = tokens
        self._watches: set[asyncio.Task[Any]] = set()
        self._draining = False

    def end_watches(self) -> None:
        """End calls that only wait for news with UNAVAILABLE, now and from now on."""
        self._draining = True
        for task in self._watches:
            task.cancel()

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the method's handler."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)
        metadata = handler_call_details.invocation_metadata

        async def around(behaviour: _Behaviour, request: Any, context: Any) -> Any:
            return await self._around(method, metadata, behaviour, request, context)

        kind = (
            f"{'stream' if handler.request_streaming else 'unary'}_"
            f"{'stream' if handler.response_streaming else 'unary'}"
        )
        behaviour = getattr(handler, kind)
        answer = _streaming if handler.response_streaming else _unary

        async def wrapped(request: Any, context: Any) -> Any:
            return await around(answer(behaviour), request, context)

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        result: grpc.RpcMethodHandler[Any, Any] = make(
            wrapped,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return result

    async def _around(
        self, method: str, metadata: Any, behaviour: _Behaviour, request: Any, context: Any
    ) -> Any:
        start = time.monotonic()
        subject, code = "", "OK"
        trace.adopt(next((v for k, v in metadata or () if k == trace.HEADER), None))
        try:
            if method in methods.OPEN or method in methods.AUTHENTICATES_ITSELF:
                subject = auth.LOCAL
            else:
                identity = auth.authenticate(metadata, context.peer_identities(), self._tokens)
                subject = identity.subject
                roles.check(identity.role, roles.needed(method), subject, method)
            return await self._watching(method, behaviour, request, context)
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except grpc.aio.AbortError:
            code = _code_of(context)
            raise
        except Exception as error:
            if isinstance(error, NotImplementedError) and _code_of(context) == "UNIMPLEMENTED":
                error = Unimplemented(f"this service does not do {method}")
            with logs.bind(method=method, subject=subject):
                status = to_status(error)
            code = grpc_code(status).name
            await _abort(context, status)
        finally:
            _line(method, subject, code, time.monotonic() - start, request, context)

    async def _watching(
        self, method: str, behaviour: _Behaviour, request: Any, context: Any
    ) -> Any:
        if method not in methods.WATCHES:
            return await behaviour(request, context)
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        try:
            if self._draining:
                raise _leaving()
            return await behaviour(request, context)
        except asyncio.CancelledError:
            if not self._draining or context.cancelled():
                raise
            task.uncancel()
            raise _leaving() from None
        finally:
            self._watches.discard(task)


def _leaving() -> Unavailable:
    return Unavailable("the server is stopping; ask again", reason="DRAINING")


def _unary(behaviour: _Behaviour) -> _Behaviour:
    return behaviour


def _streaming(behaviour: _Behaviour) -> _Behaviour:
    """Async generators and handlers that write by themselves, both as a coroutine."""

    async def run(request: Any, context: Any) -> None:
        answer: AsyncIterator[Any] | Awaitable[None] = behaviour(request, context)
        if isinstance(answer, Awaitable):
            await answer
            return
        async with aclosing(answer) as messages:  # type: ignore[type-var]
            async for message in messages:
                await context.write(message)

    return run


async def _abort(context: Any, status: status_pb2.Status) -> None:
    await context.abort_with_status(rpc_status.to_status(status))


def _code_of(context: Any) -> str:
    code = context.code()  # grpc.aio keeps a bare number
    return next((c.name for c in grpc.StatusCode if code in (c, c.value[0])), str(code))


def _line(method: str, subject: str, code: str, seconds: float, request: Any, context: Any) -> None:
    """One audit line per change; the rest is for people who debug."""
    audited = methods.audited(method) and not _asks_only(request)
    logger, level = (_audit, logging.INFO) if audited else (_access, logging.DEBUG)
    if not logger.isEnabledFor(level):
        return
    fields: dict[str, Any] = {
        "method": method,
        "subject": subject,
        "code": code,
        "seconds": round(seconds, 4),
        "peer": context.peer(),
    }
    if audited and isinstance(request, Message):
        fields["request"] = _named(request)
    logger.log(level, "%s %s", method.rpartition("/")[2], code, extra=fields)


def _asks_only(request: Any) -> bool:
    """A dry run: it says what a change would do, and changes nothing."""
    context = getattr(request, "context", None)
    wishes = ((request, "validate_only"), (context, "validate_only"), (request, "dry_run"))
    return any(getattr(part, wish, False) for part, wish in wishes)


def _named(request: Message) -> dict[str, Any]:
    """What identifies the object of a request: ids and names, never content."""
    found: dict[str, Any] = {}
    parts = [request]
    for nested in ("context", "spec", "pipeline"):
        if nested in request.DESCRIPTOR.fields_by_name and request.HasField(nested):
            parts.append(getattr(request, nested))
    for part in parts:
        for name in (*_NAMES, "request_id", "run", "stage", "endpoint"):
            field = part.DESCRIPTOR.fields_by_name.get(name)
            if field is None or field.message_type is not None or field.is_repeated:
                continue
            if value := getattr(part, name):
                found[name] = value
    return found
