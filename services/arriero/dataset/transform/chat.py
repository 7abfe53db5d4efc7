"""One question to an OpenAI-compatible endpoint, asked until it is answered.

Responsibility: requests, retries with backoff, and what each kind of refusal
means. Does not know rows or where answers go.

API: POST <endpoint>/chat/completions, as https://platform.openai.com/docs/api-reference/chat
describes it and llama.cpp, vLLM and others speak it.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from time import time
from types import TracebackType
from typing import Any

import httpx2

from arriero.dataset.transform.pace import Pace
from arriero.errors import ArrieroError, FailedPrecondition, NotFound, PermissionDenied

__all__ = ["Answer", "Chat", "NotAnswered", "Question"]

FIRST_BACKOFF, LONGEST_BACKOFF = 0.5, 60.0
# An answer of this many bytes is not one.
_LONGEST_BODY = 16 * 1024 * 1024
# An endpoint that wants a longer pause gets asked in between.
_LONGEST_PAUSE = 3600.0
_AGAIN = frozenset({408, 409, 425, 429})
# Characters of a prompt per token, for limits only; the endpoint's own count corrects it.
_CHARACTERS = 4


class NotAnswered(Exception):
    """A question stays without an answer.

    Attributes:
        why: for people.
        lasting: asking again would give the same.
    """

    def __init__(self, why: str, *, lasting: bool) -> None:
        super().__init__(why)
        self.why = why
        self.lasting = lasting


class _TryAgain(Exception):
    """`after`: seconds for which the endpoint wants no requests at all."""

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.why, self.after = why, after


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: messages of `role` and `content`."""

    messages: Sequence[Mapping[str, str]]

    @property
    def tokens(self) -> int:
        """About how many it has."""
        return sum(len(message["content"]) for message in self.messages) // _CHARACTERS + 1


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer's text, and the tokens that the endpoint counted."""

    text: str
    usage: dict[str, int] = field(default_factory=dict)


@dataclass
class Chat:
    """An endpoint to ask; an async context manager.

    Args:
        endpoint: base URL.
        model: its name there.
        parameters: sent with each question: `max_tokens`, `temperature`, `seed`.
        key: bearer token, or empty.
        pace: when requests may start.
        timeout: seconds until an answer must be complete.
        retries: of one question, after the first try.
        connections: at once.
        sleep: waits so many seconds.
    """

    endpoint: str
    model: str
    parameters: Mapping[str, Any]
    key: str
    pace: Pace
    timeout: float
    retries: int
    connections: int
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    retried: int = 0

    async def __aenter__(self) -> Chat:
        self._client = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            # The whole answer has one deadline, below.
            timeout=httpx2.Timeout(None),
            limits=httpx2.Limits(
                max_connections=self.connections, max_keepalive_connections=self.connections
            ),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def ask(self, question: Question) -> Answer:
        """The answer; asks again where that may help.

        Raises:
            NotAnswered: this question is refused, or was not answered in all tries.
            FailedPrecondition, NotFound, PermissionDenied: the endpoint answers
                no question like this: wrong key, no such model, no such API.
        """
        tries = self.retries + 1
        for number in range(1, tries + 1):
            expected = question.tokens + int(self.parameters["max_tokens"])
            await self.pace.start(expected)
            used = 0
            try:
                answer = await self._once(question)
                used = answer.usage.get("total_tokens", expected)
                return answer
            except _TryAgain as again:
                if number == tries:
                    raise NotAnswered(
                        f"{again.why} ({tries} tries)" if tries > 1 else again.why, lasting=False
                    ) from None
                self.pace.pause(again.after)
                await self.sleep(max(0.0, _backoff(number) - again.after))
                self.retried += 1
            finally:
                self.pace.correct(expected, used)
        raise AssertionError("the last try returns or raises")

    async def _once(self, question: Question) -> Answer:
        body = {"model": self.model, "messages": list(question.messages), **self.parameters}
        url = f"{self.endpoint.rstrip('/')}/chat/completions"
        try:
            async with (
                asyncio.timeout(self.timeout),
                self._client.stream("POST", url, json=body) as response,
            ):
                content = bytearray()
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > _LONGEST_BODY:
                        raise NotAnswered("the answer has no end", lasting=False)
        except TimeoutError:
            raise _TryAgain(f"no answer within {self.timeout:g} s") from None
        except httpx2.InvalidURL as error:
            raise FailedPrecondition(f"endpoint: {error}") from None
        except httpx2.RequestError as error:
            raise _TryAgain(f"{type(error).__name__}: {error}".removesuffix(": ")) from None
        if response.status_code != 200:
            raise _refusal(response.status_code, response.headers.get("retry-after"), content, url)
        return _answer(content)


def _backoff(number: int) -> float:
    """Seconds before try `number` + 1: doubling, with jitter, so that workers part."""
    return float(min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** (number - 1)) * random.uniform(0.5, 1))


def _refusal(
    status: int, retry_after: str | None, content: bytes | bytearray, url: str
) -> Exception:
    why = f"HTTP {status}: {_message(content)}"
    if status in _AGAIN or status >= 500:
        return _TryAgain(why, _seconds(retry_after))
    error: ArrieroError
    if status in (401, 403):
        error = PermissionDenied(
            f"the endpoint does not accept the key ({why}); set api_key_secret to the name of a "
            "secret with a valid one"
        )
    elif status == 404:
        error = NotFound(
            f"{url} is not there, or the model is not ({why}); expected the base URL of an "
            "OpenAI-compatible API, such as http://host:8000/v1, and a model that it has"
        )
    elif status in (402, 405) or status < 400:
        error = FailedPrecondition(f"{url} answers no chat completions ({why})")
    else:
        return NotAnswered(why, lasting=True)
    return error


def _message(content: bytes | bytearray) -> str:
    """What a refusal says, shortly."""
    text = content.decode("utf-8", "replace").strip()
    try:
        found = json.loads(text)["error"]
        text = found["message"] if isinstance(found, dict) else found
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(str(text).split())[:300] or "no message"


def _seconds(text: str | None) -> float:
    """A Retry-After header: seconds, or a date; 0 where it says nothing."""
    try:
        seconds = float(text or 0)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text or "").timestamp() - time()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_PAUSE) if math.isfinite(seconds) else 0.0


def _answer(content: bytes | bytearray) -> Answer:
    try:
        data = json.loads(content)
        choice = data["choices"][0]
        text = choice["message"]["content"]
        usage = data.get("usage") or {}
        counts = {
            name: int(usage[name])
            for name in ("prompt_tokens", "completion_tokens", "total_tokens")
            if isinstance(usage.get(name), int)
        }
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _TryAgain(f"what came is no chat completion: {_message(content)}") from None
    finish = choice.get("finish_reason")
    if finish == "length":
        raise NotAnswered("the answer was cut at max_tokens; raise it", lasting=True)
    if finish == "content_filter":
        raise NotAnswered("the endpoint's content filter kept the answer back", lasting=True)
    if not isinstance(text, str) or not text.strip():
        raise NotAnswered("the answer is empty", lasting=True)
    return Answer(text, counts)
