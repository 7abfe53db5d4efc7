import numpy as np
import pytest

from arriero.dataset import selection
from arriero.errors import InvalidArgument


def rows(*numbers: int) -> selection.Rows:
    return np.array(numbers, dtype=np.int64)


def test_the_shuffle_never_changes() -> None:
    # These very numbers: a result's key promises the same rows for ever.
    assert selection.shuffled(np.arange(8), 42).tolist() == [4, 1, 2, 0, 5, 6, 3, 7]
    assert selection.shuffled(np.arange(8), 43).tolist() != [4, 1, 2, 0, 5, 6, 3, 7]


def test_the_shuffle_keeps_every_row_once() -> None:
    assert sorted(selection.shuffled(rows(5, 9, 2), -1)) == [2, 5, 9]
    many = selection.shuffled(np.arange(10_000), 7)
    assert (np.sort(many) == np.arange(10_000)).all()
    assert abs(np.corrcoef(many, np.arange(10_000))[0, 1]) < 0.03


def test_the_order_of_rows_does_not_depend_on_the_others() -> None:
    whole = selection.shuffled(np.arange(100), 1)
    part = selection.shuffled(np.arange(0, 100, 3), 1)
    assert [row for row in whole if row % 3 == 0] == part.tolist()


def test_weights_say_how_often_rows_are_taken() -> None:
    order = selection.mixed([np.arange(10), np.arange(10, 20), np.arange(20, 30)], [2, 0.5, 0], 3)
    taken = np.bincount(order, minlength=30)
    assert taken[:10].tolist() == [2] * 10
    assert (taken[10:20].sum(), taken[10:20].max()) == (5, 1)
    assert taken[20:].sum() == 0
    assert selection.mixed([np.arange(10)], [2.3], 3).tolist().count(4) in (2, 3)
    plain = selection.mixed([np.arange(5), np.arange(5, 9)], [1, 1], 3)
    assert plain.tolist() == selection.shuffled(np.arange(9), 3).tolist()


def test_no_copy_of_a_held_out_row_is_trained_on() -> None:
    order = selection.mixed([np.arange(10)], [3], 1)
    train, val = selection.split(order, 4)
    assert len(val) == len(set(val)) == 4
    assert len(train) == 18
    assert not set(train) & set(val)
    train, val = selection.split(rows(3, 1, 2), 1)
    assert (train.tolist(), val.tolist()) == ([1, 2], [3])
    assert selection.split(rows(3, 1), 0)[1].tolist() == []


@pytest.mark.parametrize(
    ("count", "size", "held_out"),
    [(10, 0, 0), (10, 3, 3), (10, 0.2, 2), (10, 0.01, 1), (1000, 0.1, 100), (3, 0.5, 2)],
)
def test_what_is_held_out(count: int, size: float, held_out: int) -> None:
    assert selection.held_out(count, size) == held_out


@pytest.mark.parametrize("size", [10, 11, 0.999])
def test_something_must_be_left_to_train_on(size: float) -> None:
    with pytest.raises(InvalidArgument, match="leaves none to train on"):
        selection.held_out(10, size)


@pytest.mark.parametrize("size", [-1, -0.1, 1.5, float("nan"), float("inf")])
def test_a_size_is_a_count_or_a_share(size: float) -> None:
    with pytest.raises(InvalidArgument, match="val_set_size"):
        selection.check_val_set_size(size)
