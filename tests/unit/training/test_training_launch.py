"""How many processes a training asks for, and who does what among them."""

import numpy as np
import pytest

from arriero.errors import InvalidArgument, Unavailable
from arriero.training import launch
from arriero.training.launch import torchrun_arguments
from arriero.training.ranks import ALONE, RANK_LOST, Ranks
from arriero.training.spec import resolve
from arriero.v1 import training_pb2


def spec(**fields) -> training_pb2.TrainSpec:
    return training_pb2.TrainSpec(**{"nodes": 1, "nproc_per_node": 1, **fields})


def test_one_process_needs_no_torchrun(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "_GPUS", tmp_path / "none")
    assert torchrun_arguments(spec(), {}) is None
    assert torchrun_arguments(spec(nproc_per_node=0), {}) is None


def test_several_do_and_a_cluster_has_the_last_word():
    assert torchrun_arguments(spec(nproc_per_node=3), {}) == [
        "--nnodes",
        "1",
        "--nproc-per-node",
        "3",
    ]
    assert torchrun_arguments(spec(nodes=2), {"PET_NNODES": "2"}) == ["--nproc-per-node", "1"]
    both = {"PET_NNODES": "4", "PET_NPROC_PER_NODE": "8"}
    assert torchrun_arguments(spec(nodes=2, nproc_per_node=2), both) == []


@pytest.mark.parametrize("world", [2, 3, 5])
def test_every_row_is_dealt_once_and_parts_are_as_many_on_each(world):
    rows = np.arange(10, 21)
    dealt = [Ranks(rank, world).share(rows) for rank in range(world)]
    assert sorted(np.concatenate(dealt)) == rows.tolist()
    for size in (1, 2, 4):
        parts = Ranks(0, world).parts(len(rows), size)
        assert parts == max(-(-len(own) // size) for own in dealt)


def test_alone_nothing_is_exchanged():
    assert ALONE.first
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.total([1.5]) == [1.5]
    assert ALONE.told("x") == "x"
    assert Ranks.join({}).world == 1


def test_a_lost_rank_is_named_as_such_and_other_errors_are_not():
    pytest.importorskip("torch")
    with pytest.raises(Unavailable) as caught, Ranks(0, 2).together():
        raise RuntimeError("[pair.cc:537] Read error: Connection reset by peer")
    assert caught.value.reason == RANK_LOST
    with pytest.raises(RuntimeError, match="shapes"), Ranks(0, 2).together():
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"nodes": 0}, "nodes", "at least 1"),
        ({"nproc_per_node": -1}, "nproc_per_node", "0 for one per GPU"),
        ({"nproc_per_node": 4, "batch_size": 2}, "batch_size", "a row for each"),
        ({"fsdp": True, "method": "full"}, "fsdp", "use method lora"),
        ({"fsdp": True, "load_in_4bit": True}, "fsdp", "quantized base"),
    ],
)
def test_processes_that_cannot_work_are_refused(context, fields, field, said):
    with pytest.raises(InvalidArgument) as caught:
        resolve(training_pb2.TrainSpec(**fields), context)
    found = {item.field: item.description for item in caught.value.violations}
    assert said in found[field]


def test_where_it_runs_is_no_part_of_the_result(context):
    keyed = resolve(training_pb2.TrainSpec(), context).unkeyed
    assert {"nodes", "nproc_per_node", "fsdp"} <= set(keyed)
