"""What is done to a batch of rows, wherever it is done.

Responsibility: rows to marked token ids with what was found about each, as
plain bytes and lists that go through a pipe. Does not know files, or processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntFlag
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.dataset.arrow import marked
from arriero.dataset.encoding import DROP, FAIL, SPLIT, TRUNCATE, Encoded, Encoder
from arriero.dataset.formats import TEXT, Example, RowFormat
from arriero.dataset.rendering import RenderedRow
from arriero.dataset.shingles import Shingles, bands, fingerprint, shingles
from arriero.dataset.vocabulary import Vocabulary
from arriero.errors import InvalidArgument
from arriero.prompts import Template

# Around what is trained on, in a sample.
OPEN, CLOSE = "⟦", "⟧"
# Plain text is what it is.
PLAIN = Template("text", "{% for message in messages %}{{ message.content }}{% endfor %}")
AUTO = "auto"
# What `DatasetSpec.dedup` may be.
NONE, EXACT, NEAR = "none", "exact", "near"

Answer = dict[str, Any]


class Flag(IntFlag):
    """What was found about a row."""

    LONG = 1
    """Longer than `cutoff_len`."""
    DROPPED = 2
    MASKED = 4
    """No trained token."""
    ENDLESS = 8
    """Its end of turn is not trained."""
    BOS_TWICE = 16
    NO_BOS = 32
    SPECIAL = 64
    """Its text holds special tokens."""
    STRADDLES = 128
    """A token spans the end of a prompt."""
    UNUSABLE = 256
    """The template refuses it."""


NOTABLE = (
    Flag.DROPPED
    | Flag.MASKED
    | Flag.ENDLESS
    | Flag.BOS_TWICE
    | Flag.NO_BOS
    | Flag.SPECIAL
    | Flag.UNUSABLE
    | Flag.LONG
)


@dataclass(frozen=True)
class Settings:
    """What batches are done by; goes through a pipe as a dictionary.

    Attributes:
        tokenizer: directory of the tokenizer's files.
        template: as JSON, not bound; empty where all rows are plain text.
        cutoff_len, train_on_inputs, add_eos_token: as `DatasetSpec`.
        over_length: as `DatasetSpec`; `auto` splits plain text and cuts the rest.
        drop_masked: leave out rows that train nothing.
    """

    tokenizer: str
    template: str
    cutoff_len: int
    train_on_inputs: bool
    add_eos_token: bool
    over_length: str
    drop_masked: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


class Batches:
    """Does batches. Every answer is a pure function of settings and batch."""

    def __init__(self, settings: Settings, vocabulary: Vocabulary | None = None) -> None:
        directory = Path(settings.tokenizer)
        self.settings = settings
        self.vocabulary = vocabulary or Vocabulary.load(directory)
        self._encoders: dict[bool, Encoder] = {}
        specials = sorted(filter(None, self.vocabulary.special.values()))
        self._specials = specials
        self._hints = sorted({token[:2] for token in specials})

    def encoder(self, name: str) -> Encoder:
        """The encoder for rows of a format."""
        plain = name == TEXT
        if plain not in self._encoders:
            settings = self.settings
            template = PLAIN if plain else Template.from_json(settings.template)
            over_length = settings.over_length
            if over_length == AUTO:
                over_length = SPLIT if plain else TRUNCATE
            self._encoders[plain] = Encoder(
                template=template.bind(bos_token=self.vocabulary.bos, eos_token=self.vocabulary.eos)
                if not plain
                else template,
                vocabulary=self.vocabulary,
                cutoff_len=settings.cutoff_len,
                train_on_inputs=settings.train_on_inputs,
                add_eos_token=settings.add_eos_token,
                over_length=over_length,
            )
        return self._encoders[plain]

    def encode(self, form: RowFormat, values: Sequence[Any], samples: int = 0) -> Answer:
        """Encode rows that `form` can use.

        Returns:
            `ids` (marked int32), `lengths` (int32, of each sample), `counts` (int32,
            samples of each row), `flags` (uint16, of each row), `tokens` (int64, of
            each row before it was cut), all as bytes; `said`, what is wrong by row;
            `samples`, the first rows rendered.
        """
        encoder = self.encoder(form.name)
        said: dict[int, str] = {}
        rendered: list[RenderedRow] = []
        flags = np.zeros(len(values), dtype=np.uint16)
        for number, value in enumerate(values):
            example = form.parse(value)
            row = RenderedRow("", ())
            if isinstance(example, str):
                said[number] = example
            else:
                try:
                    row = encoder.render(example)
                except InvalidArgument as error:
                    said[number] = error.message
                if hits := self._specials_in(example):
                    flags[number] |= Flag.SPECIAL
                    said.setdefault(number, f"its text holds {', '.join(hits)}")
            if not row.text:
                flags[number] |= Flag.UNUSABLE
            rendered.append(row)
        encoded = encoder.encode_batch(rendered)
        self._flag(flags, encoded, encoder)
        kept = (flags & (Flag.DROPPED | Flag.UNUSABLE)) == 0
        ids = marked(encoded.ids, encoded.trained)
        lengths, counts = encoded.lengths, encoded.counts
        if not kept.all():
            of_samples = np.repeat(kept, counts)
            ids = ids[np.repeat(of_samples, lengths)]
            lengths, counts = lengths[of_samples], counts * kept
        return {
            "ids": ids.tobytes(),
            "lengths": lengths.tobytes(),
            "counts": counts.astype(np.int32).tobytes(),
            "flags": flags.tobytes(),
            "tokens": encoded.tokens.tobytes(),
            "said": said,
            "samples": [marked_text(row) for row in rendered[:samples]],
        }

    def _flag(self, flags: npt.NDArray[np.uint16], encoded: Encoded, encoder: Encoder) -> None:
        rows = len(flags)
        usable = (flags & Flag.UNUSABLE) == 0
        long = usable & (encoded.tokens > self.settings.cutoff_len)
        row_of_token = np.repeat(np.repeat(np.arange(rows), encoded.counts), encoded.lengths)
        trained = np.bincount(row_of_token[encoded.trained], minlength=rows)
        masked = usable & (trained == 0)
        too_long = long & (encoder.over_length in (DROP, FAIL))
        dropped = too_long | masked if self.settings.drop_masked else too_long
        expected = encoder.template.writes_bos or encoder.adds_bos
        for flag, where in (
            (Flag.LONG, long),
            (Flag.MASKED, masked & ~too_long),
            (Flag.DROPPED, dropped),
            (Flag.STRADDLES, usable & encoded.straddles),
            (Flag.BOS_TWICE, usable & encoded.begins_twice),
            (Flag.NO_BOS, usable & ~encoded.begins & expected),
            (Flag.ENDLESS, usable & ~long & ~encoded.ends_turn & encoder.add_eos_token),
        ):
            flags[where] |= np.uint16(flag)

    def _specials_in(self, example: Example) -> list[str]:
        text = "\n".join(example.texts)
        if not any(hint in text for hint in self._hints):
            return []
        return [token for token in self._specials if token in text]


def read(form: RowFormat, values: Sequence[Any], dedup: str, threshold: float = 1) -> Answer:
    """Look at rows: what is wrong with each, and what tells it from others.

    Returns:
        `said`, what is wrong by row; `unused`, rows by field that is not read;
        with `dedup`, `prints` (16 bytes a row); with `near` also `shingles`
        (uint32), `sizes` (int32, shingles of each row) and `bands` (uint64, those
        of each row one after the other).
    """
    said: dict[int, str] = {}
    unused: dict[str, int] = {}
    prints: list[bytes] = []
    found: list[Shingles] = []
    for number, value in enumerate(values):
        example = form.parse(value)
        for key in form.unused(value):
            unused[key] = unused.get(key, 0) + 1
        if isinstance(example, str):
            said[number] = example
        if dedup != NONE:
            texts = [""] if isinstance(example, str) else example.texts
            prints.append(fingerprint(texts))
            if dedup == NEAR:
                found.append(shingles("\n".join(texts)))
    answer: Answer = {"said": said, "unused": unused}
    if dedup != NONE:
        answer["prints"] = b"".join(prints)
    if dedup == NEAR:
        sizes = np.array([len(item) for item in found], dtype=np.int32)
        flat = np.concatenate(found)
        answer["shingles"], answer["sizes"] = flat.tobytes(), sizes.tobytes()
        answer["bands"] = bands(flat, sizes, threshold).tobytes()
    return answer


def marked_text(row: RenderedRow) -> str:
    """A row's text with marks around what is trained on."""
    parts, at = [], 0
    for start, end in row.spans:
        parts += [row.text[at:start], OPEN, row.text[start:end], CLOSE]
        at = end
    return "".join([*parts, row.text[at:]])


def as_format(data: Mapping[str, Any]) -> RowFormat:
    """A format as it came through a pipe."""
    return RowFormat(data["name"], data["columns"])
