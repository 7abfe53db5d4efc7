"""What a prompt template writes around what people say.

Responsibility: find a template's fixed text by rendering it around placeholders,
and take the messages out of a text that it rendered. Does not know tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from arriero.errors import ArrieroError
from arriero.prompts import Template

# Words that no template changes by trimming, escaping or case.
_WORDS = {"system": "Qzsystemzq", "user": "Qzuserzq", "input": "Qzinputzq"}
_SPLIT = re.compile("|".join(f"({word})" for word in _WORDS.values()))
# Which parts a first turn may have, the usual ones first.
_SHAPES: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("user", "input"),
    ("system", "user"),
    ("system", "user", "input"),
)

Message = dict[str, str]


@dataclass(frozen=True)
class Frame:
    """A prompt's fixed text, and the places between.

    Attributes:
        literals: one more than there are names; the first may be empty.
        names: `system`, `user`, `input`: what stands between the literals.
    """

    literals: tuple[str, ...]
    names: tuple[str, ...]

    def messages(self, text: str) -> list[Message] | None:
        """The messages of a text that begins with such a prompt; None for others."""
        pattern = re.escape(self.literals[0])
        for name, literal in zip(self.names, self.literals[1:], strict=True):
            again = f"(?P={name})" if f"(?P<{name}>" in pattern else f"(?P<{name}>.*?)"
            pattern += again + re.escape(literal)
        found = re.match(pattern, text, re.DOTALL)
        return None if found is None else _messages(found.groupdict())

    def may_begin(self, text: str) -> bool:
        """Whether a text that was cut off could be the beginning of such a prompt."""
        return text.startswith(self.literals[0]) or self.literals[0].startswith(text)


def frames_of(template: Template, *, bos_token: str | None, eos_token: str | None) -> list[Frame]:
    """The frames of a template's first turn, without BOS; those that it can render."""
    found: dict[Frame, None] = {}
    for shape in _SHAPES:
        try:
            text = template.render(
                _messages({name: _WORDS[name] for name in shape}),
                bos_token=bos_token,
                eos_token=eos_token,
                add_generation_prompt=True,
            )
        except ArrieroError:  # a template without system messages, say
            continue
        text = text.removeprefix(bos_token or "")
        parts = [part for part in _SPLIT.split(text) if part is not None]
        literals, names = parts[::2], parts[1::2]
        if len(literals) != len(names) + 1 or not set(shape) <= {_name(n) for n in names}:
            continue  # something that was said is left out
        frame = Frame(tuple(literals), tuple(_name(name) for name in names))
        # A prompt of nothing but what is said would be found in any text.
        if any(literal.strip() for literal in frame.literals):
            found[frame] = None
    return list(found)


def _name(word: str) -> str:
    return next((name for name, own in _WORDS.items() if own == word), "")


def _messages(parts: dict[str, str]) -> list[Message]:
    messages: list[Message] = []
    if "system" in parts:
        messages.append({"role": "system", "content": parts["system"]})
    user = {"role": "user", "content": parts.get("user", "")}
    if "input" in parts:
        user["input"] = parts["input"]
    return [*messages, user]


def first_match(frames: Sequence[Frame], text: str) -> list[list[Message]]:
    """The messages that a text may have been rendered from, the likeliest first."""
    return [found for frame in frames if (found := frame.messages(text)) is not None]
