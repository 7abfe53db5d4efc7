"""`config.json` of a model, as far as its tensors' layout depends on it.

Responsibility: read it, and say what is tied and which way weights lie. Does
not know names or shapes of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arriero.errors import FailedPrecondition

__all__ = ["CONV1D_TYPES", "is_tied", "read_config"]

# transformers' models whose linear layers keep (in, out) weights.
CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a model; raises as `read_object`."""
    return read_object(directory / "config.json", "a Hugging Face model directory")


def read_object(path: Path, expected: str) -> dict[str, Any]:
    """A JSON object of a directory that was `expected`.

    Raises:
        FailedPrecondition: missing, or not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FailedPrecondition(
            f"{path.parent.name} holds no {path.name}; expected {expected}"
        ) from error
    except ValueError as error:
        raise FailedPrecondition(f"{path.name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise FailedPrecondition(f"{path.name} is not a JSON object")
    return found


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output layer is the embeddings again."""
    return bool(config.get("tie_word_embeddings", False))
