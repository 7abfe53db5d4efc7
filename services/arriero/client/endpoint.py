"""Text from a served model.

Responsibility: generate, chat, score and tokenize on whichever replica is free,
and on another one while nothing has arrived yet. Does not know how replicas are
chosen, or what runs in them.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar, Unpack

from google.protobuf.message import Message

from arriero import rpc
from arriero.client.connection import Connection
from arriero.client.replicas import Replica, Replicas
from arriero.errors import (
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from arriero.v1 import inference_pb2, inference_pb2_grpc
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import orchestrator_pb2_grpc as stubs

__all__ = ["AsyncEndpoint", "AsyncStream", "Messages", "Sampling"]

GENERATE_SECONDS = 600.0

Messages = str | Sequence[Mapping[str, Any] | inference_pb2.Message]
_Answer = TypeVar("_Answer")
_Request = TypeVar("_Request", bound=Message)
_Delta = inference_pb2.GenerateResponse | inference_pb2.ChatResponse


class Sampling(TypedDict, total=False):
    """llama.cpp's names and meanings; what is left out takes the replica's default.

    `inference.proto` says what each does (`SamplingParams`).
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    repeat_last_n: int
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    xtc_probability: float
    xtc_threshold: float
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: Sequence[str]
    seed: int
    max_tokens: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logit_bias: Mapping[int, float]
    logprobs: int
    grammar: str
    json_schema: str


class AsyncStream(AsyncIterator[str]):
    """Text as it is made: iterate over the deltas, or await `text()`.

    Attributes:
        finish_reason: `stop`, `length` or `tool_calls` once the stream has ended.
        tool_calls: that the model asks for, once the stream has ended.
        logprobs: of the tokens so far, where they were asked for.
        usage: tokens and seconds once the stream has ended.
        replica: address of the replica that answers, once it does.
    """

    def __init__(self, start: Callable[[AsyncStream], AsyncGenerator[str, None]]) -> None:
        self.finish_reason: str | None = None
        self.usage: inference_pb2.Usage | None = None
        self.logprobs: list[inference_pb2.TokenLogprob] = []
        self.tool_calls: list[inference_pb2.ToolCall] = []
        self.replica: str | None = None
        self._deltas = start(self)

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> str:
        return await anext(self._deltas)

    async def text(self) -> str:
        """All that is left, in one piece."""
        return "".join([delta async for delta in self])

    async def aclose(self) -> None:
        """Stop; the replica's slot is free within one decode step."""
        await self._deltas.aclose()

    def _take(self, message: _Delta) -> None:
        self.logprobs.extend(message.logprobs)
        if message.finish_reason:
            name = inference_pb2.FinishReason.Name(message.finish_reason)
            self.finish_reason = name.removeprefix("FINISH_REASON_").lower()
        if message.HasField("usage"):
            self.usage = message.usage
        if isinstance(message, inference_pb2.ChatResponse):
            self.tool_calls.extend(message.tool_calls)


class AsyncEndpoint:
    """A served model by name; from `AsyncClient.endpoint`."""

    def __init__(self, name: str, connection: Connection) -> None:
        self.name = name
        self._connection = connection
        self._replicas = Replicas(name, self._look_up, connection.settings)

    def generate(
        self,
        prompt: str,
        *,
        adapter: str = "",
        timeout: float = GENERATE_SECONDS,
        **sampling: Unpack[Sampling],
    ) -> AsyncStream:
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
        request = _request(
            inference_pb2.GenerateRequest,
            prompt=prompt,
            sampling=_sampling(sampling),
            adapter=adapter,
        )

        def call(replica: Replica) -> Any:
            stub = inference_pb2_grpc.InferenceServiceStub(replica.channel)
            return stub.Generate(request, timeout=timeout)

        return AsyncStream(lambda stream: self._stream(stream, call))

    def chat(
        self,
        messages: Messages,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        adapter: str = "",
        timeout: float = GENERATE_SECONDS,
        **sampling: Unpack[Sampling],
    ) -> AsyncStream:
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
        request = _request(
            inference_pb2.ChatRequest,
            messages=_messages(messages),
            sampling=_sampling(sampling),
            tools=json.dumps(list(tools)) if tools else None,
            adapter=adapter,
        )

        def call(replica: Replica) -> Any:
            stub = inference_pb2_grpc.InferenceServiceStub(replica.channel)
            return stub.Chat(request, timeout=timeout)

        return AsyncStream(lambda stream: self._stream(stream, call))

    async def score(self, golden: str = "") -> inference_pb2.ScoreResponse:
        """How far one live replica is from golden logits.

        Args:
            golden: digest of the report; default: the one that the endpoint's
                spec names, else the one that its model carries.

        Raises:
            FailedPrecondition: the model carries none.
        """
        digest = golden or await self._golden()
        request = inference_pb2.ScoreRequest(golden=digest)
        return await self._unary(
            lambda replica: inference_pb2_grpc.InferenceServiceStub(replica.channel).Score(request)
        )

    async def embed(
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
        request = _request(
            inference_pb2.EmbedRequest, texts=list(texts), adapter=adapter, normalize=normalize
        )
        return await self._unary(
            lambda replica: inference_pb2_grpc.InferenceServiceStub(replica.channel).Embed(
                request, timeout=GENERATE_SECONDS
            )
        )

    async def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: any.
            add_special: add BOS where the model asks for it.
            parse_special: read special tokens that are written out.
        """
        request = _request(
            inference_pb2.TokenizeRequest,
            text=text,
            add_special=add_special,
            parse_special=parse_special,
        )
        answer = await self._unary(
            lambda replica: inference_pb2_grpc.InferenceServiceStub(replica.channel).Tokenize(
                request
            )
        )
        return list(answer.tokens)

    async def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids.

        Args:
            tokens: ids.
            special: write special tokens out.

        Raises:
            InvalidArgument: there is no such token.
        """
        request = _request(inference_pb2.DetokenizeRequest, tokens=tokens, special=special)
        answer = await self._unary(
            lambda replica: inference_pb2_grpc.InferenceServiceStub(replica.channel).Detokenize(
                request
            )
        )
        return answer.text

    async def model(self) -> inference_pb2.GetModelResponse:
        """What a replica serves: digest, quant type, context, template."""
        request = inference_pb2.GetModelRequest()
        return await self._unary(
            lambda replica: inference_pb2_grpc.InferenceServiceStub(replica.channel).GetModel(
                request
            )
        )

    async def close(self) -> None:
        """Close the channels to the replicas."""
        await self._replicas.close()

    async def _stream(
        self, stream: AsyncStream, start: Callable[[Replica], Any]
    ) -> AsyncGenerator[str, None]:
        tried: set[str] = set()
        full: ResourceExhausted | None = None
        while True:
            begun = False
            async with self._replicas.one(without=tried, instead=full) as replica:
                call = start(replica)
                try:
                    with rpc.translated():
                        async for message in call:
                            begun, stream.replica = True, replica.address
                            stream._take(message)
                            if message.delta:
                                yield message.delta
                    return
                except Unavailable as error:
                    self._replicas.shun(replica)
                    tried.add(replica.address)
                    if begun:  # half an answer cannot be taken back
                        raise Unavailable(
                            f"replica {replica.address} of endpoint {self.name} broke off in the "
                            f"middle of the answer ({error.message}); ask again",
                            reason=error.reason,
                        ) from error
                except ResourceExhausted as error:
                    # Its queue is full of others' requests; another one's may not be.
                    tried.add(replica.address)
                    full = error
                    if begun:
                        raise
                finally:
                    call.cancel()

    async def _unary(self, call: Callable[[Replica], Awaitable[_Answer]]) -> _Answer:
        tried: set[str] = set()
        while True:
            async with self._replicas.one(without=tried) as replica:
                try:
                    with rpc.translated():
                        return await call(replica)
                except Unavailable:
                    self._replicas.shun(replica)
                    tried.add(replica.address)

    async def _look_up(self) -> pb.Endpoint:
        stub = stubs.EndpointServiceStub(self._connection.channel)
        with rpc.translated():
            return (await stub.GetEndpoint(pb.GetEndpointRequest(name=self.name))).endpoint

    async def _golden(self) -> str:
        spec = (await self._look_up()).spec
        if spec.golden:
            return spec.golden
        stub = stubs.ArtifactServiceStub(self._connection.channel)
        with rpc.translated():
            artifact = (await stub.GetArtifact(pb.GetArtifactRequest(ref=spec.model))).artifact
        if not artifact.golden:
            raise FailedPrecondition(
                f"{spec.model}, which endpoint {self.name} serves, carries no golden logits; "
                "name a report of a training or a merge"
            )
        return artifact.golden


def _request(kind: type[_Request], **fields: Any) -> _Request:
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:  # lone surrogates too: they are no text
        raise InvalidArgument(f"{kind.__name__}: {error}") from None


def _sampling(sampling: Sampling) -> inference_pb2.SamplingParams:
    try:
        return inference_pb2.SamplingParams(**sampling)
    except (TypeError, ValueError) as error:
        raise InvalidArgument.field("sampling", str(error)) from None


def _messages(messages: Messages) -> list[inference_pb2.Message]:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    result = []
    for index, message in enumerate(messages):
        if isinstance(message, inference_pb2.Message):
            result.append(message)
            continue
        try:
            calls = message.get("tool_calls")
            # An assistant that calls tools may say nothing else.
            content = (message.get("content") or "") if calls else message["content"]
            made = inference_pb2.Message(role=message["role"], content=content)
            if calls:
                made.tool_calls = json.dumps(calls)
            for name in ("tool_call_id", "name"):
                if message.get(name):
                    setattr(made, name, message[name])
            result.append(made)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidArgument.field(
                f"messages[{index}]", f"expected texts 'role' and 'content': {error}"
            ) from None
    return result
