"""A tokenizer's files: special tokens, and whether it begins texts with BOS.

Responsibility: read what a tokenizer directory says about itself, quickly and
without loading it, and load it when ids are wanted. Does not know templates.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arriero.errors import FailedPrecondition

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
JINJA_FILE = "chat_template.jinja"
_SENTENCEPIECE_FILE = "tokenizer.model"
_SPECIAL_FILE = "special_tokens_map.json"
_SPACE = "▁"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_NO_WIDTH = 1 << 32


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The texts of a tokenizer's special tokens; None where it has none.

    `add_bos` is what the configuration asks for; None when it does not say.
    """

    bos: str | None
    eos: str | None
    pad: str | None
    add_bos: bool | None


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of several texts, one after the other.

    Attributes:
        ids: int32.
        counts: int64, tokens of each text.
        ends: int64, where each token ends in its text, in bytes; means nothing
            for the texts that are in `offsets`.
        offsets: (start, end) of each token in characters, by number of the text.
    """

    ids: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    offsets: dict[int, list[tuple[int, int]]]


def special_tokens(directory: Path) -> SpecialTokens:
    """Read the special tokens of a tokenizer directory.

    Raises:
        FailedPrecondition: no tokenizer in it, or a file that is not JSON.
    """
    if not any((directory / name).is_file() for name in (TOKENIZER_FILE, _SENTENCEPIECE_FILE)):
        raise FailedPrecondition(
            f"no tokenizer in {directory.name}: expected {TOKENIZER_FILE} or "
            f"{_SENTENCEPIECE_FILE}; import a model with its tokenizer"
        )
    texts: dict[str, str | None] = {}
    config = _json(directory / CONFIG_FILE)
    for data in (config, _json(directory / _SPECIAL_FILE)):
        for key in ("bos_token", "eos_token", "pad_token"):
            if texts.get(key) is None:
                texts[key] = _text(data.get(key))
    add_bos = config.get("add_bos_token")
    return SpecialTokens(
        texts["bos_token"],
        texts["eos_token"],
        texts["pad_token"],
        add_bos if isinstance(add_bos, bool) else None,
    )


def chat_template(directory: Path) -> str | None:
    """The Jinja source that came with a tokenizer; None when none did."""
    path = directory / JINJA_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    value = _json(directory / CONFIG_FILE).get("chat_template")
    if isinstance(value, list):  # several, by name
        named = {item["name"]: item["template"] for item in value if isinstance(item, dict)}
        value = named.get("default")
    return value if isinstance(value, str) and value else None


class Vocabulary:
    """A loaded tokenizer.

    Attributes:
        bos, eos, pad: texts of the special tokens, or None.
        bos_id, eos_id, pad_id: their ids, or None. Without a token for padding
            `pad_id` is EOS's.
        adds_bos: whether a text is meant to begin with BOS.
        special: every special token's text by its id.
    """

    def __init__(self, backend: Any, tokens: SpecialTokens) -> None:
        self._backend = backend
        backend.no_truncation()
        backend.no_padding()
        self.bos, self.eos, self.pad = tokens.bos, tokens.eos, tokens.pad
        self.bos_id, self.eos_id = self.id_of(self.bos), self.id_of(self.eos)
        pad_id = self.id_of(self.pad)
        self.pad_id = self.eos_id if pad_id is None else pad_id
        first = backend.encode("a", add_special_tokens=True).ids[:1]
        # The configuration's word is what transformers and llama.cpp's converter follow.
        asked = first == [self.bos_id] if tokens.add_bos is None else tokens.add_bos
        self.adds_bos = self.bos_id is not None and asked
        self._widths, self._lead = _widths(backend)
        self.special: dict[int, str] = {
            number: str(token.content)
            for number, token in backend.get_added_tokens_decoder().items()
            if token.special
        }

    @classmethod
    def load(cls, directory: Path) -> Vocabulary:
        """Load `tokenizer.json`; a SentencePiece model alone is converted by transformers.

        Raises:
            FailedPrecondition: no tokenizer, or one that cannot be read.
        """
        tokens = special_tokens(directory)
        try:
            if (directory / TOKENIZER_FILE).is_file():
                from tokenizers import Tokenizer

                backend = Tokenizer.from_file(str(directory / TOKENIZER_FILE))
            else:
                from transformers import AutoTokenizer

                slow = AutoTokenizer.from_pretrained(directory, local_files_only=True)
                backend = slow.backend_tokenizer
        except Exception as error:  # tokenizers raises bare Exception
            raise FailedPrecondition(
                f"the tokenizer of {directory.name} cannot be loaded: {str(error)[:300]}"
            ) from error
        return cls(backend, tokens)

    def save(self, directory: Path, origin: Path) -> Path:
        """Write it so that `load` needs no conversion; `origin` is where it was loaded from."""
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / TOKENIZER_FILE))
        for name in (CONFIG_FILE, _SPECIAL_FILE):
            if (origin / name).is_file():
                shutil.copyfile(origin / name, directory / name)
        return directory

    def id_of(self, text: str | None) -> int | None:
        """The id of one token, by its exact text; None when there is no such token."""
        number = self._backend.token_to_id(text) if text else None
        return None if number is None else int(number)

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return len(self._widths)

    def text_of(self, number: int) -> str | None:
        """The token of an id, as the vocabulary has it."""
        token = self._backend.id_to_token(number)
        return None if token is None else str(token)

    def encode(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids and (start, end) in characters of each text; special tokens are read, none added."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def encode_batch(self, texts: Sequence[str]) -> Tokens:
        """As `encode`, without following offsets where the tokens themselves tell them.

        A token of a byte-level or byte-fallback vocabulary stands for known
        bytes. Where those of a text's tokens add up to the text, they say where
        each ends; the rest, such as texts that the tokenizer normalizes, is
        tokenized once more with offsets.
        """
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        found = [encoding.ids for encoding in encodings]
        counts = np.array([len(ids) for ids in found], dtype=np.int64)
        ids = np.fromiter(chain.from_iterable(found), dtype=np.int32, count=int(counts.sum()))
        widths = self._widths[ids]
        ends = np.cumsum(widths)
        last = np.cumsum(counts)
        before = np.concatenate(([0], ends))[last - counts]
        total = np.concatenate(([0], ends))[last] - before
        size = np.array([len(t) if t.isascii() else len(t.encode()) for t in texts])
        lead = total - size
        known = (lead == 0) | ((lead == self._lead) & (counts > 0))
        ends -= np.repeat(before + np.where(known, lead, 0), counts)
        rest = np.flatnonzero(~known)
        offsets = {}
        if len(rest):
            again = self._backend.encode_batch(
                [texts[number] for number in rest.tolist()], add_special_tokens=False
            )
            offsets = {int(number): item.offsets for number, item in zip(rest, again, strict=True)}
        return Tokens(ids, counts, ends, offsets)

    def texts(self, ids: Sequence[int]) -> list[str]:
        """What each token of a row adds to its text; a character comes with its last token."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(self._backend, number) or "" for number in ids]

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self._backend.encode(text, add_special_tokens=False).ids)


def _widths(backend: Any) -> tuple[npt.NDArray[np.int64], int]:
    """Bytes of text that each token stands for, and those that a first token has too many.

    Unknown and normalized tokens get a width that no sum can hide.
    """
    added = backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    widths = np.full(max(vocabulary.values(), default=0) + 1, _NO_WIDTH, dtype=np.int64)
    # GPT-2's alphabet has a character for each byte; SentencePiece's pieces are
    # text with a mark for the space, and `<0x0A>` for a byte alone.
    by_bytes = "ByteLevel" in f"{backend.pre_tokenizer!r}{backend.decoder!r}"
    unknown = getattr(backend.model, "unk_token", None)
    for piece, number in vocabulary.items():
        token = added.get(number)
        if piece == unknown:
            continue
        if token is not None:
            if not (token.lstrip or token.rstrip or token.normalized):
                widths[number] = len(piece.encode())
        elif by_bytes:
            widths[number] = len(piece)
        elif _BYTE.fullmatch(piece):
            widths[number] = 1
        else:
            widths[number] = len(piece.replace(_SPACE, " ").encode())
    first = backend.encode("a", add_special_tokens=False).ids
    return widths, int(widths[first].sum()) - 1


def _json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FailedPrecondition(f"{path.name} of the tokenizer is not JSON: {error}") from error
    return data if isinstance(data, dict) else {}


def _text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None
