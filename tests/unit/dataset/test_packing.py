from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from arriero.dataset import arrow, packing


def sequences(lengths: list[int], capacity: int) -> list[list[int]]:
    packed = packing.pack(np.array(lengths, dtype=np.int64), capacity)
    cuts = np.cumsum(packed.counts)[:-1]
    return [part.tolist() for part in np.split(packed.order, cuts)]


def test_samples_share_sequences_and_none_is_too_long() -> None:
    assert sequences([60, 50, 40, 50], 100) == [[0, 2], [1, 3]]
    assert sequences([100, 1, 99], 100) == [[0], [1, 2]]


@pytest.mark.parametrize("count", [0, 1, 2, packing.WINDOW, 2 * packing.WINDOW + 17])
def test_every_sample_is_packed_once_and_little_room_is_left(count: int) -> None:
    lengths = np.random.default_rng(3).integers(1, 513, count)
    packed = packing.pack(lengths, 512)
    assert sorted(packed.order) == list(range(count))
    assert packed.counts.sum() == count
    if count:
        ends = np.cumsum(packed.counts)
        totals = np.add.reduceat(lengths[packed.order], np.concatenate(([0], ends[:-1])))
        assert totals.max() <= 512
    if count > 1000:
        assert lengths.sum() / (len(packed.counts) * 512) > 0.97
        again = packing.pack(lengths, 512)
        assert (again.order == packed.order).all()


def test_sequences_come_in_the_order_of_their_first_samples() -> None:
    made = sequences([10, 90, 20, 95, 5, 70], 100)
    assert [part[0] for part in made] == sorted(part[0] for part in made)
    assert all(part == sorted(part) for part in made)


def test_a_packed_file_says_where_samples_end(tmp_path: Path) -> None:
    with arrow.Spool(tmp_path / "spool") as spool:
        ids = np.arange(9, dtype=np.int32)
        spool.extend(arrow.marked(ids, ids % 4 != 1), np.array([2, 4, 3], dtype=np.int32))
        spool.flush()
        figures = arrow.write(
            tmp_path / "data.arrow",
            spool,
            np.array([2, 0, 1]),
            -100,
            counts=np.array([2, 1]),
        )
        assert spool.ids(1) == [2, 3, 4, 5]
    with pa.memory_map(str(tmp_path / "data.arrow")) as file:
        rows = pa.ipc.open_file(file).read_all().to_pylist()
    assert rows == [
        {"input_ids": [6, 7, 8, 0, 1], "labels": [-100, 7, 8, -100, -100], "lengths": [3, 2]},
        {"input_ids": [2, 3, 4, 5], "labels": [-100, 3, 4, -100], "lengths": [4]},
    ]
    assert (figures.rows, figures.samples, figures.tokens) == (2, 3, 9)
    assert (figures.trained_tokens, figures.max_length) == (4, 5)
    assert not (tmp_path / "spool").exists()


@pytest.mark.parametrize("tokens", [1, 7, 1 << 20])
def test_what_is_written_does_not_depend_on_the_batches(
    tmp_path: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrow, "_BATCH_TOKENS", tokens)
    with arrow.Spool(tmp_path / "spool") as spool:
        lengths = np.array([3, 1, 5, 2], dtype=np.int32)
        spool.extend(np.arange(11, dtype=np.int32), lengths)
        spool.flush()
        figures = arrow.write(tmp_path / "data.arrow", spool, np.array([3, 2, 1, 0]), -100)
    with pa.memory_map(str(tmp_path / "data.arrow")) as file:
        found = pa.ipc.open_file(file).read_all()
    assert found["input_ids"].to_pylist() == [[9, 10], [4, 5, 6, 7, 8], [3], [0, 1, 2]]
    assert found.column_names == ["input_ids", "labels"]
    assert figures.trained_tokens == 7
