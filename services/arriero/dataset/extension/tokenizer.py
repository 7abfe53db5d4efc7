"""A model's tokenizer, before and after: which tokens come to it and with which ids.

Responsibility: keep `tokenizer.model`, `tokenizer.json` and the configuration of
one directory in step. Does not know where new pieces come from, nor weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arriero.dataset.extension import converted, fast, pieces
from arriero.dataset.extension.fast import Fast
from arriero.dataset.extension.growing import Growth
from arriero.dataset.vocabulary import CONFIG_FILE, special_tokens
from arriero.errors import FailedPrecondition

__all__ = ["Additions", "BaseTokenizer", "source_pieces"]

_ADDED_FILE = "added_tokens.json"


@dataclass
class Additions:
    """New tokens by id.

    Attributes:
        tokens: matched as they are.
        pieces: of the BPE, in the order of their merges.
        merges: that lead to them, for a BPE without SentencePiece.
        origins: old ids that each new token was cut into; empty where none are known.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    pieces: dict[str, int] = field(default_factory=dict)
    merges: Sequence[tuple[str, str]] = ()
    origins: dict[int, list[int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens) + len(self.pieces)


class BaseTokenizer:
    """The tokenizer of a directory.

    Attributes:
        directory: it is read from, never written to.
        sentencepiece: its `ModelProto`; None for a tokenizer without one.
        fast: its `tokenizer.json`, made from the SentencePiece model where it is missing.
        backend: the same, loaded.
        ids: of all tokens.
        next_id: the one after the last.

    Raises:
        FailedPrecondition: there is none, it is no BPE, or its files contradict each other.
    """

    def __init__(self, directory: Path, scratch: Path) -> None:
        special_tokens(directory)
        self.directory = directory
        path = directory / pieces.FILE
        self.sentencepiece = pieces.read(path) if path.is_file() else None
        self._made = not (directory / fast.FILE).is_file()
        self._fast_path = (scratch if self._made else directory) / fast.FILE
        if self._made:
            _convert(directory, self.sentencepiece, self._fast_path)
        from tokenizers import Tokenizer

        self.fast = Fast.read(self._fast_path)
        self.backend = Tokenizer.from_file(str(self._fast_path))
        self.ids: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        self.next_id = max(self.ids.values()) + 1
        if self.sentencepiece is not None:
            self._check_agreement(self.sentencepiece)
            self.next_id = max(self.next_id, len(self.sentencepiece.pieces))

    def _check_agreement(self, proto: Any) -> None:
        ids = self.ids
        wrong = [
            (i, piece.piece) for i, piece in enumerate(proto.pieces) if ids.get(piece.piece, i) != i
        ]
        if wrong:
            number, text = wrong[0]
            raise FailedPrecondition(
                f"{pieces.FILE} and {fast.FILE} are not the same tokenizer: {text!r} is {number} "
                f"in one and {ids[text]} in the other ({len(wrong)} such pieces); keep one of them"
            )

    def growth(self) -> Growth:
        """What its pieces merge into."""
        grown = (
            self.fast.growth() if self.sentencepiece is None else pieces.growth(self.sentencepiece)
        )
        grown.known |= self.ids.keys()
        return grown

    def add(self, tokens: Iterable[str], candidates: Iterable[str], vocab_size: int) -> Additions:
        """Choose ids for tokens and then for candidates, up to `vocab_size` in all (0: no limit).

        Tokens that the tokenizer has are passed over.
        """
        made = Additions()
        number = self.next_id
        for text in dict.fromkeys(tokens):
            if text not in self.ids:
                made.tokens[text] = number
                made.origins[number] = self.backend.encode(text, add_special_tokens=False).ids
                number += 1
        growth, before = self.growth(), self.growth()
        growth.known |= made.tokens.keys()
        growth.grow(candidates, vocab_size - number if vocab_size else 1 << 31)
        made.merges = growth.merges
        for text in growth.pieces:
            made.pieces[text] = number
            made.origins[number] = self._ids(before.cut(text))
            number += 1
        return made

    def _ids(self, symbols: Sequence[str]) -> list[int]:
        """Old ids of symbols; a character that is none is the bytes that it falls back to."""
        found: list[int] = []
        for symbol in symbols:
            if symbol in self.fast.vocab:
                found.append(self.fast.vocab[symbol])
            else:
                names = [f"<0x{byte:02X}>" for byte in symbol.encode()]
                found += [self.fast.vocab[name] for name in names if name in self.fast.vocab]
        return found

    def write(self, target: Path, made: Additions) -> None:
        """Write the tokenizer's files with what was added."""
        grown = Fast.read(self._fast_path)
        if self.sentencepiece is None:
            grown.extend(made.pieces, made.merges, made.tokens)
        else:
            proto = pieces.read(self.directory / pieces.FILE)
            pieces.append(proto, [*self._late_tokens(len(proto.pieces)), *_entries(made)])
            grown.extend_scored(made.pieces, pieces.normal_scores(proto), made.tokens)
            (target / pieces.FILE).write_bytes(proto.SerializeToString())
        grown.write(target / fast.FILE)
        for name in (CONFIG_FILE, _ADDED_FILE):
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, target / name)
        _add_to_config(target / CONFIG_FILE, made.tokens)
        if self._made:
            _load_as_it_is(target / CONFIG_FILE, self.sentencepiece)
        _add_to_map(target / _ADDED_FILE, made.tokens)

    def _late_tokens(self, known: int) -> list[tuple[str, int]]:
        """Tokens that were added after the SentencePiece model was made, which has ids by place."""
        by_id = {number: text for text, number in self.ids.items() if number >= known}
        special = {
            number
            for number, token in self.backend.get_added_tokens_decoder().items()
            if token.special
        }
        return [
            (by_id[i], pieces.CONTROL if i in special else pieces.USER_DEFINED)
            if i in by_id
            else (f"<unused_{i}>", pieces.UNUSED)
            for i in range(known, self.next_id)
        ]


def source_pieces(directory: Path) -> list[str]:
    """The pieces of another tokenizer, in the order in which it merges them.

    Raises:
        FailedPrecondition: there is none, or no BPE.
    """
    path = pieces.find(directory)
    if path is not None:
        return pieces.candidates(pieces.read(path))
    if (directory / fast.FILE).is_file():
        vocab = Fast.read(directory / fast.FILE).vocab
        return sorted(vocab, key=lambda text: vocab[text])
    raise FailedPrecondition(
        f"pieces_from holds no tokenizer; expected {pieces.FILE} or {fast.FILE}"
    )


def _entries(made: Additions) -> list[tuple[str, int]]:
    return [(text, pieces.USER_DEFINED) for text in made.tokens] + [
        (text, pieces.NORMAL) for text in made.pieces
    ]


def _convert(directory: Path, proto: Any, target: Path) -> None:
    """Make the `tokenizer.json` of a directory that has a SentencePiece model alone."""
    if converted.convertible(proto):
        add_bos = special_tokens(directory).add_bos is not False
        data = converted.from_sentencepiece(proto, add_bos=add_bos)
        target.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
        return
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        loaded.backend_tokenizer.save(str(target))
    except Exception as error:  # whatever transformers makes of a broken directory
        raise FailedPrecondition(
            f"the tokenizer of {directory.name} cannot be loaded: {str(error)[:300]}"
        ) from error


def _add_to_config(path: Path, tokens: Mapping[str, int]) -> None:
    config = _config(path)
    if "added_tokens_decoder" in config:
        for text, number in tokens.items():
            config["added_tokens_decoder"][str(number)] = fast.added_token(text)
        _write(path, config)


def _load_as_it_is(path: Path, proto: Any) -> None:
    """Have transformers load the `tokenizer.json` that was made here.

    By LLaMA's own class transformers 5 would build another tokenizer from the same
    pieces, one that drops a leading space; with it go that class's defaults.
    """
    config = _config(path)
    trainer = proto.trainer_spec
    for name in ("bos", "eos", "unk"):
        number = getattr(trainer, f"{name}_id")
        if 0 <= number < len(proto.pieces):
            config.setdefault(f"{name}_token", proto.pieces[number].piece)
    config.setdefault("add_bos_token", True)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("legacy", None)
    _write(path, config)


def _config(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _add_to_map(path: Path, tokens: Mapping[str, int]) -> None:
    if not path.is_file():
        return
    _write(path, {**_config(path), **tokens})
