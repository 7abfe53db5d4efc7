"""Writing safetensors tensor by tensor."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arriero.errors import DiskFull, Internal, InvalidArgument
from arriero.weights import TensorPlan, Weights, WeightsWriter, sink

TENSORS = {
    "norm": torch.arange(5, dtype=torch.bfloat16),
    "wide": torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
    "scalar": torch.tensor(2.5, dtype=torch.float16),
    "ids": torch.arange(3, dtype=torch.int64),
    "none": torch.empty(0, 3),
}


def plan() -> list[TensorPlan]:
    words = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    return [TensorPlan(n, words[t.dtype], tuple(t.shape)) for n, t in TENSORS.items()]


def test_safetensors_reads_what_is_written_in_any_order(tmp_path: Path) -> None:
    with WeightsWriter(tmp_path, plan()) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
    loaded = load_file(str(tmp_path / "model.safetensors"))
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].equal(tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_every_tensor_is_aligned_to_its_element(tmp_path: Path) -> None:
    with WeightsWriter(tmp_path, plan()) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    for info in Weights.open(tmp_path).values():
        assert info.start % max(1, TENSORS[info.name].element_size()) == 0


def test_transposed_tensors_are_written_in_their_order(tmp_path: Path) -> None:
    turned = TENSORS["wide"].T
    with WeightsWriter(tmp_path, [TensorPlan("w", "F32", (6, 4))]) as writer:
        writer.write("w", turned)
    assert load_file(str(tmp_path / "model.safetensors"))["w"].equal(turned)


def test_shards_are_named_and_indexed_as_transformers_does(tmp_path: Path) -> None:
    with WeightsWriter(tmp_path, plan(), max_shard_size=30) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    names = [path.name for path in writer.files]
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(item.nbytes for item in plan())
    assert index["weight_map"]["wide"] == names[1]  # larger than a shard: alone in its own
    for name, tensor in TENSORS.items():
        assert load_file(str(tmp_path / index["weight_map"][name]))[name].equal(tensor)
    weights = Weights.open(tmp_path)
    assert weights.tensor("wide").equal(TENSORS["wide"])


def test_raw_bytes_are_written_as_they_are(tmp_path: Path) -> None:
    data = bytes(range(12))
    with WeightsWriter(tmp_path, [TensorPlan("x", "F32", (3,))]) as writer:
        writer.write_raw("x", memoryview(data))
    assert bytes(Weights.open(tmp_path).raw("x")) == data


def test_a_forgotten_tensor_is_an_error(tmp_path: Path) -> None:
    writer = WeightsWriter(tmp_path, plan())
    writer.write("norm", TENSORS["norm"])
    with pytest.raises(Internal, match="4 planned tensors were not written"):
        writer.close()


def test_another_error_is_not_hidden_by_forgotten_tensors(tmp_path: Path) -> None:
    with pytest.raises(KeyError), WeightsWriter(tmp_path, plan()):
        raise KeyError("first")


def test_tensors_other_than_planned_are_refused(tmp_path: Path) -> None:
    writer = WeightsWriter(tmp_path, [TensorPlan("x", "F32", (3,))])
    with pytest.raises(Internal, match="not planned"):
        writer.write("y", torch.zeros(3))
    with pytest.raises(Internal, match="planned was"):
        writer.write("x", torch.zeros(3, dtype=torch.float16))
    with pytest.raises(Internal, match="planned were 12"):
        writer.write_raw("x", memoryview(b"1234"))
    writer.write("x", torch.zeros(3))
    with pytest.raises(Internal, match="written already"):
        writer.write("x", torch.zeros(3))


@pytest.mark.parametrize(
    ("tensors", "size"),
    [
        ([], 10),
        ([TensorPlan("x", "F32", (1,))] * 2, 10),
        ([TensorPlan("x", "F32", (1,))], 0),
        ([TensorPlan("x", "F9", (1,))], 10),
    ],
)
def test_impossible_plans_are_refused(tmp_path: Path, tensors: list[TensorPlan], size: int) -> None:
    with pytest.raises(InvalidArgument):
        WeightsWriter(tmp_path, tensors, max_shard_size=size)


def sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_rows_may_come_in_blocks(tmp_path: Path) -> None:
    wide = TENSORS["wide"]
    with WeightsWriter(tmp_path, [TensorPlan("w", "F32", (4, 6))]) as writer:
        for start in (0, 3):
            rows = wide[start : start + 3]
            writer.next_rows("w", len(rows)).copy_(rows)
        with pytest.raises(Internal, match="written already"):
            writer.next_rows("w", 1)
    assert load_file(str(tmp_path / "model.safetensors"))["w"].equal(wide)


def test_more_rows_than_planned_are_a_defect(tmp_path: Path) -> None:
    with (
        pytest.raises(Internal, match="more than 96 bytes"),
        WeightsWriter(tmp_path, [TensorPlan("w", "F32", (4, 6))]) as writer,
    ):
        writer.next_rows("w", 5)


@pytest.mark.parametrize("size", [10**9, 30])
def test_digests_are_known_of_what_is_written_in_order(tmp_path: Path, size: int) -> None:
    with WeightsWriter(tmp_path, plan(), max_shard_size=size) as writer:
        assert sorted(writer.order) == sorted(TENSORS)
        for name in writer.order:
            writer.write(name, TENSORS[name])
    assert {name: w.sha256 for name, w in writer.digests.items()} == {
        path.name: sha256(path) for path in writer.files
    }
    for path in writer.files:
        status = path.stat()
        known = writer.digests[path.name]
        assert (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns)


def test_out_of_order_there_is_no_digest_and_no_harm(tmp_path: Path) -> None:
    with WeightsWriter(tmp_path, plan()) as writer:
        for name in reversed(writer.order):
            writer.write(name, TENSORS[name])
    assert writer.digests == {}
    assert load_file(str(tmp_path / "model.safetensors"))["wide"].equal(TENSORS["wide"])


def test_bytes_of_another_file_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    wide = torch.randn(700_000, generator=torch.Generator().manual_seed(1))
    first, second, third = (tmp_path / name for name in "abc")
    for place in (first, second, third):
        place.mkdir()
    with WeightsWriter(first, [TensorPlan("w", "F32", (700_000,))]) as writer:
        writer.write("w", wide)
    source = Weights.open(first)

    def refuse(*_: object) -> int:
        raise OSError(18, "another filesystem")

    for place in (second, third):
        with WeightsWriter(place, [TensorPlan("w", "F32", (700_000,))]) as writer:
            writer.copy("w", source["w"], source.raw("w"))
        assert writer.digests["model.safetensors"].sha256 == sha256(place / "model.safetensors")
        assert Weights.open(place).tensor("w").equal(wide)
        monkeypatch.setattr(os, "copy_file_range", refuse)


def test_a_full_disk_is_refused_with_figures_before_a_byte_is_written(tmp_path: Path) -> None:
    import os

    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    rows = free // 4096 + 10**6
    with pytest.raises(DiskFull, match=r"\d+ bytes needed, \d+ bytes free") as caught:
        WeightsWriter(tmp_path, [TensorPlan("w", "F32", (rows, 1024))], max_shard_size=1 << 62)
    assert caught.value.needed > caught.value.free
    assert list(tmp_path.iterdir()) == []


def test_what_goes_wrong_while_writing_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    writer = WeightsWriter(tmp_path, [TensorPlan("w", "F32", (1_000_000,))])

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)

    def work() -> None:  # whichever call comes after
        writer.write("w", torch.zeros(1_000_000))
        writer.close()

    with pytest.raises(DiskFull, match=r"40001\d\d bytes needed"):
        work()


def test_a_scratch_file_is_neither_hashed_nor_pushed_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[int] = []
    monkeypatch.setattr(os, "fsync", pushed.append)
    out = sink.Sink()
    kept = out.add(tmp_path / "kept", 6)
    scratch = out.add(tmp_path / "scratch", 6, scratch=True)
    for file in (kept, scratch):
        out.put(file, 0, memoryview(b"abcdef"))
    digests = out.close()
    assert list(digests) == ["kept"]
    assert digests["kept"].sha256 == hashlib.sha256(b"abcdef").hexdigest()
    assert pushed == [kept.descriptor]
    assert scratch.hashed == 0
    assert (tmp_path / "scratch").read_bytes() == b"abcdef"
