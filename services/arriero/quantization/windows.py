"""Where perplexity is measured: windows of a text, or the rows of a dataset.

Responsibility: cut token ids into windows and say what is scored in them. Does not
know models or logits.

Texts are cut as llama.cpp's `llama-perplexity` does, so that figures agree: the
ids of the whole text in windows of `n_ctx`, the first of each replaced by BOS
where the model begins texts with one, and only the second half scored, so that
every scored token has at least half a window before it. What is left over at the
end is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from arriero.errors import FailedPrecondition
from arriero.quantization.rows import samples

# In a dataset's labels: not trained on, so not scored.
_MASKED = -100
# In `Window.targets`: not scored.
UNSCORED = -1


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that are evaluated alone, from position 0.

    Attributes:
        tokens: int32, shape (n,).
        targets: int32, shape (n,): the token that follows tokens[i], or
            `UNSCORED` where that is not scored.
    """

    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]

    @property
    def scored(self) -> int:
        """How many tokens count."""
        return int((self.targets != UNSCORED).sum())


def of_text(ids: Sequence[int], n_ctx: int, *, bos: int | None, limit: int = 0) -> list[Window]:
    """The windows of a text.

    Args:
        ids: of the whole text, its own BOS included.
        n_ctx: tokens of a window, at least 4.
        bos: what each window begins with; None leaves its first token.
        limit: windows at most; 0 for all.

    Raises:
        FailedPrecondition: the text is too short for one window.
    """
    count = len(ids) // n_ctx
    if not count:
        raise FailedPrecondition(
            f"the text has {len(ids)} tokens, expected at least {n_ctx} for one window of "
            f"context {n_ctx}; take a longer text or a smaller context",
            reason="TEXT_TOO_SHORT",
        )
    windows = []
    for start in range(0, min(count, limit or count) * n_ctx, n_ctx):
        own = np.asarray(ids[start : start + n_ctx], dtype=np.int32)
        targets = np.full(n_ctx, UNSCORED, dtype=np.int32)
        targets[n_ctx // 2 : -1] = own[n_ctx // 2 + 1 :]
        if bos is not None:
            own[0] = bos
        windows.append(Window(own, targets))
    return windows


def of_rows(directory: Path, *, limit: int = 0) -> list[Window]:
    """The rows of a prepared dataset (a packed row's samples), each a window; what is
    trained on is scored.

    The mean over all of them is what a training calls its evaluation loss.

    Args:
        directory: of the dataset artifact.
        limit: rows at most; 0 for all.

    Raises:
        FailedPrecondition: no rows, no trained token, or raw rows.
        DataLoss: a damaged file.
    """
    windows: list[Window] = []
    for ids, labels in samples(directory):
        if limit and len(windows) == limit:
            break
        if not ids:
            continue
        targets = np.full(len(ids), UNSCORED, dtype=np.int32)
        following = np.array(labels[1:], dtype=np.int32)
        targets[:-1] = np.where(following == _MASKED, UNSCORED, following)
        windows.append(Window(np.array(ids, dtype=np.int32), targets))
    if not windows:
        raise FailedPrecondition(
            "the dataset has no rows, expected at least one; name a split that holds some, such "
            "as rows.train",
            reason="NO_ROWS",
        )
    if not any(window.scored for window in windows):
        raise FailedPrecondition(
            f"none of the dataset's {len(windows)} rows has a trained token, so nothing can be "
            "scored; prepare it with a larger cutoff_len",
            reason="NO_ROWS",
        )
    return windows
