"""One request on its way through the engine.

Responsibility: what is known of a request from its admission to its end, and the
events that its caller gets. Does not know batches, slots or other requests.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from arriero.errors import ArrieroError, FieldViolation, InvalidArgument
from arriero.inference.adapters import Loaded
from arriero.inference.text import TextStream
from arriero.llama.sampler import Sampler


@dataclass(kw_only=True)
class Request:
    """A request for text, whatever computes it.

    Attributes:
        id: of the request.
        prompt: token ids.
        text: what was made, as text.
        max_tokens: to make at most.
        ends: tokens that end it, beside stop strings.
        cached: prompt tokens that were in a KV cache before.
        made: tokens.
    """

    id: int
    prompt: list[int]
    text: TextStream
    max_tokens: int
    ends: frozenset[int] = frozenset()
    cached: int = 0
    made: int = 0
    admitted: float = field(default_factory=time.monotonic)
    first: float = 0.0

    def last_event(
        self, reason: str, delta: str = "", told: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """How it ended, and what it used."""
        now = time.monotonic()
        first = self.first or now
        return {
            "id": self.id,
            "delta": delta + self.text.finish(),
            **(told or {}),
            "done": True,
            "finish_reason": reason,
            "usage": {
                "prompt_tokens": len(self.prompt),
                "completion_tokens": self.made,
                "prompt_seconds": first - self.admitted,
                "completion_seconds": now - first,
                "cached_tokens": self.cached,
            },
        }


@dataclass(kw_only=True)
class Stream(Request):
    """A request that llama.cpp computes.

    Attributes:
        sampler: of its own; closed at its end.
        adapter: that it is computed with; None: the model alone.
        slot: in which it runs; -1 while it waits.
        filled: prompt tokens that are in the KV cache.
        leader: another one that evaluates the same beginning; it is copied then.
        shared: tokens to copy.
        next_token: that the next decode takes, once the prompt is done.
        row: of the last batch, where its logits are; -1 without.
    """

    sampler: Sampler
    adapter: Loaded | None = None
    slot: int = -1
    filled: int = 0
    leader: Stream | None = None
    shared: int = 0
    next_token: int | None = None
    row: int = -1

    @property
    def key(self) -> int:
        """What its KV cache belongs to: streams of other keys must not use it."""
        return self.adapter.key if self.adapter is not None else 0


def check_fits(prompt: int, room: int, *, exact: bool = True) -> None:
    """Refuse a prompt that is empty, or leaves no room for an answer.

    Args:
        prompt: tokens.
        room: tokens of the context.
        exact: whether there may not be more.

    Raises:
        InvalidArgument: with the reason CONTEXT_LENGTH_EXCEEDED when it is too long.
    """
    if not prompt:
        raise InvalidArgument.field("prompt", "is empty; expected at least one token")
    if prompt >= room:
        what = (
            f"has {'' if exact else 'at least '}{prompt} tokens, and the context of this replica "
            f"holds {room} with the answer; shorten the prompt or deploy with a larger context"
        )
        raise InvalidArgument(
            f"prompt: {what}",
            violations=[FieldViolation("prompt", what)],
            reason="CONTEXT_LENGTH_EXCEEDED",
        )


def check_tokens(tokens: Sequence[int], n_vocab: int) -> None:
    """Refuse ids that are none.

    Raises:
        InvalidArgument: the first of them is named.
    """
    for i, token in enumerate(tokens):
        if not 0 <= token < n_vocab:
            raise InvalidArgument.field(
                f"tokens[{i}]", f"{token} is no token; expected an id of 0 to {n_vocab - 1}"
            )


def refusal(request: int, error: ArrieroError) -> dict[str, Any]:
    """The event that ends a request with an error."""
    found: dict[str, Any] = {
        "code": error.code,
        "message": error.message,
        "reason": error.reason,
    }
    if isinstance(error, InvalidArgument):
        found["violations"] = [[v.field, v.description] for v in error.violations]
    return {"id": request, "done": True, "error": found}
