import pytest

from arriero.dataset import selection
from arriero.errors import InvalidArgument


def test_the_shuffle_never_changes() -> None:
    # These very numbers: a result's key promises the same rows for ever.
    assert selection.shuffled(range(8), 42) == selection.shuffled(range(8), 42)
    assert selection.shuffled(range(8), 42) == [0, 4, 7, 5, 2, 1, 6, 3]
    assert selection.shuffled(range(8), 43) != selection.shuffled(range(8), 42)


def test_the_shuffle_keeps_every_row_once() -> None:
    assert sorted(selection.shuffled([5, 9, 2], -1)) == [2, 5, 9]


@pytest.mark.parametrize(
    ("rows", "size", "count"),
    [(10, 0, 0), (10, 3, 3), (10, 0.2, 2), (10, 0.01, 1), (1000, 0.1, 100), (3, 0.5, 2)],
)
def test_what_is_held_out(rows: int, size: float, count: int) -> None:
    assert selection.held_out(rows, size) == count


@pytest.mark.parametrize("size", [10, 11, 0.999])
def test_something_must_be_left_to_train_on(size: float) -> None:
    with pytest.raises(InvalidArgument, match="leaves none to train on"):
        selection.held_out(10, size)


@pytest.mark.parametrize("size", [-1, -0.1, 1.5, float("nan"), float("inf")])
def test_a_size_is_a_count_or_a_share(size: float) -> None:
    with pytest.raises(InvalidArgument, match="val_set_size"):
        selection.check_val_set_size(size)
