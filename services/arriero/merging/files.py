"""Which files of a model or an adapter are kept, and copying them.

Responsibility: the lists, the copy with progress, sha256, the form of JSON files.
Does not know what is in them.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from arriero.prompts import FILE_NAME as TEMPLATE_FILE
from arriero.weights.tokenizers import FILES as TOKENIZER

__all__ = [
    "ADAPTER_EXTRAS",
    "LICENCES",
    "MODEL_EXTRAS",
    "TEMPLATE_FILE",
    "TOKENIZER",
    "copy_files",
    "matching",
    "sha256_of",
    "write_json",
]

Tick = Callable[[int, int], None]
LICENCES = ("LICEN[CS]E*", "COPYING*", "NOTICE*", "USE_POLICY*")
# Beside the weights. Code (`*.py`) is never kept: nothing here would run it.
MODEL_EXTRAS = (
    "config.json",
    "generation_config.json",
    *TOKENIZER,
    TEMPLATE_FILE,
    *LICENCES,
)
ADAPTER_EXTRAS = ("adapter_config.json", *TOKENIZER, TEMPLATE_FILE, *LICENCES)
_CHUNK = 1 << 23


def matching(files: Iterable[Path], patterns: Iterable[str]) -> list[Path]:
    """The files whose name fits one of the patterns (case matters)."""
    wanted = tuple(patterns)
    return [
        path for path in files if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in wanted)
    ]


def copy_files(files: Iterable[Path], target: Path, tick: Tick) -> None:
    """Copy files under their own names; links are followed, modes are not kept.

    Args:
        files: to copy.
        target: directory.
        tick: called with bytes so far and in all.
    """
    paths = list(files)
    total = sum(path.stat().st_size for path in paths)
    done = 0
    for path in paths:
        with path.open("rb") as source, (target / path.name).open("wb") as sink:
            while chunk := source.read(_CHUNK):
                sink.write(chunk)
                done += len(chunk)
                tick(done, total)


def sha256_of(path: Path, tick: Tick) -> str:
    """A file's sha256 in hex."""
    digest = hashlib.sha256()
    total = path.stat().st_size
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            tick(done, total)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """As transformers writes its configurations: indented, characters as they are."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
