"""What an OpenAI client asks for, read and checked.

Responsibility: JSON bodies of chat and text completions to what an endpoint
takes; parameters that nothing here obeys are refused by name instead of being
ignored. Does not know HTTP or how an answer looks.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from arriero.client import Sampling
from arriero.errors import InvalidArgument

__all__ = [
    "Ask",
    "EmbeddingAsk",
    "read_chat",
    "read_completion",
    "read_embedding",
    "split_model",
]

Body = Mapping[str, Any]

# Carry nothing that could change the text.
_HARMLESS = frozenset(
    {
        "metadata",
        "prompt_cache_key",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
# What a client may send as long as it asks for nothing: parameter -> such values.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "suffix": ("",),
}
_COMMON = frozenset(
    {"model", "n", "stream", "stream_options", "max_tokens", "stop", "logit_bias", "logprobs"}
    | {"response_format", "ignore_eos", "stop_token_ids", "grammar", "dry_sequence_breakers"}
)
# Parameters that go on under llama.cpp's names: OpenAI's own, and those that
# llama.cpp's and vLLM's servers take beside them.
_NUMBERS: Mapping[str, type] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "typical_p": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repeat_penalty": float,
    "repeat_last_n": int,
    "mirostat": int,
    "mirostat_tau": float,
    "mirostat_eta": float,
    "xtc_probability": float,
    "xtc_threshold": float,
    "dry_multiplier": float,
    "dry_base": float,
    "dry_allowed_length": int,
    "dry_penalty_last_n": int,
    "seed": int,
}
_CHAT = frozenset(
    {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice"}
    | {"parallel_tool_calls"}
)
_SEEDS = 2**32
_MAX_CHOICES = 16
_MAX_PROMPTS = 64
_MAX_TEXTS = 2048


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Attributes:
        model: as the client named it.
        endpoint: its name.
        adapter: of that endpoint; empty: the model alone.
        stream: as server-sent events.
        usage: send a last event with the tokens used.
        sampling: what was given; the rest is the replica's default.
        messages: of a chat; empty for a text completion.
        tools: that a chat may call.
        parallel: it may call several of them at once.
        prompts: of a text completion.
        n: choices for the chat, or for each prompt.
    """

    model: str
    endpoint: str
    adapter: str
    stream: bool
    usage: bool
    sampling: Sampling
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    parallel: bool = True
    prompts: tuple[str, ...] = ()
    n: int = 1

    def samplings(self) -> list[Sampling]:
        """One for each of the `n` choices; a seed makes them differ, and repeat."""
        seed = self.sampling.get("seed")
        if seed is None:
            return [self.sampling] * self.n
        return [{**self.sampling, "seed": (seed + i) % _SEEDS} for i in range(self.n)]


@dataclass(frozen=True, slots=True)
class EmbeddingAsk:
    """A request for vectors.

    Attributes:
        model: as the client named it.
        endpoint: its name.
        adapter: of that endpoint; empty: the model alone.
        texts: one vector each.
        base64: float32 in base64 instead of numbers.
    """

    model: str
    endpoint: str
    adapter: str
    texts: tuple[str, ...]
    base64: bool


def read_embedding(data: bytes) -> EmbeddingAsk:
    """A body of `/v1/embeddings`.

    Raises:
        InvalidArgument: as `read_chat`.
    """
    body = _object(data)
    for name, value in body.items():
        if name not in {"model", "input", "encoding_format", "user"} and value is not None:
            raise InvalidArgument.field(name, "is not a parameter that this server obeys")
    given = body.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
        raise InvalidArgument.field("input", "expected a text or a list of texts (no token ids)")
    if not 1 <= len(texts) <= _MAX_TEXTS:
        raise InvalidArgument.field("input", f"{len(texts)} texts; expected 1 to {_MAX_TEXTS}")
    wanted = body.get("encoding_format") or "float"
    if wanted not in ("float", "base64"):
        raise InvalidArgument.field("encoding_format", f"{wanted!r}; expected float or base64")
    model = _model(body)
    return EmbeddingAsk(model, *split_model(model), tuple(texts), wanted == "base64")


def read_chat(data: bytes) -> Ask:
    """A body of `/v1/chat/completions`.

    Raises:
        InvalidArgument: not JSON, a field that is missing, wrong or not obeyed here.
    """
    body = _body(data, own=_CHAT)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidArgument.field("messages", "is missing or empty; expected a list of messages")
    logprobs = None
    if _flag(body, "logprobs"):
        logprobs = _number("top_logprobs", body.get("top_logprobs") or 0, int)
    elif body.get("top_logprobs"):
        raise InvalidArgument.field("top_logprobs", "needs logprobs: true")
    return _ask(
        body,
        logprobs,
        messages=tuple(_message(m, f"messages[{i}]") for i, m in enumerate(messages)),
        tools=_tools(body),
        parallel=body.get("parallel_tool_calls") is None or _flag(body, "parallel_tool_calls"),
    )


def read_completion(data: bytes) -> Ask:
    """A body of `/v1/completions`.

    Raises:
        InvalidArgument: as `read_chat`.
    """
    body = _body(data, own=frozenset({"prompt"}))
    prompt = body.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
        raise InvalidArgument.field("prompt", "expected a text or a list of texts (no token ids)")
    if not 1 <= len(prompts) <= _MAX_PROMPTS:
        raise InvalidArgument.field("prompt", f"{len(prompts)} texts; expected 1 to {_MAX_PROMPTS}")
    logprobs = body.get("logprobs")
    if logprobs is not None:
        logprobs = _number("logprobs", logprobs, int)
    return _ask(body, logprobs, prompts=tuple(prompts))


def _ask(body: Body, logprobs: int | None, **what: Any) -> Ask:
    model = _model(body)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise InvalidArgument.field("stream_options", "expected an object")
    for name, value in options.items():
        # What pads events against eavesdroppers does not change what they say.
        if name not in ("include_usage", "include_obfuscation") and value:
            raise InvalidArgument.field(f"stream_options.{name}", "is not supported; leave it out")
    endpoint, adapter = split_model(model)
    return Ask(
        model=model,
        endpoint=endpoint,
        adapter=adapter,
        stream=_flag(body, "stream"),
        usage=_flag(options, "include_usage"),
        sampling=_sampling(body, logprobs),
        n=_choices(body, len(what.get("prompts", ()))),
        **what,
    )


def _model(body: Body) -> str:
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidArgument.field(
            "model", "is missing; expected the name of an endpoint, or endpoint:adapter"
        )
    return model


def split_model(model: str) -> tuple[str, str]:
    """Endpoint and adapter of `endpoint:adapter`; without adapter it is empty."""
    endpoint, _, adapter = model.partition(":")
    return endpoint, adapter


def _choices(body: Body, prompts: int) -> int:
    n = 1 if body.get("n") is None else _number("n", body["n"], int)
    if not 1 <= n <= _MAX_CHOICES or n * prompts > _MAX_PROMPTS:
        raise InvalidArgument.field(
            "n",
            f"{n} choices; expected 1 to {_MAX_CHOICES}, and at most {_MAX_PROMPTS} for all "
            "prompts together",
        )
    return int(n)


def _tools(body: Body) -> tuple[Mapping[str, Any], ...]:
    """The tools that may be called; the replica checks what they are."""
    tools, choice = body.get("tools") or [], body.get("tool_choice")
    if not isinstance(tools, list):
        raise InvalidArgument.field("tools", "expected a list")
    if choice not in (None, "none", "auto"):
        raise InvalidArgument.field(
            "tool_choice", "only 'auto' and 'none' are supported: the model decides"
        )
    return () if choice == "none" else tuple(tools)


def _object(data: bytes) -> Body:
    try:
        text = data.decode("utf-8-sig")
        body = json.loads(text)
        if "\\u" in text:  # half of a surrogate pair is no character, and goes into no message
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise InvalidArgument("the body is not JSON in UTF-8") from None
    if not isinstance(body, dict):
        raise InvalidArgument("the body is not a JSON object")
    return body


def _body(data: bytes, *, own: frozenset[str]) -> Body:
    body = _object(data)
    for name, value in body.items():
        if name in _COMMON or name in own or name in _NUMBERS or name in _HARMLESS:
            continue
        if name not in _NEUTRAL:
            near = difflib.get_close_matches(name, _COMMON | own | _NUMBERS.keys(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidArgument.field(name, f"is not a parameter of this API{hint}")
        if value is not None and value not in _NEUTRAL[name]:
            raise InvalidArgument.field(name, "is not supported by this server; leave it out")
    return body


def _message(message: Any, path: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidArgument.field(path, "expected an object with role and content")
    role = message.get("role")
    if role == "developer":  # OpenAI's newer word
        role = "system"
    if role not in ("system", "user", "assistant", "tool"):
        raise InvalidArgument.field(
            f"{path}.role", f"{role!r}; expected system, developer, user, assistant or tool"
        )
    found: dict[str, Any] = {"role": role}
    if calls := message.get("tool_calls"):
        found["tool_calls"] = calls
    for name in ("tool_call_id", "name"):
        value = message.get(name)
        if not isinstance(value, str | None):
            raise InvalidArgument.field(f"{path}.{name}", "expected a text")
        if value:
            found[name] = value
    content = message.get("content")
    if not (calls and content is None):
        found["content"] = _content(content, f"{path}.content")
    return found


def _content(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidArgument.field(path, "expected a text or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise InvalidArgument.field(f"{path}[{i}]", "only parts of type text are supported")
        if not isinstance(part.get("text"), str):
            raise InvalidArgument.field(f"{path}[{i}].text", "expected a text")
        texts.append(part["text"])
    return "".join(texts)


def _sampling(body: Body, logprobs: int | None) -> Sampling:
    sampling: dict[str, Any] = {} if logprobs is None else {"logprobs": logprobs}
    for name, kind in _NUMBERS.items():
        if body.get(name) is not None:
            sampling[name] = _number(name, body[name], kind)
    if "seed" in sampling:
        # Clients send any 64-bit number; llama.cpp takes 32 bits.
        sampling["seed"] %= _SEEDS
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            sampling["max_tokens"] = _number(name, body[name], int)
            break
    stop = body.get("stop")
    if stop is not None:
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise InvalidArgument.field("stop", "expected a text or a list of texts")
        sampling["stop"] = stops
    if body.get("logit_bias"):
        sampling["logit_bias"] = _biases(body["logit_bias"])
    if _flag(body, "ignore_eos"):
        sampling["ignore_eos"] = True
    if body.get("stop_token_ids"):
        ids = body["stop_token_ids"]
        if not isinstance(ids, list):
            raise InvalidArgument.field("stop_token_ids", "expected a list of token ids")
        sampling["stop_token_ids"] = [_number("stop_token_ids", i, int) for i in ids]
    if body.get("dry_sequence_breakers"):
        breakers = body["dry_sequence_breakers"]
        if not isinstance(breakers, list) or not all(isinstance(b, str) for b in breakers):
            raise InvalidArgument.field("dry_sequence_breakers", "expected a list of texts")
        sampling["dry_sequence_breakers"] = breakers
    _format(body, sampling)
    return cast(Sampling, sampling)


def _biases(biases: Any) -> dict[int, float]:
    if not isinstance(biases, dict):
        raise InvalidArgument.field("logit_bias", "expected an object of token ids and numbers")
    found = {}
    for token, bias in biases.items():
        if not (token.isascii() and token.isdigit() and int(token) < 2**31):
            raise InvalidArgument.field("logit_bias", f"{token!r} is no token id")
        value = _number("logit_bias", bias, float)
        # OpenAI's -100 stands for a ban.
        found[int(token)] = -math.inf if value <= -100 else value
    return found


def _format(body: Body, sampling: dict[str, Any]) -> None:
    """`response_format` (OpenAI's) and `grammar` (llama.cpp's) as what the engine takes."""
    grammar, wanted = body.get("grammar"), body.get("response_format")
    if grammar:
        if not isinstance(grammar, str):
            raise InvalidArgument.field("grammar", "expected GBNF as a text")
        sampling["grammar"] = grammar
    if wanted is None:
        return
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "json_object":
        schema: Any = {"type": "object"}
    elif kind == "json_schema":
        named = wanted.get("json_schema")
        schema = named.get("schema") if isinstance(named, dict) else None
        if not isinstance(schema, dict):
            raise InvalidArgument.field("response_format.json_schema.schema", "is missing")
    elif kind == "text":
        return
    else:
        raise InvalidArgument.field(
            "response_format.type", f"{kind!r}; expected text, json_object or json_schema"
        )
    if grammar:
        raise InvalidArgument.field("response_format", "and grammar exclude each other")
    sampling["json_schema"] = json.dumps(schema)


def _number(name: str, value: Any, kind: Callable[[Any], Any]) -> Any:
    wanted = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, wanted) or not math.isfinite(value):
        what = "a whole number" if kind is int else "a number"
        raise InvalidArgument.field(name, f"{value!r}; expected {what}")
    low, high = (-(2**63), 2**64) if name == "seed" else (-(2**31), 2**31)
    if kind is int and not low <= value < high:
        raise InvalidArgument.field(name, "is out of range")
    return kind(value)


def _flag(body: Body, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidArgument.field(name, f"{value!r}; expected true or false")
    return bool(value)
