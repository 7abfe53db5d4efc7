"""From examples to token ids and the tokens that are trained on.

Responsibility: tokenize rendered rows whole, mask what is not trained, begin,
cut or split what is too long. Does not know where examples come from or where
ids go.

One text is rendered and tokenized once, so that what is trained on is what the
template says, with no seam. Every token that ends inside of a prompt is masked.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from arriero import prompts
from arriero.dataset.formats import Example
from arriero.dataset.rendering import RenderedRow, Renderer
from arriero.dataset.vocabulary import Tokens, Vocabulary, chat_template
from arriero.errors import InvalidArgument
from arriero.prompts import Template

MASKED = -100
TRUNCATE, DROP, FAIL, SPLIT = "truncate", "drop", "fail", "split"
OVER_LENGTH = ("auto", TRUNCATE, DROP, FAIL, SPLIT)


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Token ids of one sample.

    Attributes:
        ids: int32, at most `cutoff_len`, BOS included.
        trained: whether a token's label counts; never the first, which nothing
            predicts.
        truncated: whether the row is longer than `cutoff_len`.
        ends_turn: whether the last token is the end of turn, trained.
        straddles: whether a token spans the end of a prompt, which serving
            would tokenize differently.
    """

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    truncated: bool
    ends_turn: bool
    straddles: bool


@dataclass(frozen=True, slots=True)
class Encoded:
    """A batch of rows; each made one sample, or several where long ones are split.

    Attributes:
        ids: int32, of all samples, one after the other.
        trained: bool, as long.
        lengths: int32, tokens of each sample.
        counts: int32, samples of each row.
        tokens: int64, tokens of each row before anything was cut.
        ends_turn, straddles, begins, begins_twice: bool, of each row.
    """

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int64]
    ends_turn: npt.NDArray[np.bool_]
    straddles: npt.NDArray[np.bool_]
    begins: npt.NDArray[np.bool_]
    begins_twice: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Encoder:
    """Encodes examples with one template and one tokenizer.

    Attributes:
        template: bound to the tokenizer (`Template.bind`).
        vocabulary: the tokenizer.
        cutoff_len: longest sample in tokens.
        train_on_inputs: whether prompts are trained on too.
        add_eos_token: whether rows end with the template's end of turn.
        over_length: `split` makes several samples of a row that is too long; all
            else cuts it, and says so.
    """

    template: Template
    vocabulary: Vocabulary
    cutoff_len: int
    train_on_inputs: bool = False
    add_eos_token: bool = True
    over_length: str = TRUNCATE
    renderer: Renderer = field(init=False, repr=False)

    def __post_init__(self) -> None:
        renderer = Renderer(
            self.template,
            bos=self.vocabulary.bos,
            eos=self.vocabulary.eos,
            add_eos_token=self.add_eos_token,
        )
        object.__setattr__(self, "renderer", renderer)

    @property
    def adds_bos(self) -> bool:
        """Whether samples begin with a BOS that no template wrote."""
        return self.vocabulary.adds_bos and not self.template.writes_bos

    @property
    def end_id(self) -> int | None:
        """The token that ends a row; None when it is none, or several."""
        return self.vocabulary.id_of(self.template.end_text(self.vocabulary.eos))

    def render(self, example: Example) -> RenderedRow:
        """The text of an example, and what of it is trained on; raises as `Renderer.render`."""
        row = self.renderer.render(example)
        if self.train_on_inputs:
            return RenderedRow(row.text, ((0, len(row.text)),))
        return row

    def encode(self, rows: Sequence[RenderedRow]) -> list[EncodedRow]:
        """Each row as one sample; of a row that is split, the first."""
        batch = self.encode_batch(rows)
        starts = np.concatenate(([0], np.cumsum(batch.lengths)))
        first = np.concatenate(([0], np.cumsum(batch.counts)))[:-1]
        return [
            EncodedRow(
                ids=batch.ids[starts[at] : starts[at + 1]],
                trained=batch.trained[starts[at] : starts[at + 1]],
                truncated=bool(batch.tokens[i] > self.cutoff_len),
                ends_turn=bool(batch.ends_turn[i]),
                straddles=bool(batch.straddles[i]),
            )
            for i, at in enumerate(first)
        ]

    def encode_batch(self, rows: Sequence[RenderedRow]) -> Encoded:
        """Token ids of rendered rows, in order."""
        bos = self.vocabulary.bos or ""
        cut = len(bos)
        # BOS goes in as an id: written out in the text it would change how some
        # SentencePiece tokenizers read the word after it.
        written = [self.template.writes_bos and row.text.startswith(bos) for row in rows]
        texts = [
            row.text[cut:] if begin else row.text for row, begin in zip(rows, written, strict=True)
        ]
        spans = [
            [(max(start - cut, 0), end - cut) for start, end in row.spans] if begin else row.spans
            for row, begin in zip(rows, written, strict=True)
        ]
        tokens = self.vocabulary.encode_batch(texts)
        begin = np.array(written, dtype=np.bool_) | self.adds_bos
        marks, straddles = _trained(tokens, texts, spans)
        return self._samples(tokens, marks, straddles, begin)

    def _samples(
        self,
        tokens: Tokens,
        marks: npt.NDArray[np.bool_],
        straddles: npt.NDArray[np.bool_],
        begin: npt.NDArray[np.bool_],
    ) -> Encoded:
        """Begin rows with BOS, and cut them or split them at `cutoff_len`."""
        rows = len(tokens.counts)
        whole = tokens.counts + begin
        room = self.cutoff_len - begin
        pieces = np.ones(rows, dtype=np.int64)
        if self.over_length == SPLIT:
            pieces = np.maximum(1, -(-tokens.counts // room))
        # Of each sample: its row, where it starts in the tokens, and how many it has.
        row = np.repeat(np.arange(rows), pieces)
        number = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        start = (np.cumsum(tokens.counts) - tokens.counts)[row] + number * room[row]
        held = np.minimum(tokens.counts[row] - number * room[row], room[row])
        lengths = held + begin[row]
        # Of each token: where it is taken from; BOS from a place behind the last.
        ends = np.cumsum(lengths)
        first = ends - lengths
        at = np.arange(int(lengths.sum())) - np.repeat(first - start + begin[row], lengths)
        source = np.concatenate((tokens.ids, [self.vocabulary.bos_id or 0])).astype(np.int32)
        trained = np.concatenate((marks, [False]))
        filled = lengths > 0
        at[first[begin[row] & filled]] = len(tokens.ids)
        ids, learnt = source[at], trained[at]
        learnt[first[filled]] = False
        last = np.cumsum(pieces) - 1
        end = ends[last] - 1
        safe = np.maximum(end, 0)
        known = self.end_id
        ends_turn = (
            (ids[safe] == known) & learnt[safe] & (lengths[last] > 0)
            if known is not None and len(ids)
            else np.zeros(rows, dtype=np.bool_)
        )
        begins, twice = _begin(ids, first[last - pieces + 1], lengths[last - pieces + 1], self)
        return Encoded(
            ids=ids,
            trained=learnt,
            lengths=lengths.astype(np.int32),
            counts=pieces.astype(np.int32),
            tokens=whole if self.over_length != SPLIT else np.minimum(whole, self.cutoff_len),
            ends_turn=ends_turn,
            straddles=straddles,
            begins=begins,
            begins_twice=twice,
        )


def _trained(
    tokens: Tokens, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which tokens lie in spans, and which texts have a token across a span's beginning."""
    bounds: list[tuple[int, int, int]] = []  # text, bytes, bytes
    straddles = np.zeros(len(texts), dtype=np.bool_)
    # One more than there are tokens: a span may begin behind the last.
    change = np.zeros(len(tokens.ids) + 1, dtype=np.int32)
    starts = np.cumsum(tokens.counts) - tokens.counts
    for number, (text, items) in enumerate(zip(texts, spans, strict=True)):
        if (offsets := tokens.offsets.get(number)) is not None:
            for first, last, across in _by_offsets(offsets, items):
                change[starts[number] + first] += 1
                change[starts[number] + last] -= 1
                straddles[number] |= across
        elif text.isascii():
            bounds.extend((number, start, end) for start, end in items)
        else:
            bounds.extend(
                (number, len(text[:start].encode()), len(text[:end].encode()))
                for start, end in items
            )
    if bounds:
        text, begin, end = np.array(bounds, dtype=np.int64).T
        # Ends are made to rise over all texts, so that one search finds all.
        widths = np.zeros(len(texts) + 1, dtype=np.int64)
        full = tokens.counts > 0
        widths[1:][full] = tokens.ends[(starts + tokens.counts - 1)[full]]
        base = np.cumsum(widths)
        rising = tokens.ends + np.repeat(base[:-1], tokens.counts)
        low, high = starts[text], starts[text] + tokens.counts[text]
        first = np.clip(np.searchsorted(rising, base[text] + begin, side="right"), low, high)
        first[begin == 0] = low[begin == 0]  # with what a tokenizer puts before a text
        last = np.clip(np.searchsorted(rising, base[text] + end, side="right"), low, high)
        np.add.at(change, first, 1)
        np.add.at(change, last, -1)
        before = np.where(first > low, rising[np.maximum(first - 1, 0)] - base[text], 0)
        straddles[text[(before < begin) & (first < high)]] = True
    return np.cumsum(change[:-1]) > 0, straddles


def _by_offsets(
    offsets: list[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, bool]]:
    """First token of each span, the one behind its last, and whether one spans its beginning."""
    for start, end in spans:
        first = bisect_right(offsets, start, key=itemgetter(1)) if start else 0
        last = bisect_right(offsets, end, key=itemgetter(1))
        yield first, last, first < len(offsets) and offsets[first][0] < start


def _begin(
    ids: npt.NDArray[np.int32],
    first: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    encoder: Encoder,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which rows begin with BOS, and which with two."""
    bos = encoder.vocabulary.bos_id
    if bos is None or not len(ids):
        none = np.zeros(len(first), dtype=np.bool_)
        return none, none
    top = len(ids) - 1
    begins = (lengths > 0) & (ids[np.minimum(first, top)] == bos)
    return begins, begins & (lengths > 1) & (ids[np.minimum(first + 1, top)] == bos)


def template_of(name: str, directory: Path) -> Template:
    """The template that a spec names; `model` is the one that came with the tokenizer.

    Raises:
        InvalidArgument: unknown, or the tokenizer brings none.
    """
    if name == prompts.MODEL:
        # A model that was tuned here remembers with what.
        stored = Template.read(directory)
        return stored or prompts.load(name, chat_template(directory))
    return prompts.load(name)


def own_template(directory: Path) -> Template | None:
    """The template that came with a tokenizer; None when none did."""
    try:
        return template_of(prompts.MODEL, directory)
    except InvalidArgument:
        return None
