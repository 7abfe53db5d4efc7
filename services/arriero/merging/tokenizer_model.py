"""Meta's `tokenizer.model`, in both of its formats, and Hugging Face's tokenizer files.

Responsibility: SentencePiece (LLaMA, Llama 2) and tiktoken ranks (Llama 3) to
`tokenizer.json` and `tokenizer_config.json` with the same ids, and ranks back
from `tokenizer.json`. Does not know weights.
"""

from __future__ import annotations

import base64
import binascii
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arriero.errors import DataLoss, FailedPrecondition
from arriero.merging.files import write_json

__all__ = ["Vocabulary", "ids_of", "is_ranks", "read_tokenizer", "write_fast", "write_ranks"]

# Meta's reserved tokens of Llama 3, in order; 3.1 gave names to some of them.
_RESERVED = 256
_LLAMA_3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|reserved_special_token_2|>",
    "<|reserved_special_token_3|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
)
_LLAMA_3_1 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
# What ends a turn; generation stops at each.
_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
# Strings by which the written tokenizer is held against the SentencePiece model.
_PROBES = (
    "Hello, world!  Two spaces, \ttab\n\nand lines.",
    " leading space",
    "def f(x):\n    return x ** 2  # 3.14",
    "Überraschung – ¿qué? 世界 こんにちは мир 🦙",
    "1234567890 10000000",
)


class Vocabulary:
    """What is known of a tokenizer once its files are written.

    Attributes:
        size: ids, special ones included.
        bos, eos: ids.
        stops: ids at which generation stops; empty: at `eos`.
        tiktoken: whether it came from ranks.
        names: special tokens by their role, such as `bos_token`.
        warnings: what is not quite as it was.
    """

    def __init__(
        self, size: int, bos: int, eos: int, stops: Sequence[int] = (), *, tiktoken: bool = False
    ) -> None:
        self.size, self.bos, self.eos = size, bos, eos
        self.stops = list(stops)
        self.tiktoken = tiktoken
        self.names: dict[str, str] = {}
        self.warnings: list[str] = []


def is_ranks(path: Path) -> bool:
    """Whether a `tokenizer.model` is text with a base64 token and its rank on each line."""
    with path.open("rb") as file:
        first = file.readline(4096).split()
    if len(first) != 2 or not first[1].isdigit():
        return False
    try:
        base64.b64decode(first[0], validate=True)
    except (binascii.Error, ValueError):
        return False
    return True


def ids_of(path: Path) -> int | None:
    """Ids that Meta's code has with a `tokenizer.model`; None for another kind of file."""
    if is_ranks(path):
        return len(_read_ranks(path)) + _RESERVED
    import sentencepiece

    try:
        return int(sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size())
    except (RuntimeError, OSError):
        return None


def read_tokenizer(path: Path, target: Path, *, named_reserved: bool, context: int) -> Vocabulary:
    """Write a Hugging Face tokenizer with the ids of `tokenizer.model` into `target`.

    Args:
        path: Meta's file.
        target: directory of the model.
        named_reserved: Llama 3.1's names for reserved tokens.
        context: tokens, recorded as `model_max_length`.

    Raises:
        DataLoss: neither a SentencePiece model nor tiktoken ranks.
        FailedPrecondition: a SentencePiece model that is not BPE.
    """
    if is_ranks(path):
        return _from_ranks(path, target, named_reserved=named_reserved, context=context)
    return _from_sentencepiece(path, target, context=context)


# --- SentencePiece --------------------------------------------------------------------


def _from_sentencepiece(path: Path, target: Path, *, context: int) -> Vocabulary:
    vocabulary = write_fast(path, target / "tokenizer.json")
    tokens = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    _write_config(target, vocabulary.names, context=context, tokens=tokens)
    shutil.copyfile(path, target / "tokenizer.model")
    return vocabulary


def write_fast(path: Path, target: Path) -> Vocabulary:
    """Write `tokenizer.json` with the ids of a SentencePiece model.

    Raises:
        DataLoss: not a SentencePiece model. FailedPrecondition: not a BPE one.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as model_pb2
    from tokenizers import Tokenizer

    data = path.read_bytes()
    proto = model_pb2.ModelProto()
    try:
        proto.ParseFromString(data)
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    except Exception as error:  # protobuf's and SentencePiece's own
        raise DataLoss(
            f"{path.name} is neither a SentencePiece model nor tiktoken ranks "
            f"({type(error).__name__}); fetch it again"
        ) from error
    if proto.trainer_spec.model_type != model_pb2.TrainerSpec.BPE:
        raise FailedPrecondition(f"{path.name} is no BPE model; expected LLaMA's tokenizer.model")
    pieces = [piece.piece for piece in proto.pieces]
    kinds = model_pb2.ModelProto.SentencePiece
    special = [i for i, p in enumerate(proto.pieces) if p.type in (kinds.UNKNOWN, kinds.CONTROL)]
    added = [i for i, p in enumerate(proto.pieces) if p.type == kinds.USER_DEFINED]
    unknown, bos, eos = processor.unk_id(), processor.bos_id(), processor.eos_id()
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = [
        {"id": i, "content": pieces[i], **flags, "special": i in special}
        for i in sorted([*special, *added])
    ]
    scores = [piece.score for piece in proto.pieces]
    merges = _merges(pieces, scores)
    begin = {"SpecialToken": {"id": pieces[bos], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    prefix = [{"type": "Prepend", "prepend": "▁"}] if proto.normalizer_spec.add_dummy_prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    fast: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *prefix,
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, begin, second],
            "special_tokens": {
                pieces[bos]: {"id": pieces[bos], "ids": [bos], "tokens": [pieces[bos]]}
            },
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
    }
    write_json(target, fast)
    vocabulary = Vocabulary(len(pieces), bos, eos)
    vocabulary.names = {
        "bos_token": pieces[bos],
        "eos_token": pieces[eos],
        "unk_token": pieces[unknown],
    }
    written = Tokenizer.from_file(str(target))
    made = {left + right for left, right in merges}
    competing = Counter(score for piece, score in zip(pieces, scores, strict=True) if piece in made)
    if equal := sum(count for count in competing.values() if count > 1):
        vocabulary.warnings.append(
            f"{equal} pieces of {path.name} share their scores with others: where those compete, "
            "tokenizer.json gives other ids, since a list of merges has no equals"
        )
    for probe in _PROBES:
        if written.encode(probe, add_special_tokens=False).ids != processor.encode(probe):
            vocabulary.warnings.append(
                f"tokenizer.json gives other ids than {path.name} for {probe!r}"
            )
    return vocabulary


def _merges(pieces: Sequence[str], scores: Sequence[float]) -> list[list[str]]:
    """The pairs that make each piece, likeliest piece first, as SentencePiece merges."""
    known = {piece: i for i, piece in enumerate(pieces)}
    found: list[tuple[float, int, int, list[str]]] = []
    for i, piece in enumerate(pieces):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                found.append((-scores[i], known[left], known[right], [left, right]))
    found.sort(key=lambda merge: merge[:3])
    return [merge[3] for merge in found]


# --- tiktoken -------------------------------------------------------------------------


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (binascii.Error, ValueError) as error:
        raise DataLoss(
            f"{path.name} is damaged: line {len(ranks) + 1} is not a base64 token and its rank; "
            "fetch it again"
        ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataLoss(f"{path.name} is damaged: its ranks are not 0 to {len(ranks) - 1}")
    return ranks


def _from_ranks(path: Path, target: Path, *, named_reserved: bool, context: int) -> Vocabulary:
    from tokenizers import processors
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = _read_ranks(path)

    class Converter(TikTokenConverter):  # type: ignore[misc]
        """With the ranks at hand, so that the package tiktoken need not be there."""

        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            """The ranks."""
            return ranks

    named = _LLAMA_3_1 if named_reserved else _LLAMA_3
    used = sum(name.startswith("<|reserved") for name in named)
    reserved = [f"<|reserved_special_token_{used + i}|>" for i in range(_RESERVED - len(named))]
    special = [*named, *reserved]
    converted = Converter(vocab_file=str(path), extra_special_tokens=special).converted()
    bos = len(ranks)
    begin, end = special[0], special[1]
    converted.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{begin}:0 $A:0",
                pair=f"{begin}:0 $A:0 {begin}:1 $B:1",
                special_tokens=[(begin, bos)],
            ),
        ]
    )
    converted.save(str(target / "tokenizer.json"))
    tokens = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    names = {"bos_token": begin, "eos_token": end}
    _write_config(target, names, context=context, tokens=tokens)
    stops = [bos + special.index(name) for name in _STOPS if name in special]
    return Vocabulary(
        len(ranks) + len(special), bos, bos + special.index(end), stops, tiktoken=True
    )


def write_ranks(tokenizer: Path, path: Path) -> int:
    """Write the tiktoken ranks of a byte-level BPE `tokenizer.json`; returns how many.

    Raises:
        FailedPrecondition: not such a vocabulary, or one whose ids are not its ranks.
        DataLoss: not a tokenizer's file.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    try:
        data = json.loads(tokenizer.read_text(encoding="utf-8"))
        model = data["model"]
        vocabulary: dict[str, int] = model["vocab"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges", [])]
        special = {token["content"] for token in data["added_tokens"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataLoss(f"{tokenizer.name} is not a tokenizer's file: {error}") from error
    # Each merge makes its piece at its rank, else tiktoken would merge in another order.
    made = [vocabulary.get("".join(pair), -1) for pair in merges]
    if model.get("type") != "BPE" or not model.get("ignore_merges") or made != sorted(made):
        raise FailedPrecondition(
            "its tokenizer is neither SentencePiece nor ranked byte pairs, so Meta's code has no "
            "tokenizer.model for it"
        )
    decoder = {char: byte for byte, char in bytes_to_unicode().items()}
    entries = sorted((i, token) for token, i in vocabulary.items() if token not in special)
    if [i for i, _ in entries] != list(range(len(entries))):
        raise FailedPrecondition("the ids of its tokenizer have gaps; tiktoken's ranks have none")
    with path.open("wb") as sink:
        for i, token in entries:
            try:
                raw = bytes(decoder[char] for char in token)
            except KeyError as error:
                raise FailedPrecondition(
                    f"token {token!r} is not made of bytes; Meta's code has no tokenizer.model "
                    "for it"
                ) from error
            sink.write(base64.b64encode(raw) + b" " + str(i).encode() + b"\n")
    return len(entries)


def _write_config(
    target: Path, names: dict[str, str], *, context: int, tokens: Sequence[dict[str, Any]]
) -> None:
    write_json(target / "special_tokens_map.json", names)
    write_json(
        target / "tokenizer_config.json",
        {
            # Not LlamaTokenizer: transformers 5 would rebuild the tokenizer then, and
            # drop a leading space that SentencePiece keeps.
            "tokenizer_class": "PreTrainedTokenizerFast",
            **names,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
            "added_tokens_decoder": {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"}
                for token in tokens
            },
        },
    )
