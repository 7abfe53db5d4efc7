"""The HTTP application: routes, who may call, and streams that end when nobody listens.

Responsibility: HTTP to `AsyncClient` and back. Does not know where it listens.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from arriero.client import AsyncClient
from arriero.client.endpoint import AsyncStream
from arriero.errors import (
    ArrieroError,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    Unauthenticated,
)
from arriero.gateway import answers
from arriero.gateway.answers import Answer, Choice
from arriero.gateway.asked import (
    Ask,
    read_chat,
    read_completion,
    read_embedding,
    split_model,
)
from arriero.gateway.settings import GatewaySettings
from arriero.metrics import GatewayMetrics
from arriero.rpc.auth import TokenFile, authenticate
from arriero.v1.inference_pb2 import TokenLogprob
from arriero.v1.orchestrator_pb2 import Endpoint

__all__ = ["build"]

_log = logging.getLogger(__name__)
# Nginx and its likes hold events back unless told not to.
_SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
_WATCH_SECONDS = 0.5

_Handler = Callable[[Request], Awaitable[Response]]
# Of which choice, more text (None: it ended), and how likely its tokens were.
_Part = tuple[int, str | None, list[TokenLogprob] | None]
_T = TypeVar("_T")


class _Gone(Exception):
    """The client went away; nobody reads the answer."""


def build(
    client: AsyncClient,
    *,
    settings: GatewaySettings,
    tokens: TokenFile | None,
    page: GatewayMetrics,
) -> Starlette:
    """The application.

    Args:
        client: of the platform; used on the loop that serves.
        settings: limits.
        tokens: accepted bearer tokens; None lets everybody in.
        page: counts what is asked and answered.
    """
    gateway = _Gateway(client, settings, tokens, page)
    routes = [
        Route("/healthz", gateway.health, methods=["GET"]),
        Route("/metrics", gateway.metrics, methods=["GET"]),
        Route("/v1/models", gateway.guarded(gateway.models), methods=["GET"]),
        Route("/v1/models/{name}", gateway.guarded(gateway.model), methods=["GET"]),
        Route("/v1/chat/completions", gateway.guarded(gateway.chat), methods=["POST"]),
        Route("/v1/embeddings", gateway.guarded(gateway.embeddings), methods=["POST"]),
        Route("/v1/completions", gateway.guarded(gateway.completion), methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _no_route})


class _Gateway:
    def __init__(
        self,
        client: AsyncClient,
        settings: GatewaySettings,
        tokens: TokenFile | None,
        page: GatewayMetrics,
    ) -> None:
        self._client = client
        self._settings = settings
        self._tokens = tokens
        self._page = page

    def guarded(self, handler: _Handler) -> _Handler:
        """With a token asked for, the outcome counted, and errors as bodies."""

        async def handle(request: Request) -> Response:
            started = time.monotonic()
            try:
                self._authenticate(request)
                response = await handler(request)
            except (_Gone, ClientDisconnect):
                response = Response(status_code=499)  # nginx's word for it; nobody reads it
            except ArrieroError as error:
                response = _error(error)
            except Exception:
                _log.exception("%s %s failed", request.method, request.url.path)
                response = _error(Internal("unexpected"))
            route = request.scope["route"].path
            self._page.answered(route, response.status_code, time.monotonic() - started)
            return response

        return handle

    async def health(self, _: Request) -> Response:
        """The process is there; serving needs nothing else."""
        return PlainTextResponse("ok\n")

    async def metrics(self, _: Request) -> Response:
        """The Prometheus page."""
        return Response(
            generate_latest(self._page.registry), headers={"content-type": CONTENT_TYPE_LATEST}
        )

    async def models(self, _: Request) -> Response:
        """Every endpoint, alone and with each of its adapters."""
        found = await self._client.endpoints.list()
        return JSONResponse(
            answers.models(
                (name, endpoint.create_time.seconds)
                for endpoint in found
                for name in _names(endpoint)
            )
        )

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        found = await self._client.endpoints.get(split_model(name)[0])
        if name not in _names(found):
            raise NotFound(f"no model {name!r}; there are {', '.join(_names(found))}")
        return JSONResponse(answers.model(name, found.create_time.seconds))

    async def chat(self, request: Request) -> Response:
        """`/v1/chat/completions`."""
        ask = read_chat(await self._read(request))
        endpoint = self._client.endpoint(ask.endpoint)
        timeout = self._settings.timeout_seconds
        streams = [
            endpoint.chat(
                list(ask.messages),
                tools=ask.tools,
                adapter=ask.adapter,
                timeout=timeout,
                **sampling,
            )
            for sampling in ask.samplings()
        ]
        return await self._answer(request, ask, Answer(ask.model, chat=True), streams)

    async def completion(self, request: Request) -> Response:
        """`/v1/completions`."""
        ask = read_completion(await self._read(request))
        endpoint = self._client.endpoint(ask.endpoint)
        timeout = self._settings.timeout_seconds
        streams = [
            endpoint.generate(prompt, adapter=ask.adapter, timeout=timeout, **sampling)
            for prompt in ask.prompts
            for sampling in ask.samplings()
        ]
        return await self._answer(request, ask, Answer(ask.model, chat=False), streams)

    async def embeddings(self, request: Request) -> Response:
        """`/v1/embeddings`."""
        ask = read_embedding(await self._read(request))
        endpoint = self._client.endpoint(ask.endpoint)
        found = await _while_listening(request, endpoint.embed(ask.texts, adapter=ask.adapter))
        self._page.tokens(ask.model, found.usage.prompt_tokens, 0)
        return JSONResponse(answers.embeddings(ask.model, found, as_base64=ask.base64))

    def _authenticate(self, request: Request) -> None:
        try:
            authenticate(list(request.headers.items()), None, self._tokens)
        except Unauthenticated as error:
            raise Unauthenticated(
                error.message.partition(";")[0] + "; send one as 'Authorization: Bearer <token>' "
                "(OpenAI's clients: api_key)",
                reason=error.reason,
            ) from None

    async def _read(self, request: Request) -> bytes:
        limit = self._settings.max_body_bytes
        refusal = _TooLarge(
            f"the body is larger than {limit} bytes; shorten the prompt, or raise "
            "ARRIERO_GATEWAY_MAX_BODY_BYTES"
        )
        said = request.headers.get("content-length", "")
        if said.isdecimal() and int(said) > limit:
            raise refusal
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > limit:
                raise refusal
        return bytes(data)

    async def _answer(
        self, request: Request, ask: Ask, answer: Answer, streams: list[AsyncStream]
    ) -> Response:
        tells = "logprobs" in ask.sampling
        choices = [Choice(i, logprobs=[] if tells else None) for i in range(len(streams))]
        if not ask.stream:
            await _while_listening(request, _gather(streams, choices))
            _limit_calls(ask, choices)
            self._count(ask.model, choices)
            return JSONResponse(answer.whole(choices, ask.n))
        # Errors before the first word still have a status of their own.
        parts = _merged(streams, choices)
        try:
            head = await _while_listening(request, anext(parts, None))
        except BaseException:
            await parts.aclose()
            raise

        async def events() -> AsyncIterator[bytes]:
            try:
                for choice in choices if answer.chat else ():
                    yield answers.event(answer.part(choice, "", first=True))
                part = head
                while part is not None:
                    index, text, told = part
                    if text is not None:
                        yield answers.event(answer.part(choices[index], text, logprobs=told))
                    else:
                        _limit_calls(ask, choices)
                        if choices[index].tool_calls:
                            yield answers.event(answer.calls(choices[index]))
                        yield answers.event(answer.end(choices[index], told))
                    part = await anext(parts, None)
                if ask.usage:
                    yield answers.event(answer.used(choices, ask.n))
                yield answers.DONE
            except ArrieroError as error:
                # The status is sent already: the clients raise on this event.
                yield answers.event(answers.error_body(error))
            finally:
                # Also when the client went away: the slots are free within a decode step.
                await parts.aclose()
                self._count(ask.model, choices)

        return StreamingResponse(events(), media_type="text/event-stream", headers=_SSE_HEADERS)

    def _count(self, model: str, choices: list[Choice]) -> None:
        self._page.tokens(
            model,
            sum(choice.prompt_tokens for choice in choices),
            sum(choice.completion_tokens for choice in choices),
        )


def _names(endpoint: Endpoint) -> list[str]:
    """What clients may call it."""
    return [endpoint.name, *(f"{endpoint.name}:{a.name}" for a in endpoint.spec.adapters)]


class _TooLarge(InvalidArgument):
    """The body is too large to be read."""


def _limit_calls(ask: Ask, choices: list[Choice]) -> None:
    if not ask.parallel:
        for choice in choices:
            del choice.tool_calls[1:]


async def _follow(stream: AsyncStream, choice: Choice) -> AsyncGenerator[str, None]:
    try:
        async for delta in stream:
            choice.text += delta
            yield delta
    finally:
        await stream.aclose()
        if choice.logprobs is not None:
            choice.logprobs = stream.logprobs
        choice.finish_reason = stream.finish_reason
        choice.tool_calls = list(stream.tool_calls)
        if stream.usage is not None:
            choice.prompt_tokens = stream.usage.prompt_tokens
            choice.completion_tokens = stream.usage.completion_tokens
            choice.cached_tokens = stream.usage.cached_tokens


async def _gather(streams: list[AsyncStream], choices: list[Choice]) -> None:
    async def drain(stream: AsyncStream, choice: Choice) -> None:
        async for _ in _follow(stream, choice):
            pass

    try:
        async with asyncio.TaskGroup() as group:
            for stream, choice in zip(streams, choices, strict=True):
                group.create_task(drain(stream, choice))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _merged(streams: list[AsyncStream], choices: list[Choice]) -> AsyncGenerator[_Part, None]:
    """(index, delta) of all streams as they come; None ends one."""
    # One place: a client that reads slowly slows the streams down, not the memory up.
    queue: asyncio.Queue[_Part | ArrieroError] = asyncio.Queue(maxsize=1)

    async def pump(stream: AsyncStream, choice: Choice) -> None:
        told = 0

        def news() -> list[TokenLogprob] | None:
            nonlocal told
            if choice.logprobs is None:
                return None
            found = stream.logprobs[told:]
            told += len(found)
            return found

        try:
            async for delta in _follow(stream, choice):
                await queue.put((choice.index, delta, news()))
            # Tokens whose text was held back, or is none.
            await queue.put((choice.index, None, news()))
        except ArrieroError as error:
            await queue.put(error)

    tasks = [
        asyncio.create_task(pump(stream, choice))
        for stream, choice in zip(streams, choices, strict=True)
    ]
    left = len(tasks)
    try:
        while left:
            part = await queue.get()
            if isinstance(part, ArrieroError):
                raise part
            left -= part[1] is None
            yield part
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _while_listening(request: Request, work: Awaitable[_T]) -> _T:
    """The work's result, unless the client goes away first: then the work is stopped."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_WATCH_SECONDS)
            if not task.done() and await request.is_disconnected():
                raise _Gone
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _error(error: ArrieroError) -> JSONResponse:
    status = 413 if isinstance(error, _TooLarge) else answers.http_status(error)
    if isinstance(error, DeadlineExceeded):
        _log.warning("a call took too long: %s", error.message)
    headers = {"retry-after": "1"} if status in (429, 503) else None
    return JSONResponse(answers.error_body(error), status_code=status, headers=headers)


async def _no_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    what = (
        f"{request.method} {request.url.path} is not part of this API; it has /v1/models, "
        "/v1/chat/completions, /v1/completions and /v1/embeddings"
    )
    body = {
        "error": {"message": what, "type": "invalid_request_error", "param": None, "code": None}
    }
    headers = error.headers if isinstance(error, HTTPException) else None  # Allow
    return JSONResponse(body, status_code=status, headers=headers)
