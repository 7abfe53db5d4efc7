"""A tokenizer's files: special tokens, and whether it begins texts with BOS.

Responsibility: read what a tokenizer directory says about itself, quickly and
without loading it, and load it when ids are wanted. Does not know templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.errors import FailedPrecondition

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
JINJA_FILE = "chat_template.jinja"
_SENTENCEPIECE_FILE = "tokenizer.model"


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The texts of a tokenizer's special tokens; None where it has none.

    `add_bos` is what the configuration asks for; None when it does not say.
    """

    bos: str | None
    eos: str | None
    pad: str | None
    add_bos: bool | None


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
    for data in (config, _json(directory / "special_tokens_map.json")):
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

    def id_of(self, text: str | None) -> int | None:
        """The id of one token, by its exact text; None when there is no such token."""
        number = self._backend.token_to_id(text) if text else None
        return None if number is None else int(number)

    def encode(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Ids and (start, end) in characters of each text; special tokens are read, none added."""
        encodings = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def count(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self._backend.encode(text, add_special_tokens=False).ids)


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
