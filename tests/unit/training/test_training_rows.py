"""Rows are read from the map, and their order depends on seed and epoch alone."""

from pathlib import Path

import numpy as np
import pytest

from arriero.errors import DataLoss, FailedPrecondition
from arriero.training.rows import Rows, batches, check_ids, collate, read_facts

MASKED = -100
LENGTHS = np.random.default_rng(1).integers(1, 100, 203)


def test_rows_are_those_that_were_written_across_record_batches(tmp_path: Path, kit):
    written = kit.draw_rows(13)
    rows = Rows(kit.write_dataset(tmp_path, written, chunk=4))
    assert len(rows) == 13
    for i, (ids, start) in enumerate(written):
        assert rows.ids(i).tolist() == ids
        assert rows.labels(i).tolist() == [MASKED] * start + ids[start:]
    assert rows.largest_id == max(max(ids) for ids, _ in written)
    assert rows.trained(range(13)) == read_facts(tmp_path)["trained_tokens"]


def test_every_row_comes_once_an_epoch():
    for grouped in (False, True):
        cut = batches(LENGTHS, batch_size=16, seed=3, epoch=0, group_by_length=grouped)
        assert sorted(np.concatenate(cut)) == list(range(203))
        assert sorted(len(batch) for batch in cut)[:2] == [11, 16]


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        cut = batches(LENGTHS, batch_size=4, seed=seed, epoch=epoch)
        return np.concatenate(cut).tolist()

    assert order(7, 2) == order(7, 2)
    assert order(7, 2) != order(7, 3)
    assert order(7, 2) != order(8, 2)
    assert order(-1, 0) == order(-1, 0)


def test_grouping_by_length_pads_less_and_keeps_batches_shuffled():
    def padded(grouped: bool) -> int:
        cut = batches(LENGTHS, batch_size=8, seed=0, epoch=0, group_by_length=grouped)
        return sum(int(LENGTHS[batch].max()) * len(batch) for batch in cut)

    assert padded(True) < 0.8 * padded(False)
    firsts = [
        LENGTHS[b[0]] for b in batches(LENGTHS, batch_size=8, seed=0, epoch=0, group_by_length=True)
    ]
    assert firsts != sorted(firsts, reverse=True)


def test_rows_of_a_micro_batch_lie_one_after_the_other(tmp_path: Path, kit):
    rows = Rows(kit.write_dataset(tmp_path, [([9, 10], 1), ([5, 6, 7, 8], 2), ([3], 0)]))
    micro = collate(rows, [0, 1, 2])
    assert micro.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 3]]
    assert micro.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0]]
    assert micro.lengths == (4, 2, 1)
    # 6 predicts 7, 7 predicts 8, 9 predicts 10; nothing predicts 5, 9 and 3.
    assert micro.positions.tolist() == [1, 2, 4]
    assert micro.labels.tolist() == [7, 8, 10]


def test_samples_that_do_not_add_up_to_their_row_are_data_loss(tmp_path: Path):
    import pyarrow as pa

    kind = pa.list_(pa.int32())
    schema = pa.schema([(name, kind) for name in ("input_ids", "labels", "lengths")])
    columns = [pa.array([values], type=kind) for values in ([1, 2, 3], [1, 2, 3], [1, 1])]
    with (
        pa.OSFile(str(tmp_path / "data.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        writer.write_batch(pa.record_batch(columns, schema=schema))
    with pytest.raises(DataLoss, match="do not add up"):
        Rows(tmp_path)


def test_ids_without_an_embedding_are_refused_with_the_figures(tmp_path: Path, kit):
    rows = Rows(kit.write_dataset(tmp_path, [([5, 400], 1)]))
    check_ids(rows, 401, what="dataset")
    with pytest.raises(FailedPrecondition, match="id 400, the model has 384") as caught:
        check_ids(rows, 384, what="dataset")
    assert caught.value.reason == "TOKENIZER_MISMATCH"


def test_damaged_files_are_data_loss(tmp_path: Path, kit):
    kit.write_dataset(tmp_path, kit.draw_rows(3))
    (tmp_path / "data.arrow").write_bytes(b"ARROW1 but not really")
    with pytest.raises(DataLoss, match="expected an Arrow file"):
        Rows(tmp_path)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(DataLoss, match="prepare the dataset again"):
        read_facts(tmp_path)
