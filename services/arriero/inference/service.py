"""`InferenceService`: proto in, engine commands out, and back.

Responsibility: translate and check requests, render chats with the model's own
template. Does not know how tokens are made.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

import grpc.aio
import numpy as np
from google.protobuf import struct_pb2

from arriero import prompts
from arriero.errors import ArrieroError, FailedPrecondition, InvalidArgument, NotFound
from arriero.inference.files import adapter_file
from arriero.inference.frontend import Frontend
from arriero.llama.sampler import Sampling
from arriero.metrics import ReplicaMetrics
from arriero.operations.defaults import with_defaults
from arriero.prompts.tool_calls import ToolCallParser, names_of, read_calls, read_tools
from arriero.replica import AdapterSettings
from arriero.store import Artifact, Store
from arriero.v1 import inference_pb2 as pb
from arriero.v1 import inference_pb2_grpc

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
# Of SamplingParams: what is no sampler's.
_TEXT_FIELDS = frozenset({"max_tokens", "stop", "stop_token_ids", "json_schema"})
_ROLES = ("system", "user", "assistant", "tool")
_MAX_STOP = 16
# As OpenAI's API takes.
_MAX_TEXTS = 2048


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """One replica's API.

    Args:
        frontend: runs the engine.
        store: where golden logits are.
        artifact: what is served.
        name: the endpoint's.
        page: counts what is asked and answered.
    """

    def __init__(
        self,
        frontend: Frontend,
        store: Store,
        artifact: Artifact,
        name: str,
        page: ReplicaMetrics,
    ) -> None:
        self._page = page
        self._frontend = frontend
        self._store = store
        self._artifact = artifact
        self._name = name
        # By their source.
        self._templates: dict[str, prompts.Template] = {}

    async def Generate(  # type: ignore[override]
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Continue a prompt."""
        stream = self._stream(
            request.prompt, request.sampling, add_special=True, adapter=request.adapter
        )
        # Closed with this call, not when it is collected: a caller that left frees its slot.
        async with contextlib.aclosing(stream):
            async for event in stream:
                yield pb.GenerateResponse(**_response(event))

    async def Chat(  # type: ignore[override]
        self, request: pb.ChatRequest, context: Context
    ) -> AsyncIterator[pb.ChatResponse]:
        """Answer messages."""
        messages = _messages(request)
        tools = read_tools(request.tools) if request.HasField("tools") else []
        template = await asyncio.to_thread(self._template, request.adapter)
        model = self._frontend.model
        # In a thread: a template is somebody else's program, and others' streams go on.
        prompt = await asyncio.to_thread(
            template.render,
            messages,
            bos_token=model.get("bos", ""),
            eos_token=model.get("eos", ""),
            add_generation_prompt=True,
            tools=tools,
        )
        sampling = pb.SamplingParams()
        sampling.CopyFrom(request.sampling)
        sampling.stop.extend(template.stop)
        parser = ToolCallParser(names_of(tools)) if tools else None
        stream = self._stream(
            prompt, sampling, add_special=not template.writes_bos, adapter=request.adapter
        )
        async with contextlib.aclosing(stream):
            async for event in stream:
                fields = _response(event)
                if parser is not None:
                    _part_calls(parser, fields)
                if fields["delta"] or fields["logprobs"] or "usage" in fields:
                    yield pb.ChatResponse(**fields)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:  # type: ignore[override]
        """Compare this replica with golden logits."""
        golden = await asyncio.to_thread(self._store.get, request.golden)
        path = await asyncio.to_thread(lambda: golden.path)  # may have to be fetched
        event = await self._frontend.ask(op="score", golden=str(path), adapter=request.adapter)
        return pb.ScoreResponse(**event["score"])

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:  # type: ignore[override]
        """A vector for each text."""
        if not 1 <= len(request.texts) <= _MAX_TEXTS:
            raise InvalidArgument.field(
                "texts", f"holds {len(request.texts)} texts; expected 1 to {_MAX_TEXTS}"
            )
        event = await self._frontend.ask(
            op="embed",
            texts=list(request.texts),
            adapter=request.adapter,
            normalize=with_defaults(request).normalize,
        )
        return pb.EmbedResponse(
            embeddings=[
                pb.Embedding(values=np.frombuffer(base64.b64decode(text), np.float32))
                for text in event["vectors"]
            ],
            usage=pb.Usage(prompt_tokens=event["tokens"], prompt_seconds=event["seconds"]),
            pooling=event["pooling"],
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # type: ignore[override]
        """Token ids of a text."""
        event = await self._frontend.ask(
            op="tokenize",
            text=request.text,
            add_special=request.add_special,
            parse_special=request.parse_special,
        )
        return pb.TokenizeResponse(tokens=event["tokens"])

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        """The text of token ids."""
        event = await self._frontend.ask(
            op="detokenize", tokens=list(request.tokens), special=request.special
        )
        return pb.DetokenizeResponse(text=event["text"])

    async def LoadAdapter(
        self, request: pb.LoadAdapterRequest, context: Context
    ) -> pb.LoadAdapterResponse:
        """Load a LoRA adapter."""
        spec = with_defaults(request.adapter)
        AdapterSettings(spec.name, spec.adapter, spec.scale).check("adapter")
        file = await asyncio.to_thread(
            adapter_file, self._store, spec.adapter, spec.name, spec.scale
        )
        await self._frontend.load_adapter(file)
        return pb.LoadAdapterResponse()

    async def UnloadAdapter(
        self, request: pb.UnloadAdapterRequest, context: Context
    ) -> pb.UnloadAdapterResponse:
        """Take an adapter away."""
        try:
            await self._frontend.unload_adapter(request.name)
        except NotFound:
            if not request.allow_missing:
                raise
        return pb.UnloadAdapterResponse()

    async def ListAdapters(
        self, request: pb.ListAdaptersRequest, context: Context
    ) -> pb.ListAdaptersResponse:
        """What is loaded."""
        files = sorted(self._frontend.adapters.values(), key=lambda file: file.name)
        return pb.ListAdaptersResponse(
            adapters=[
                pb.AdapterSpec(adapter=file.digest, name=file.name, scale=file.scale)
                for file in files
            ]
        )

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:  # type: ignore[override]
        """What is served."""
        model = self._frontend.model
        if not model:
            # Asking before the model is loaded is answered as `ask` would.
            await self._frontend.ask(op="tokenize", text="", add_special=False, parse_special=False)
        metadata = struct_pb2.Struct()
        metadata.update(model["metadata"])
        return pb.GetModelResponse(
            digest=self._artifact.digest,
            name=self._name,
            quant_type=self._artifact.manifest.labels.get("quant_type", ""),
            context_length=model["context_length"],
            vocab_size=model["vocab_size"],
            template=model["chat_template"] or "",
            metadata=metadata,
            memory_bytes=_memory(self._frontend.pid),
        )

    async def _stream(
        self, prompt: str, params: pb.SamplingParams, *, add_special: bool, adapter: str
    ) -> AsyncGenerator[dict[str, Any], None]:
        asked = last = time.monotonic()
        outcome = "cancelled"
        begun = False
        try:
            sampling = _sampling(params)
            requests = self._frontend.request(
                op="generate",
                prompt=prompt,
                sampling=sampling,
                add_special=add_special,
                adapter=adapter,
            )
        except ArrieroError as error:
            self._page.failed(error.code.lower())
            raise
        try:
            async for event in requests:
                # When it came, and not when a slow reader had room for it.
                at = event["at"]
                if event.get("delta") or event.get("logprobs"):
                    (self._page.gap if begun else self._page.first)(at - last)
                    begun, last = True, at
                if event.get("done"):
                    outcome = ""
                    self._page.ended(at - asked, event["finish_reason"].lower())
                yield event
        except ArrieroError as error:
            outcome = error.code.lower()
            raise
        finally:
            if outcome:
                self._page.failed(outcome)
            # A caller that leaves cancels its stream in the engine, now and not at collection.
            await requests.aclose()  # type: ignore[attr-defined]

    def _template(self, adapter: str) -> prompts.Template:
        """The template of an adapter, else of the model; each is read once."""
        model = self._frontend.model
        stored = self._frontend.template_of(adapter)
        stored = stored or model.get("metadata", {}).get("arriero.template", "")
        key = stored or model.get("chat_template") or ""
        if key not in self._templates:
            self._templates[key] = self._read_template(model, stored)
        return self._templates[key]

    def _read_template(self, model: Mapping[str, Any], stored: str) -> prompts.Template:
        if stored:
            return prompts.Template.from_json(stored)
        jinja = model.get("chat_template")
        if not jinja:
            raise FailedPrecondition(
                f"{self._name} has no prompt template, so it cannot chat; use Generate, or "
                "quantize a model that was trained with one"
            )
        return prompts.load(prompts.MODEL, chat_template=jinja).bind(
            bos_token=model["bos"], eos_token=model["eos"]
        )


def _sampling(params: pb.SamplingParams) -> dict[str, Any]:
    """Checked values for the engine; what is not set keeps llama.cpp's default."""
    given: dict[str, Any] = {
        known.name: _plain(value)
        for known, value in params.ListFields()
        if known.name not in _TEXT_FIELDS
    }
    Sampling(**given).check()
    if params.HasField("json_schema"):
        if params.grammar:
            raise InvalidArgument.field("sampling.json_schema", "and grammar exclude each other")
        given["json_schema"] = params.json_schema
    given["stop_token_ids"] = list(params.stop_token_ids)
    if params.HasField("max_tokens"):
        if params.max_tokens < 0:
            raise InvalidArgument.field(
                "sampling.max_tokens", f"{params.max_tokens} is negative; expected 0 or more"
            )
        given["max_tokens"] = params.max_tokens
    stop = [text for text in params.stop if text]
    if len(stop) > _MAX_STOP:
        raise InvalidArgument.field(
            "sampling.stop", f"{len(stop)} stop strings; at most {_MAX_STOP} are taken"
        )
    given["stop"] = stop
    return given


def _plain(value: Any) -> Any:
    """Protobuf's lists and maps as JSON has them."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    return value


def _messages(request: pb.ChatRequest) -> list[dict[str, Any]]:
    if not request.messages:
        raise InvalidArgument.field("messages", "is empty; expected at least one message")
    for index, message in enumerate(request.messages):
        if message.role not in _ROLES:
            raise InvalidArgument.field(
                f"messages[{index}].role",
                f"{message.role!r} is unknown; expected {', '.join(_ROLES)}",
            )
    return [_message(m, f"messages[{i}]") for i, m in enumerate(request.messages)]


def _message(message: pb.Message, field: str) -> dict[str, Any]:
    """As templates take it: what is not set is not there, since they ask for that."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.HasField("tool_calls"):
        if message.role != "assistant":
            raise InvalidArgument.field(f"{field}.tool_calls", "only the assistant calls tools")
        found["tool_calls"] = read_calls(message.tool_calls, field=f"{field}.tool_calls")
    for name in ("tool_call_id", "name"):
        if value := getattr(message, name):
            found[name] = value
    return found


def _part_calls(parser: ToolCallParser, fields: dict[str, Any]) -> None:
    """Move what calls tools out of a response's text."""
    fields["delta"] = parser.push(fields["delta"])
    if "usage" not in fields:
        return
    rest, calls = parser.finish()
    fields["delta"] += rest
    fields["tool_calls"] = [
        pb.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in calls
    ]
    if calls:
        fields["finish_reason"] = pb.FINISH_REASON_TOOL_CALLS


def _response(event: dict[str, Any]) -> dict[str, Any]:
    """Fields that GenerateResponse and ChatResponse share."""
    fields: dict[str, Any] = {
        "delta": event.get("delta", ""),
        "logprobs": [_logprob(*told) for told in event.get("logprobs", ())],
    }
    if event.get("done"):
        fields["finish_reason"] = pb.FinishReason.Value(f"FINISH_REASON_{event['finish_reason']}")
        fields["usage"] = pb.Usage(**event["usage"])
    return fields


def _logprob(token: int, piece: str, logprob: float, top: Sequence[Any] = ()) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token=token,
        piece=piece.encode("latin-1"),
        logprob=logprob,
        top=[_logprob(*item) for item in top],
    )


def _memory(pid: int | None) -> int:
    """Resident bytes of the engine, mapped weights included."""
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss) if pid else 0
    except psutil.Error:
        return 0
