from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from arriero.errors import DataLoss, FailedPrecondition
from arriero.quantization import windows

WriteRows = Callable[..., Path]


def test_only_the_second_half_of_a_window_is_scored_and_what_is_left_over_is_not_used() -> None:
    cut = windows.of_text(range(100, 121), 8, bos=None)
    assert [window.tokens.tolist() for window in cut] == [
        list(range(100, 108)),
        list(range(108, 116)),
    ]
    assert cut[0].targets.tolist() == [-1, -1, -1, -1, 105, 106, 107, -1]
    assert [window.scored for window in cut] == [3, 3]


def test_each_window_begins_with_bos_and_scores_the_texts_own_tokens() -> None:
    first, second = windows.of_text(range(100, 116), 8, bos=1)
    assert first.tokens.tolist() == [1, *range(101, 108)]
    assert second.tokens.tolist() == [1, *range(109, 116)]
    assert second.targets.tolist()[4:] == [113, 114, 115, -1]


def test_windows_may_be_limited() -> None:
    assert len(windows.of_text(range(800), 8, bos=None, limit=3)) == 3
    assert len(windows.of_text(range(16), 8, bos=None, limit=3)) == 2


def test_a_text_too_short_for_one_window_is_refused_with_the_figures() -> None:
    with pytest.raises(FailedPrecondition, match=r"7 tokens, expected at least 8 .* context 8"):
        windows.of_text(range(7), 8, bos=1)


def test_rows_are_scored_where_they_are_trained_on(tmp_path: Path, write_tokens: WriteRows) -> None:
    write_tokens(tmp_path, [([1, 5, 6, 7], [-100, -100, 6, 7]), ([1, 8], [1, 8])])
    first, second = windows.of_rows(tmp_path)
    assert first.tokens.tolist() == [1, 5, 6, 7]
    assert first.targets.tolist() == [-1, 6, 7, -1]
    assert second.targets.tolist() == [8, -1]
    assert len(windows.of_rows(tmp_path, limit=1)) == 1


@pytest.mark.parametrize(
    ("rows", "words"),
    [([], "no rows"), ([([1, 2], [-100, -100])], "none of the dataset's 1 rows has a trained")],
)
def test_a_dataset_without_anything_to_score_is_refused(
    tmp_path: Path,
    write_tokens: WriteRows,
    rows: list[tuple[list[int], list[int]]],
    words: str,
) -> None:
    with pytest.raises(FailedPrecondition, match=words):
        windows.of_rows(write_tokens(tmp_path, rows))


def test_raw_and_damaged_rows_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="not prepared"):
        windows.of_rows(tmp_path)
    (tmp_path / "data.arrow").write_bytes(b"ARROW1" + bytes(64))
    with pytest.raises(DataLoss, match="cannot be read"):
        windows.of_rows(tmp_path)


def test_targets_are_what_the_logits_of_a_position_predict() -> None:
    (window,) = windows.of_text(range(100, 108), 8, bos=None)
    at = np.flatnonzero(window.targets != windows.UNSCORED)
    assert (window.targets[at] == window.tokens[at + 1]).all()
