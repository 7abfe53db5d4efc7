"""Text from a served model, for blocking code.

Responsibility: a sync face for `AsyncEndpoint` and its streams, no logic. Does
not know gRPC.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Unpack

from arriero.client.endpoint import (
    GENERATE_SECONDS,
    AsyncEndpoint,
    AsyncStream,
    Messages,
    Sampling,
)
from arriero.client.loop import LoopThread
from arriero.errors import FailedPrecondition
from arriero.v1 import inference_pb2

__all__ = ["Endpoint", "Stream"]


class Endpoint:
    """A served model by name; from `Client.endpoint`.

    Examples:
        >>> with Client() as client:
        ...     faq = client.endpoint("faq")
        ...     faq.generate("An arriero is ", temperature=0).text()
        ...     answer = faq.chat([{"role": "user", "content": "Who drives llamas?"}])
        ...     for delta in answer:
        ...         print(delta, end="|")
        ...     print(answer.finish_reason, answer.usage.completion_tokens)
        ...     faq.tokenize("llama")
        'A driver of pack llamas.'
        A |driver |of |pack |llamas.|stop 5
        [1, 5]
    """

    def __init__(self, endpoint: AsyncEndpoint, thread: LoopThread) -> None:
        self._endpoint = endpoint
        self._thread = thread

    @property
    def name(self) -> str:
        """The endpoint's name."""
        return self._endpoint.name

    def generate(
        self,
        prompt: str,
        *,
        adapter: str = "",
        timeout: float = GENERATE_SECONDS,
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """The continuation of a prompt.

        Args:
            prompt: as the model sees it, special tokens written out.
            adapter: name of a LoRA adapter of the endpoint; empty: the model alone.
            timeout: seconds for the whole answer.
            **sampling: see `Sampling`.

        Raises:
            InvalidArgument: while iterating: the prompt does not fit, a parameter
                is out of range.
            Unavailable: while iterating: no replica answers, or one broke off.
        """
        return Stream(
            self._endpoint.generate(prompt, adapter=adapter, timeout=timeout, **sampling),
            self._thread,
        )

    def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        adapter: str = "",
        timeout: float = GENERATE_SECONDS,
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """The answer to messages, rendered with the model's own template.

        Args:
            messages: `{"role": …, "content": …}` each, or one user message as text.
                With tools also `tool_calls` of the assistant, and `tool_call_id` of a
                tool's answer, as OpenAI's API has them.
            tools: that the model may call, as OpenAI's API has them.
            adapter: name of a LoRA adapter of the endpoint; empty: the model alone.
            timeout: seconds for the whole answer.
            **sampling: see `Sampling`.

        Raises:
            InvalidArgument: a message without role or content; otherwise as `generate`.
            Unavailable: as `generate`.
        """
        stream = self._endpoint.chat(
            messages, tools=tools, adapter=adapter, timeout=timeout, **sampling
        )
        return Stream(stream, self._thread)

    def score(self, golden: str = "") -> inference_pb2.ScoreResponse:
        """How far one live replica is from golden logits.

        Args:
            golden: digest of the report; default: the one that the endpoint's
                spec names, else the one that its model carries.

        Raises:
            FailedPrecondition: the model carries none.
        """
        return self._thread.run(self._endpoint.score(golden))

    def embed(
        self, texts: Sequence[str], *, adapter: str = "", normalize: bool = True
    ) -> inference_pb2.EmbedResponse:
        """A vector for each text: `embeddings[i].values`, and what it took.

        Args:
            texts: each fits into the context.
            adapter: name of a LoRA adapter of the endpoint; empty: the model alone.
            normalize: to a length of 1.

        Raises:
            InvalidArgument: a text is empty or does not fit.
        """
        return self._thread.run(self._endpoint.embed(texts, adapter=adapter, normalize=normalize))

    def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: any.
            add_special: add BOS where the model asks for it.
            parse_special: read special tokens that are written out.
        """
        return self._thread.run(
            self._endpoint.tokenize(text, add_special=add_special, parse_special=parse_special)
        )

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids.

        Args:
            tokens: ids.
            special: write special tokens out.

        Raises:
            InvalidArgument: there is no such token.
        """
        return self._thread.run(self._endpoint.detokenize(tokens, special=special))

    def model(self) -> inference_pb2.GetModelResponse:
        """What a replica serves: digest, quant type, context, template."""
        return self._thread.run(self._endpoint.model())


class Stream(Iterator[str]):
    """Text as it is made: iterate over the deltas, or take `text()`.

    Leaving a `with` block, or `close()`, stops the generation.
    """

    def __init__(self, stream: AsyncStream, thread: LoopThread) -> None:
        self._stream = stream
        self._thread = thread

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        try:
            return self._thread.run(self._stream.__anext__())
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def finish_reason(self) -> str | None:
        """`stop`, `length` or `tool_calls` once the stream has ended."""
        return self._stream.finish_reason

    @property
    def tool_calls(self) -> list[inference_pb2.ToolCall]:
        """That the model asks for, once the stream has ended."""
        return self._stream.tool_calls

    @property
    def logprobs(self) -> list[inference_pb2.TokenLogprob]:
        """Of the tokens so far, where they were asked for."""
        return self._stream.logprobs

    @property
    def usage(self) -> inference_pb2.Usage | None:
        """Tokens and seconds once the stream has ended."""
        return self._stream.usage

    @property
    def replica(self) -> str | None:
        """Address of the replica that answers, once it does."""
        return self._stream.replica

    def text(self) -> str:
        """All that is left, in one piece."""
        return "".join(self)

    def close(self) -> None:
        """Stop; the replica's slot is free within one decode step."""
        with contextlib.suppress(FailedPrecondition):  # the client is closed, so the stream is
            self._thread.run(self._stream.aclose())
