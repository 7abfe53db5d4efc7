"""From the last layer's output after each token to one vector for a text.

Responsibility: pool and normalise. Does not know models or contexts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from arriero.errors import FailedPrecondition

Vectors = npt.NDArray[np.float32]
# What a file that says nothing gets: those of generating models do not.
DEFAULT = "mean"
_KNOWN = ("mean", "cls", "last")


def check_pooling(kind: str) -> str:
    """How to pool for a model.

    Args:
        kind: as its file says; empty where it says nothing.

    Raises:
        FailedPrecondition: the model ranks texts, or pools in an unknown way.
    """
    if kind and kind not in _KNOWN:
        raise FailedPrecondition(
            f"this model pools by {kind}, which makes no embeddings; expected {', '.join(_KNOWN)}",
            reason="NO_EMBEDDINGS",
        )
    return kind or DEFAULT


def pooled(rows: Vectors, kind: str, *, normalize: bool) -> Vectors:
    """One vector of shape (width,).

    Args:
        rows: outputs after each token, shape (tokens, width).
        kind: `mean`, `cls` (the first token) or `last`.
        normalize: to a Euclidean length of 1.
    """
    if kind == "mean":
        vector = rows.mean(axis=0, dtype=np.float64)
    else:
        vector = rows[0 if kind == "cls" else -1].astype(np.float64)
    length = float(np.linalg.norm(vector))
    if normalize and length > 0:
        vector = vector / length
    result: Vectors = vector.astype(np.float32)
    return result
