"""From an example to its text and the spans of it that are trained on.

Responsibility: render a conversation once, and find every answer and the end of
its turn in it. Does not know tokens.

A template that treats what messages say as opaque is rendered once for each
shape of conversation; rows then only fill in their texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arriero.dataset.formats import Example, Message
from arriero.errors import InvalidArgument
from arriero.prompts import Template
from arriero.prompts.opaque import MARK, NotOpaque, probing

Span = tuple[int, int]
# (roles, which messages have an input): what a template's rendering depends on.
_Shape = tuple[tuple[str, bool], ...]
# Shapes that are remembered; conversations of very many lengths are rendered whole.
_SHAPES = 256


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """A row's text, and the spans that are trained on, in characters."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a shape is rendered: literals, and (message, field, trim) for texts.

    `spans` are from a part up to another.
    """

    parts: tuple[str | tuple[int, str, str], ...]
    spans: tuple[Span, ...]

    def render(self, messages: Sequence[Message]) -> RenderedRow:
        texts = []
        ends = [0]
        for part in self.parts:
            if isinstance(part, str):
                text = part
            else:
                number, key, trim = part
                text = messages[number][key]
                if trim:
                    text = getattr(text, trim)()
            texts.append(text)
            ends.append(ends[-1] + len(text))
        spans = tuple((ends[start], ends[end]) for start, end in self.spans)
        return RenderedRow("".join(texts), spans)


class Renderer:
    """Renders examples with one bound template.

    Args:
        template: bound to the tokenizer (`Template.bind`).
        bos: text of the tokenizer's BOS token, or None; `eos` likewise.
        eos: see `bos`.
        add_eos_token: whether rows end with the template's end of turn, and turns
            train theirs.
    """

    def __init__(
        self, template: Template, *, bos: str | None, eos: str | None, add_eos_token: bool = True
    ) -> None:
        self.template = template
        self._bos, self._eos = bos, eos
        self._add_eos_token = add_eos_token
        self._end = template.end_text(eos)
        self._plans: dict[_Shape, _Plan | None] = {}

    def render(self, example: Example) -> RenderedRow:
        """The text of an example; every answer in it and its end of turn are trained on.

        Raises:
            InvalidArgument: the template fails, or does not render what comes
                before an answer as the beginning of the whole.
        """
        if not example.messages:
            text = example.text + (self._eos or "" if self._add_eos_token else "")
            return RenderedRow(text, ((0, len(text)),))
        shape = tuple((message["role"], "input" in message) for message in example.messages)
        if shape in self._plans:
            plan = self._plans[shape]
        else:
            plan = self._plan(shape, example)
            if len(self._plans) < _SHAPES:
                self._plans[shape] = plan
        return plan.render(example.messages) if plan else self.render_whole(example.messages)

    def render_whole(self, messages: Sequence[Message]) -> RenderedRow:
        """As `render`, through the template itself."""
        text = self._text(messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._text(messages[:number], prompt=True)
            if not text.startswith(prompt):
                raise InvalidArgument.field(
                    "template",
                    f"{self.template.name!r} cannot be trained with: what it renders before an "
                    f"answer ({prompt[-60:]!r}) does not begin what it renders with the answer; "
                    "expected a template that keeps the prompt as it is",
                )
            tail = text[len(prompt) :]
            if number == len(messages) - 1:
                text = prompt + self._ended(tail, message["content"])
                spans.append((len(prompt), len(text)))
            else:
                spans.append((len(prompt), len(prompt) + self._turn(tail, message["content"])))
        return RenderedRow(text, tuple(spans))

    def _text(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        return self.template.render(
            messages, bos_token=self._bos, eos_token=self._eos, add_generation_prompt=prompt
        )

    def _ended(self, tail: str, answer: str) -> str:
        """The last answer's part of the text, cut after (or before) the end of the turn."""
        end = self._end
        start, after = _find(tail, answer)
        at = tail.find(end, after) if end else -1
        if start < 0 and end and tail.rstrip().endswith(end):  # a template that edits answers
            at = tail.rindex(end)
            after = at
        if not self._add_eos_token:
            return tail[:after]
        return tail[: at + len(end)] if at >= 0 else tail[:after] + end

    def _turn(self, tail: str, answer: str) -> int:
        """Where the turn of an answer inside of a conversation ends."""
        start, after = _find(tail, answer)
        if start < 0:
            raise InvalidArgument.field(
                "template",
                f"{self.template.name!r} cannot be trained with: it changes the answers of "
                "earlier turns; expected one that keeps them as they are",
            )
        at = tail.find(self._end, after) if self._end and self._add_eos_token else -1
        if at >= 0 and not tail[after:at].strip():
            return at + len(self._end)
        return after

    def _plan(self, shape: _Shape, example: Example) -> _Plan | None:
        """How to render the shape; None when the template must see each row."""
        try:
            with probing() as registry:
                messages: list[Message] = []
                for number, message in enumerate(example.messages):
                    stand_in: Message = {"role": message["role"]}
                    for key in message:
                        if key != "role":
                            stand_in[key] = registry.add((number, key), "")
                    messages.append(stand_in)
                whole = self.render_whole(messages)
        except (NotOpaque, InvalidArgument):
            return None
        bounds = sorted({0, len(whole.text), *(edge for span in whole.spans for edge in span)})
        parts: list[str | tuple[int, str, str]] = []
        place: dict[int, int] = {}
        for start, end in zip(bounds, [*bounds[1:], bounds[-1]], strict=True):
            place[start] = len(parts)
            pieces = MARK.split(str(whole.text[start:end]))
            for at, piece in enumerate(pieces):
                if at % 2:
                    (number, key), trim = registry.texts[int(piece)]
                    parts.append((number, key, trim))
                elif piece:
                    parts.append(piece)
        plan = _Plan(tuple(parts), tuple((place[a], place[b]) for a, b in whole.spans))
        # Trust, and verify once.
        return (
            plan if plan.render(example.messages) == self.render_whole(example.messages) else None
        )


def _find(tail: str, answer: str) -> tuple[int, int]:
    """Where an answer begins and ends in a text; it may be trimmed. -1 when it is not there."""
    body = answer if answer in tail else answer.strip()
    start = tail.find(body)
    return start, start + len(body) if start >= 0 else len(tail.rstrip())
