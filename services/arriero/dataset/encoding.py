"""From an example to token ids and the place where training on them begins.

Responsibility: render, tokenize whole, mask the prompt, end the turn. Does not
know where examples come from or where ids go.

One text is rendered and tokenized once, so that what is trained on is what the
template says, with no seam. The prompt is its beginning: every token that ends
inside of it is masked.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path

from arriero import prompts
from arriero.dataset.alpaca import Example
from arriero.dataset.vocabulary import Vocabulary, chat_template
from arriero.errors import InvalidArgument
from arriero.prompts import Template

MASKED = -100


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Token ids of a row.

    Attributes:
        ids: at most `cutoff_len`, BOS included.
        trained_from: index of the first token that is trained on; `len(ids)`
            when none is.
        truncated: whether tokens were cut off.
        ends_turn: whether the last token is the template's end of turn, trained.
        straddles: whether a token spans the end of the prompt, which serving
            would tokenize differently.
    """

    ids: list[int]
    trained_from: int
    truncated: bool
    ends_turn: bool
    straddles: bool

    @property
    def trained(self) -> int:
        """Labels that count in a loss; the first token of a row is never predicted."""
        return max(0, len(self.ids) - max(self.trained_from, 1))


@dataclass(frozen=True, slots=True)
class RenderedRow:
    """A row's text, and where the prompt ends in it, in characters."""

    text: str
    prompt_length: int


@dataclass(frozen=True)
class Encoder:
    """Encodes examples with one template and one tokenizer.

    Attributes:
        template: bound to the tokenizer (`Template.bind`).
        vocabulary: the tokenizer.
        cutoff_len: longest row in tokens.
        train_on_inputs: whether the prompt is trained on too.
        add_eos_token: whether rows end with the template's end of turn.
    """

    template: Template
    vocabulary: Vocabulary
    cutoff_len: int
    train_on_inputs: bool = False
    add_eos_token: bool = True

    def render(self, example: Example) -> RenderedRow:
        """The text that is trained on.

        Raises:
            InvalidArgument: the template fails, or does not render the prompt
                as the beginning of the whole.
        """
        render = partial(
            self.template.render, bos_token=self.vocabulary.bos, eos_token=self.vocabulary.eos
        )
        text = render(example.messages)
        prompt = render(example.prompt, add_generation_prompt=True)
        if not text.startswith(prompt):
            raise InvalidArgument.field(
                "template",
                f"{self.template.name!r} cannot be trained with: what it renders before an answer "
                f"({prompt[-60:]!r}) does not begin what it renders with the answer; expected a "
                "template that keeps the prompt as it is",
            )
        return RenderedRow(prompt + self._ended(text[len(prompt) :], example.output), len(prompt))

    def _ended(self, tail: str, answer: str) -> str:
        """The answer's part of the text, cut after (or before) the end of the turn."""
        end = self.template.end_text(self.vocabulary.eos)
        body = answer if answer in tail else answer.strip()
        start = tail.find(body)
        after = start + len(body) if start >= 0 else len(tail.rstrip())
        at = tail.find(end, after) if end else -1
        if start < 0 and end and tail.rstrip().endswith(end):  # a template that edits answers
            at = tail.rindex(end)
            after = at
        if not self.add_eos_token:
            return tail[:after]
        return tail[: at + len(end)] if at >= 0 else tail[:after] + end

    def encode(self, rows: Sequence[RenderedRow]) -> list[EncodedRow]:
        """Token ids of rendered rows, in order."""
        bos = self.vocabulary.bos or ""
        # BOS goes in as an id: written out in the text it would change how some
        # SentencePiece tokenizers read the word after it.
        written = [
            len(bos) if self.template.writes_bos and row.text.startswith(bos) else 0 for row in rows
        ]
        texts = [row.text[cut:] for row, cut in zip(rows, written, strict=True)]
        encoded = self.vocabulary.encode(texts)
        return [
            self._row(ids, offsets, row.prompt_length - cut, begin=cut > 0)
            for (ids, offsets), row, cut in zip(encoded, rows, written, strict=True)
        ]

    def _row(
        self, ids: list[int], offsets: list[tuple[int, int]], prompt: int, *, begin: bool
    ) -> EncodedRow:
        first = bisect_right(offsets, prompt, key=itemgetter(1))
        straddles = first < len(ids) and offsets[first][0] < prompt
        if begin or (self.vocabulary.adds_bos and not self.template.writes_bos):
            assert self.vocabulary.bos_id is not None
            ids = [self.vocabulary.bos_id, *ids]
            first += 1
        truncated = len(ids) > self.cutoff_len
        ids = ids[: self.cutoff_len]
        trained_from = 0 if self.train_on_inputs else min(first, len(ids))
        end_id = self.vocabulary.id_of(self.template.end_text(self.vocabulary.eos))
        return EncodedRow(
            ids=ids,
            trained_from=trained_from,
            truncated=truncated,
            ends_turn=end_id is not None and ids[-1:] == [end_id] and trained_from < len(ids),
            straddles=straddles,
        )


def template_of(name: str, directory: Path) -> Template:
    """The template that a spec names; `model` is the one that came with the tokenizer.

    Raises:
        InvalidArgument: unknown, or the tokenizer brings none.
    """
    if name == prompts.MODEL:
        # A model that was tuned here remembers with what.
        stored = Template.read(directory)
        return stored or prompts.load(name, chat_template(directory))
    return shipped_template(name)


def shipped_template(name: str) -> Template:
    """A template that ships, by its name.

    Raises:
        InvalidArgument: unknown, or a path.
    """
    if prompts.is_path(name):
        raise InvalidArgument.field(
            "template",
            f"{name!r} is a path; expected {', '.join(prompts.known())} or {prompts.MODEL}",
        )
    return prompts.load(name)
