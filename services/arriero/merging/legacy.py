"""Old checkpoints as they are found, put right.

Responsibility: the known mistakes in the small files of early LLaMA
conversions: class names that no library has, empty special tokens, ids of other
tokens, no generation settings. Changes nothing that may be meant so; does not
look at weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arriero.errors import DataLoss, FailedPrecondition
from arriero.merging.files import write_json
from arriero.merging.tokenizer_model import is_ranks, write_fast

__all__ = ["normalise"]

# Early conversions were made before transformers settled the spelling.
_CLASSES = {
    "LLaMAForCausalLM": "LlamaForCausalLM",
    "LLaMATokenizer": "LlamaTokenizer",
    "LLaMATokenizerFast": "LlamaTokenizerFast",
    "LLaMAModel": "LlamaModel",
}
# What an id must never be: no text begins with the unknown token, none ends with the first.
_NEVER = {"bos": ("unk_token",), "eos": ("unk_token", "bos_token")}
_SPECIAL = ("bos_token", "eos_token", "unk_token")


def normalise(directory: Path) -> list[str]:
    """Put right the files of a model in place.

    Returns:
        What was changed, for people; empty for a healthy model.
    """
    changes: list[str] = []
    config = _read(directory / "config.json")
    tokens = _sentencepiece(directory / "tokenizer.model")
    if config is None:
        return changes
    before = json.dumps(config)
    _classes(config, changes)
    if "max_position_embeddings" not in config and "max_sequence_length" in config:
        config["max_position_embeddings"] = config.pop("max_sequence_length")
        changes.append("config.json: max_sequence_length is called max_position_embeddings now")
    _ids(config, "config.json", tokens, config.get("vocab_size"), changes)
    if json.dumps(config) != before:
        write_json(directory / "config.json", config)
    _tokenizer(directory, tokens, changes)
    _generation(directory, config, tokens, changes)
    return changes


def _classes(config: dict[str, Any], changes: list[str]) -> None:
    names = config.get("architectures")
    if isinstance(names, list):
        for i, name in enumerate(names):
            if name in _CLASSES:
                names[i] = _CLASSES[name]
                changes.append(f"config.json: {name} is spelled {names[i]}")


def _ids(
    config: dict[str, Any],
    file: str,
    tokens: Mapping[str, tuple[int, str]],
    vocabulary: Any,
    changes: list[str],
) -> None:
    """Ids of special tokens that are no ids, or plainly another token's."""
    for key in ("bos", "eos", "pad"):
        field = f"{key}_token_id"
        found = config.get(field)
        if not isinstance(found, int):
            continue
        right = tokens.get(f"{key}_token")
        others = {tokens[name][0] for name in _NEVER.get(key, ()) if name in tokens}
        outside = found < 0 or (isinstance(vocabulary, int) and found >= vocabulary)
        if right is not None and found != right[0] and (outside or found in others):
            config[field] = right[0]
            changes.append(f"{file}: {field} was {found}, the tokenizer's is {right[0]}")
        elif outside:
            del config[field]
            changes.append(f"{file}: {field} {found} is no id of the vocabulary; taken out")


def _tokenizer(directory: Path, tokens: Mapping[str, tuple[int, str]], changes: list[str]) -> None:
    path = directory / "tokenizer_config.json"
    settings = _read(path)
    if settings is None:
        settings = {}
    before = json.dumps(settings)
    name = settings.get("tokenizer_class")
    if name in _CLASSES:
        settings["tokenizer_class"] = _CLASSES[name]
        changes.append(f"tokenizer_config.json: {name} is spelled {_CLASSES[name]}")
    for key in _SPECIAL:
        if settings.get(key) == "" and key in tokens:
            settings[key] = tokens[key][1]
            changes.append(f"tokenizer_config.json: {key} was empty, it is {tokens[key][1]!r}")
    if json.dumps(settings) != before:
        write_json(path, settings)
    _fast(directory, tokens, changes)
    path = directory / "special_tokens_map.json"
    known = _read(path)
    if known is not None and tokens:
        missing = [key for key in _SPECIAL if not known.get(key) and key in tokens]
        if missing:
            known.update({key: tokens[key][1] for key in missing})
            write_json(path, known)
            changes.append(f"special_tokens_map.json: {', '.join(missing)} filled in")


def _fast(directory: Path, tokens: Mapping[str, tuple[int, str]], changes: list[str]) -> None:
    """Give a tokenizer that is SentencePiece alone a `tokenizer.json` with its very ids.

    What transformers would make of it drops a leading space, so that training
    and llama.cpp would see different ids.
    """
    model, path = directory / "tokenizer.model", directory / "tokenizer.json"
    if not tokens or path.exists() or (directory / "added_tokens.json").exists():
        return
    settings = _read(directory / "tokenizer_config.json") or {}
    try:
        found = write_fast(model, path)
    except (DataLoss, FailedPrecondition):  # not LLaMA's: left to whoever reads it
        return
    added = settings.get("added_tokens_decoder") or {}
    if any(int(i) >= found.size for i in added):
        path.unlink()
        return
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key, text in found.names.items():
        if not settings.get(key):
            settings[key] = text
    write_json(directory / "tokenizer_config.json", settings)
    changes.append("tokenizer.json was missing; written with the ids of tokenizer.model")
    changes += found.warnings


def _generation(
    directory: Path,
    config: Mapping[str, Any],
    tokens: Mapping[str, tuple[int, str]],
    changes: list[str],
) -> None:
    path = directory / "generation_config.json"
    settings = _read(path)
    if settings is not None:
        before = json.dumps(settings)
        _ids(settings, path.name, tokens, config.get("vocab_size"), changes)
        if json.dumps(settings) != before:
            write_json(path, settings)
        return
    ids = {
        key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None
    }
    if ids and not path.exists():
        write_json(path, {"_from_model_config": True, **ids})
        said = ", ".join(f"{key} {value}" for key, value in ids.items())
        changes.append(f"generation_config.json was missing; written with {said}")


def _sentencepiece(path: Path) -> dict[str, tuple[int, str]]:
    """Id and text of the special tokens of a SentencePiece model; empty without one."""
    if not path.is_file() or is_ranks(path):
        return {}
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):  # something else; whoever needs it says so
        return {}
    ids = {
        "unk_token": processor.unk_id(),
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
    }
    return {key: (i, processor.id_to_piece(i)) for key, i in ids.items() if i >= 0}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
