"""What a row may look like: Alpaca, ShareGPT, messages, plain text.

Responsibility: turn a decoded row into an example, or say in words what is
wrong with it. Does not know files, templates or tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALPACA, SHAREGPT, MESSAGES, TEXT, AUTO = "alpaca", "sharegpt", "messages", "text", "auto"
# The fields of each format; the needed ones first.
FIELDS: Mapping[str, tuple[str, ...]] = {
    ALPACA: ("instruction", "output", "input", "system", "history"),
    SHAREGPT: ("conversations", "system"),
    MESSAGES: ("messages",),
    TEXT: ("text",),
}
_NEEDED: Mapping[str, tuple[str, ...]] = {
    ALPACA: ("instruction", "output"),
    SHAREGPT: ("conversations",),
    MESSAGES: ("messages",),
    TEXT: ("text",),
}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_ROLES = ("system", "user", "assistant")

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation that ends with an answer, or a plain text.

    Attributes:
        messages: role and content; a user's message may have `input`, Alpaca's
            second field. Empty for plain text.
        text: of a plain text, else empty.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages before the last answer."""
        return self.messages[:-1]

    @property
    def texts(self) -> list[str]:
        """All that it says."""
        if not self.messages:
            return [self.text]
        parts = []
        for message in self.messages:
            parts.append(message["content"])
            if "input" in message:
                parts.append(message["input"])
        return parts


class _Wrong(Exception):
    """What is wrong with a row, in words."""


@dataclass(frozen=True)
class RowFormat:
    """One format, and the names that its fields have in the rows.

    Attributes:
        name: of `FIELDS`.
        columns: name in the rows by field; a field that is not named has its own.
    """

    name: str
    columns: Mapping[str, str] = field(default_factory=dict)

    def parse(self, value: Any) -> Example | str:
        """The example in a decoded row, or what is wrong with it, in words."""
        try:
            if self.name == TEXT and isinstance(value, str):
                return Example(text=_text(value, "the text", needed=True))
            if not isinstance(value, dict):
                raise _Wrong(f"expected an object, found {_name(value)}")
            return _PARSERS[self.name](_Fields(value, self.columns))
        except _Wrong as problem:
            return str(problem)

    def unused(self, value: Any) -> list[str]:
        """Fields with content that this format does not read."""
        if not isinstance(value, dict):
            return []
        known = [self.columns.get(key, key) for key in FIELDS[self.name]]
        return [str(key) for key, content in value.items() if content and key not in known]


def detect(value: Any, columns: Mapping[str, str]) -> str | None:
    """The format of a row, by its fields; None when it is none of them."""
    if isinstance(value, str):
        return TEXT
    if not isinstance(value, dict):
        return None
    for name, needed in _NEEDED.items():
        if all(columns.get(key, key) in value for key in needed):
            return name
    return None


def expected() -> str:
    """The fields that each format needs, in words."""
    return "; ".join(f"{name}: {', '.join(needed)}" for name, needed in _NEEDED.items())


class _Fields:
    """A row's fields by the format's names."""

    def __init__(self, value: dict[str, Any], columns: Mapping[str, str]) -> None:
        self._value, self._columns = value, columns

    def get(self, key: str) -> tuple[Any, str]:
        """What the row has, and what to call the field."""
        name = self._columns.get(key, key)
        if name not in self._value:
            return None, name
        return self._value[name], name

    def text(self, key: str, *, needed: bool = False) -> str:
        """A field of text; empty when it may be missing and is."""
        content, name = self.get(key)
        if content is None:
            if not needed:
                return ""
            if name not in self._value:
                raise _Wrong(f"field {name!r} is missing")
        return _text(content, f"field {name!r}", needed=needed)

    def list(self, key: str, *, needed: bool = False) -> tuple[list[Any], str]:
        """A field that is a list; empty when it may be missing and is."""
        content, name = self.get(key)
        if content is None and not needed:
            return [], name
        if name not in self._value:
            raise _Wrong(f"field {name!r} is missing")
        if not isinstance(content, list):
            raise _Wrong(f"field {name!r} is {_name(content)}, expected an array")
        return content, name


def _alpaca(fields: _Fields) -> Example:
    messages: list[Message] = []
    # Looked at first: rows that are not Alpaca's are told so by these.
    instruction = fields.text("instruction", needed=True)
    output = fields.text("output", needed=True)
    if system := fields.text("system"):
        messages.append({"role": "system", "content": system})
    turns, name = fields.list("history")
    for number, turn in enumerate(turns, start=1):
        what = f"field {name!r}, turn {number}"
        if not isinstance(turn, list) or len(turn) != 2:
            raise _Wrong(f"{what} is {_name(turn)}, expected [question, answer]")
        for role, content in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": _text(content, what, needed=True)})
    user = {"role": "user", "content": instruction}
    if extra := fields.text("input"):
        user["input"] = extra
    messages += [user, {"role": "assistant", "content": output}]
    return Example(tuple(messages))


def _sharegpt(fields: _Fields) -> Example:
    turns, name = fields.list("conversations", needed=True)
    messages = []
    if system := fields.text("system"):
        messages.append({"role": "system", "content": system})
    messages += _turns(turns, name, "from", "value", _SHAREGPT_ROLES)
    return Example(_conversation(messages, name))


def _messages(fields: _Fields) -> Example:
    turns, name = fields.list("messages", needed=True)
    roles = {role: role for role in _ROLES}
    return Example(_conversation(_turns(turns, name, "role", "content", roles), name))


def _plain(fields: _Fields) -> Example:
    return Example(text=fields.text("text", needed=True))


def _turns(
    turns: list[Any], name: str, who: str, what: str, roles: Mapping[str, str]
) -> list[Message]:
    messages = []
    for number, turn in enumerate(turns, start=1):
        place = f"{name}[{number - 1}]"
        if not isinstance(turn, dict):
            raise _Wrong(f"{place} is {_name(turn)}, expected an object with {who!r} and {what!r}")
        said = turn.get(who)
        role = roles.get(said) if isinstance(said, str) else None
        if role is None:
            raise _Wrong(f"{place}.{who} is {said!r}, expected one of {', '.join(roles)}")
        content = _text(turn.get(what), f"{place}.{what}", needed=role != "system")
        if content:
            messages.append({"role": role, "content": content})
    return messages


def _conversation(messages: list[Message], name: str) -> tuple[Message, ...]:
    """Refuse what no template can be trusted with: turns must alternate and end with an answer."""
    before = "system"
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "system" and number > 1:
            raise _Wrong(f"{name} has a system message after others; expected it first")
        after = {"user": ("system", "assistant"), "assistant": ("user",), "system": ("system",)}
        if before not in after[role]:
            what = f"after the {before}'s" if number > 1 and before != "system" else "first"
            wanted = "assistant" if role == "user" else "user"
            raise _Wrong(f"{name} has a message of the {role} {what}; expected the {wanted}'s")
        before = role
    if before != "assistant":
        raise _Wrong(f"{name} ends without an answer; expected the assistant's message last")
    return tuple(messages)


_PARSERS = {ALPACA: _alpaca, SHAREGPT: _sharegpt, MESSAGES: _messages, TEXT: _plain}


def _text(content: Any, what: str, *, needed: bool) -> str:
    if isinstance(content, str):
        if needed and not content.strip():
            raise _Wrong(f"{what} is empty")
        if not content.isascii():
            try:
                content.encode()
            except UnicodeEncodeError:
                raise _Wrong(
                    f"{what} holds half of a surrogate pair, which is no character"
                ) from None
        return content
    if content is None and not needed:
        return ""
    raise _Wrong(f"{what} is {_name(content)}, expected text")


def _name(value: Any) -> str:
    names = {dict: "an object", list: "an array", bool: "true or false", type(None): "null"}
    names |= {int: "a number", float: "a number", str: "text"}
    return names.get(type(value), f"a {type(value).__name__}")
