"""Calls of tools that a model writes into its answer.

Responsibility: tell calls from text in the formats that the templates of Qwen,
SmolLM and Hermes (`<tool_call>` around JSON) and of LLaMA 3 (the answer is JSON)
ask for. What is neither stays text. Does not know templates or how tools are run.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from arriero.errors import InvalidArgument

__all__ = ["ToolCall", "ToolCallParser", "names_of", "read_calls", "read_tools"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
# LLaMA 3 writes it before JSON; a control token, which most files do not show as text.
_PYTHON = "<|python_tag|>"
_MAX_TOOLS = 128


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call.

    Attributes:
        name: of the tool.
        arguments: a JSON object, as text.
        id: what the tool's answer refers to.
    """

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


class ToolCallParser:
    """Takes an answer as it comes and holds back what may be a call.

    Args:
        names: of the tools that exist; what names no tool is text.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._shown = False
        self._held = ""

    def push(self, text: str) -> str:
        """Take more text; return what is surely no call."""
        self._held += text
        if not self._shown:
            begun = self._held.lstrip()
            if not begun or begun[0] == "{" or _begins(begun, (_PYTHON, _OPEN)):
                return ""
        at = self._held.find(_OPEN)
        if at < 0:
            at = len(self._held) - _suffix(self._held, _OPEN)
        ready, self._held = self._held[:at], self._held[at:]
        self._shown = self._shown or bool(ready)
        return ready

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The text and the calls in what was held back."""
        held, self._held = self._held, ""
        begun = held.strip()
        if begun.startswith(_OPEN):
            return self._tagged(held)
        if not self._shown and (calls := self._bare(begun.removeprefix(_PYTHON))):
            return "", calls
        return held, []

    def _tagged(self, held: str) -> tuple[str, list[ToolCall]]:
        calls, text = list[ToolCall](), ""
        for part in held.split(_OPEN)[1:]:
            inside, closed, after = part.partition(_CLOSE)
            found = self._calls(inside)
            if found is None:
                text += _OPEN + part
                continue
            calls += found
            # Most models leave the line between two calls empty.
            text += after if closed and after.strip() else ""
        return text, calls

    def _bare(self, text: str) -> list[ToolCall] | None:
        """LLaMA 3: one JSON object, or several with semicolons between them."""
        if not text.lstrip().startswith("{"):
            return None
        decoder, calls, rest = json.JSONDecoder(), list[ToolCall](), text.strip()
        while rest:
            try:
                value, end = decoder.raw_decode(rest)
            except (ValueError, RecursionError):
                return None
            call = self._call(value)
            if call is None:
                return None
            calls.append(call)
            rest = rest[end:].lstrip().removeprefix(";").lstrip()
        return calls

    def _calls(self, text: str) -> list[ToolCall] | None:
        """What is between two tags: an object, or a list of them (SmolLM)."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return None
        calls = [self._call(item) for item in (value if isinstance(value, list) else [value])]
        return None if None in calls else [call for call in calls if call is not None]

    def _call(self, value: Any) -> ToolCall | None:
        name = value.get("name") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in self._names:
            return None
        # `parameters` is LLaMA's word.
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return None
        if not isinstance(arguments, dict):
            return None
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def read_tools(text: str, *, field: str = "tools") -> list[dict[str, Any]]:
    """Definitions of tools as OpenAI's API and the templates have them.

    Raises:
        InvalidArgument: not a JSON list of functions with names.
    """
    tools = _list(text, field)
    if len(tools) > _MAX_TOOLS:
        raise InvalidArgument.field(field, f"{len(tools)} tools; at most {_MAX_TOOLS} are taken")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name or tool.get("type") != "function":
            raise InvalidArgument.field(
                f"{field}[{index}]", "expected an object with type 'function' and function.name"
            )
    return tools


def names_of(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of tools that `read_tools` accepts."""
    return [tool["function"]["name"] for tool in tools]


def read_calls(text: str, *, field: str = "tool_calls") -> list[dict[str, Any]]:
    """Calls in an earlier answer, with arguments as templates take them: objects, not text.

    Raises:
        InvalidArgument: not a JSON list of calls.
    """
    calls = _list(text, field)
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidArgument.field(f"{field}[{index}]", "expected an object with function")
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"] or "{}")
            except (ValueError, RecursionError):
                raise InvalidArgument.field(
                    f"{field}[{index}].function.arguments", "is not JSON"
                ) from None
    return calls


def _list(text: str, field: str) -> list[Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidArgument.field(field, "is not JSON") from None
    if not isinstance(value, list):
        raise InvalidArgument.field(field, "expected a JSON list")
    return value


def _begins(text: str, words: Sequence[str]) -> bool:
    """Whether a text is, or may become, one that begins with a word."""
    return any(word.startswith(text) or text.startswith(word) for word in words)


def _suffix(text: str, word: str) -> int:
    """Length of the longest end of a text that begins the word."""
    longest = min(len(word) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)
