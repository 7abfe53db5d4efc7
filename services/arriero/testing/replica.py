"""A replica that says the same words to everybody, behind real gRPC.

Responsibility: the inference service's promises, and ways to break them. Does
not know any model.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from arriero.errors import NotFound, ResourceExhausted, Unavailable
from arriero.v1 import inference_pb2, inference_pb2_grpc

__all__ = ["WORDS", "FakeInference"]

WORDS = ("A ", "driver ", "of ", "pack ", "llamas.")


class FakeInference(inference_pb2_grpc.InferenceServiceServicer):
    """A replica that always says the same words.

    Attributes:
        words: the answer, a message each.
        requests: what was asked, oldest first.
        calls: tools that every chat which has some calls at its end.
        away: answer UNAVAILABLE before the first message.
        full: answer RESOURCE_EXHAUSTED before the first message.
        breaks_after: answer UNAVAILABLE after that many messages.
        hold: set it (to an unset event) to wait before the second message.
        cancelled: how many streams ended early.
        adapters: loaded, by name.
    """

    def __init__(self, words: Sequence[str] = WORDS) -> None:
        self.words = list(words)
        self.requests: list[Any] = []
        self.calls: list[inference_pb2.ToolCall] = []
        self.away = self.full = False
        self.breaks_after: int | None = None
        self.hold: asyncio.Event | None = None
        self.cancelled = 0
        self.adapters: dict[str, inference_pb2.AdapterSpec] = {}

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """The words."""
        async for fields in self._answer(request):
            yield inference_pb2.GenerateResponse(**fields)

    async def Chat(
        self, request: inference_pb2.ChatRequest, context: Any
    ) -> AsyncIterator[inference_pb2.ChatResponse]:
        """The words."""
        async for fields in self._answer(request):
            if "usage" in fields and request.tools and self.calls:
                fields["finish_reason"] = inference_pb2.FINISH_REASON_TOOL_CALLS
                fields["tool_calls"] = self.calls
            yield inference_pb2.ChatResponse(**fields)

    async def LoadAdapter(
        self, request: inference_pb2.LoadAdapterRequest, context: Any
    ) -> inference_pb2.LoadAdapterResponse:
        """Takes any."""
        self._note(request)
        self.adapters[request.adapter.name] = request.adapter
        return inference_pb2.LoadAdapterResponse()

    async def UnloadAdapter(
        self, request: inference_pb2.UnloadAdapterRequest, context: Any
    ) -> inference_pb2.UnloadAdapterResponse:
        """By name."""
        self._note(request)
        if self.adapters.pop(request.name, None) is None and not request.allow_missing:
            raise NotFound(f"no adapter named {request.name!r} is loaded")
        return inference_pb2.UnloadAdapterResponse()

    async def ListAdapters(
        self, request: inference_pb2.ListAdaptersRequest, context: Any
    ) -> inference_pb2.ListAdaptersResponse:
        """Those that were loaded."""
        self._note(request)
        return inference_pb2.ListAdaptersResponse(adapters=self.adapters.values())

    async def Score(
        self, request: inference_pb2.ScoreRequest, context: Any
    ) -> inference_pb2.ScoreResponse:
        """Near."""
        self._note(request)
        return inference_pb2.ScoreResponse(kl_divergence=0.01, top1_agreement=0.99, tokens=256)

    async def Embed(
        self, request: inference_pb2.EmbedRequest, context: Any
    ) -> inference_pb2.EmbedResponse:
        """The length of each text, and a one."""
        self._note(request)
        return inference_pb2.EmbedResponse(
            embeddings=[inference_pb2.Embedding(values=[len(t), 1.0]) for t in request.texts],
            usage=inference_pb2.Usage(prompt_tokens=sum(map(len, request.texts))),
            pooling="mean",
        )

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Any
    ) -> inference_pb2.TokenizeResponse:
        """BOS is 1, a word is its length."""
        self._note(request)
        bos = [1] if request.add_special else []
        return inference_pb2.TokenizeResponse(tokens=bos + [len(w) for w in request.text.split()])

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Any
    ) -> inference_pb2.DetokenizeResponse:
        """Words of as many llamas."""
        self._note(request)
        return inference_pb2.DetokenizeResponse(text=" ".join("l" * n for n in request.tokens))

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: Any
    ) -> inference_pb2.GetModelResponse:
        """A small one."""
        self._note(request)
        return inference_pb2.GetModelResponse(name="fake", quant_type="Q8_0", context_length=64)

    def _note(self, request: Any) -> None:
        self.requests.append(request)
        if self.away:
            raise Unavailable("the fake replica is away")
        if self.full:
            raise ResourceExhausted("the fake replica is full")

    async def _answer(
        self, request: inference_pb2.GenerateRequest | inference_pb2.ChatRequest
    ) -> AsyncIterator[dict[str, Any]]:
        self._note(request)
        ended = False
        try:
            for index, word in enumerate(self.words):
                if index == self.breaks_after:
                    raise Unavailable("the fake replica went away")
                if index and self.hold is not None:
                    await self.hold.wait()
                yield {"delta": word}
            usage = inference_pb2.Usage(prompt_tokens=3, completion_tokens=len(self.words))
            ended = True
            yield {"finish_reason": inference_pb2.FINISH_REASON_STOP, "usage": usage}
        finally:
            self.cancelled += not ended
