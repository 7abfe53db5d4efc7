"""Answers as OpenAI's clients read them.

Responsibility: bodies and events of chat and text completions, embeddings, models and
errors (the shapes of OpenAI's API reference). Does not know HTTP or where text
comes from.
"""

from __future__ import annotations

import base64
import itertools
import json
import struct
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from arriero.errors import (
    ArrieroError,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from arriero.v1.inference_pb2 import EmbedResponse, TokenLogprob, ToolCall

__all__ = ["DONE", "Answer", "Choice", "embeddings", "error_body", "event", "http_status", "models"]

DONE = b"data: [DONE]\n\n"

# The nearest first: subclasses before their parents.
_STATUS: tuple[tuple[type[ArrieroError], int, str], ...] = (
    (InvalidArgument, 400, "invalid_request_error"),
    (OutOfRange, 400, "invalid_request_error"),
    (Unauthenticated, 401, "authentication_error"),
    (PermissionDenied, 403, "permission_error"),
    (NotFound, 404, "invalid_request_error"),
    (FailedPrecondition, 409, "invalid_request_error"),
    (ResourceExhausted, 429, "rate_limit_error"),
    (Unimplemented, 501, "invalid_request_error"),
    (Unavailable, 503, "server_error"),
    (DeadlineExceeded, 504, "server_error"),
)


# What a replica calls otherwise than OpenAI's API: beginning of a field -> theirs.
_NAMES = (("sampling.json_schema", "response_format"), ("sampling.", ""), ("texts[", "input["))


def http_status(error: ArrieroError) -> int:
    """The HTTP status of an error."""
    return next((status for kind, status, _ in _STATUS if isinstance(error, kind)), 500)


def error_body(error: ArrieroError) -> dict[str, Any]:
    """The body of an error; `param` names the field that is wrong."""
    kind = next((word for cls, _, word in _STATUS if isinstance(error, cls)), "server_error")
    message = "something went wrong in the server" if type(error) is Internal else error.message
    param = None
    if isinstance(error, InvalidArgument) and error.violations:
        field = error.violations[0].field
        param = _param(field)
        if message.startswith(f"{field}: "):
            message = param + message.removeprefix(field)
    # What is not found here is a model, and clients know that by OpenAI's word.
    code = "model_not_found" if isinstance(error, NotFound) else error.reason.lower()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _param(field: str) -> str:
    for ours, theirs in _NAMES:
        if field.startswith(ours):
            return theirs + field.removeprefix(ours)
    return field


def event(data: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


def models(names: Iterable[tuple[str, int]]) -> dict[str, Any]:
    """`/v1/models` of (name, creation in Unix seconds)."""
    return {"object": "list", "data": [model(name, created) for name, created in names]}


def model(name: str, created: int) -> dict[str, Any]:
    """One model."""
    return {"id": name, "object": "model", "created": created, "owned_by": "arriero"}


def embeddings(model: str, found: EmbedResponse, *, as_base64: bool) -> dict[str, Any]:
    """The body of vectors, as numbers or as float32 in base64."""

    def vector(values: Sequence[float]) -> list[float] | str:
        if not as_base64:
            return list(values)
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()

    used = found.usage.prompt_tokens
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector(item.values)}
            for index, item in enumerate(found.embeddings)
        ],
        "model": model,
        "usage": {"prompt_tokens": used, "total_tokens": used},
    }


@dataclass(slots=True)
class Choice:
    """One answer, as far as it has come.

    Attributes:
        told: characters of the tokens whose log-probabilities were told.
    """

    index: int
    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    logprobs: list[TokenLogprob] | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
    told: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What the parts of one answer have in common."""

    model: str
    chat: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Iterable[Choice], n: int) -> dict[str, Any]:
        """The body of an answer that does not stream; each prompt has `n` choices."""
        choices = list(choices)
        return {
            **self._head("chat.completion"),
            "choices": [
                {
                    "index": choice.index,
                    **({"message": self._message(choice)} if self.chat else {"text": choice.text}),
                    "finish_reason": choice.finish_reason,
                    "logprobs": self._logprobs(choice, choice.logprobs),
                }
                for choice in choices
            ],
            "usage": _usage(choices, n),
        }

    @staticmethod
    def _message(choice: Choice) -> dict[str, Any]:
        said: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.tool_calls:
            said["tool_calls"] = [_call(call) for call in choice.tool_calls]
            said["content"] = choice.text or None
        return said

    def calls(self, choice: Choice) -> dict[str, Any]:
        """The event with the tools that the model calls."""
        calls = [{"index": i, **_call(call)} for i, call in enumerate(choice.tool_calls)]
        delta = {"tool_calls": calls}
        return self._chunk([{"index": choice.index, "delta": delta, "finish_reason": None}])

    def part(
        self,
        choice: Choice,
        text: str,
        *,
        first: bool = False,
        logprobs: list[TokenLogprob] | None = None,
    ) -> dict[str, Any]:
        """An event with more text; the first one of a chat says whose it is."""
        delta = {"role": "assistant", "content": text} if first else {"content": text}
        said = {"delta": delta} if self.chat else {"text": text}
        told = self._logprobs(choice, logprobs)
        return self._chunk(
            [{"index": choice.index, **said, "finish_reason": None, "logprobs": told}]
        )

    def end(self, choice: Choice, logprobs: list[TokenLogprob] | None = None) -> dict[str, Any]:
        """The event that says why a choice ended."""
        said: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self._chunk(
            [
                {
                    "index": choice.index,
                    **said,
                    "finish_reason": choice.finish_reason,
                    "logprobs": self._logprobs(choice, logprobs or None),
                }
            ]
        )

    def used(self, choices: Iterable[Choice], n: int) -> dict[str, Any]:
        """The event with the tokens used, which has no choices."""
        return {**self._chunk([]), "usage": _usage(list(choices), n)}

    def _logprobs(self, choice: Choice, told: list[TokenLogprob] | None) -> dict[str, Any] | None:
        if told is None:
            return None
        if self.chat:
            return {"content": [_token(t, tops=True) for t in told], "refusal": None}
        tokens = [_text(t) for t in told]
        offsets = list(itertools.accumulate(map(len, tokens), initial=choice.told))
        choice.told = offsets.pop()
        return {
            "tokens": tokens,
            "token_logprobs": [t.logprob for t in told],
            "top_logprobs": [{_text(top): top.logprob for top in t.top} for t in told],
            "text_offset": offsets,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": choices}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind if self.chat else "text_completion",
            "created": self.created,
            "model": self.model,
        }


def _token(told: TokenLogprob, *, tops: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {
        "token": _text(told),
        "logprob": told.logprob,
        "bytes": list(told.piece),
    }
    return {**found, "top_logprobs": [_token(top) for top in told.top]} if tops else found


def _text(told: TokenLogprob) -> str:
    return told.piece.decode("utf-8", "replace")


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _usage(choices: list[Choice], n: int) -> dict[str, Any]:
    # A prompt counts once, however many choices it has.
    prompts = choices[::n]
    prompt = sum(choice.prompt_tokens for choice in prompts)
    completion = sum(choice.completion_tokens for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in prompts)},
    }
