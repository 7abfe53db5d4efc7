"""The Alpaca row: instruction, input, output, optional system.

Responsibility: tell rows that can be used from rows that cannot, and say why
not. Does not know files, templates or tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

FORMAT = "alpaca"
FIELDS = ("instruction", "input", "output", "system")
_REQUIRED = ("instruction", "output")


@dataclass(frozen=True, slots=True)
class Example:
    """One row as a conversation of one turn; texts as they came."""

    instruction: str
    output: str
    input: str = ""
    system: str = ""

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The messages before the answer."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        user = {"role": "user", "content": self.instruction}
        if self.input:
            user["input"] = self.input
        return [*messages, user]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The whole conversation."""
        return [*self.prompt, {"role": "assistant", "content": self.output}]


def parse(value: Any) -> Example | str:
    """The example in a decoded row, or what is wrong with it, in words."""
    if not isinstance(value, dict):
        return f"expected an object, found {_name(value)}"
    problem = next(_problems(value), None)
    if problem is not None:
        return problem
    fields = {key: value[key] for key in FIELDS if value.get(key) is not None}
    return Example(**fields)


def unused(value: Any) -> list[str]:
    """Fields with content that this format does not read."""
    if not isinstance(value, dict):
        return []
    return [str(key) for key, content in value.items() if key not in FIELDS and content]


def _problems(value: dict[str, Any]) -> Iterator[str]:
    for key in _REQUIRED:
        if key not in value:
            yield f"field {key!r} is missing"
    for key in FIELDS:
        content = value.get(key)
        if content is None:
            if key in _REQUIRED:
                yield f"field {key!r} is null, expected text"
        elif not isinstance(content, str):
            yield f"field {key!r} is {_name(content)}, expected text"
        else:
            try:
                content.encode()
            except UnicodeEncodeError:
                yield f"field {key!r} holds half of a surrogate pair, which is no character"
    for key in _REQUIRED:
        if not value[key].strip():
            yield f"field {key!r} is empty"


def _name(value: Any) -> str:
    names = {dict: "an object", list: "an array", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "text")
