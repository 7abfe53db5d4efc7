"""PyTorch files: converted when they are tensors, refused when they are code."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.errors import DataLoss, FailedPrecondition
from arriero.merging.pickles import checkpoint_files, convert
from arriero.weights import Weights


def nothing(done: int, total: int) -> None:
    pass


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_tensors_are_converted_as_they_are(tmp_path: Path, zipped: bool) -> None:
    path, out = tmp_path / "pytorch_model.bin", tmp_path / "out"
    out.mkdir()
    state = {"a": torch.randn(3, 4).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    convert([path], out, stem="model", tick=nothing)
    weights = Weights.open(out)
    assert set(weights) == {"a", "b"}
    for name, tensor in state.items():
        assert weights.tensor(name).equal(tensor)


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for i, name in enumerate(names):
        torch.save({f"t{i}": torch.full((2,), i)}, tmp_path / name)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"t0": names[0], "t1": names[1]}}))
    files = checkpoint_files(tmp_path, "pytorch_model")
    assert [file.name for file in files] == names
    convert(files, tmp_path, stem="model", tick=nothing)
    assert set(Weights.open(tmp_path)) == {"t0", "t1"}
    (tmp_path / names[1]).unlink()
    with pytest.raises(DataLoss, match=rf"names {names[1]}, but it is missing"):
        checkpoint_files(tmp_path, "pytorch_model")
    index.write_text(json.dumps({"weight_map": {"t0": "../x.bin"}}))
    with pytest.raises(DataLoss, match="plain file name"):
        checkpoint_files(tmp_path, "pytorch_model")


def test_tied_output_layers_and_derived_buffers_are_left_out(tmp_path: Path) -> None:
    embeddings = torch.randn(4, 2)
    state = {
        "model.embed_tokens.weight": embeddings,
        "lm_head.weight": embeddings,
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    torch.save(state, tmp_path / "x.bin")
    convert([tmp_path / "x.bin"], tmp_path, stem="model", tied=True, tick=nothing)
    assert set(Weights.open(tmp_path)) == {"model.embed_tokens.weight"}
    convert([tmp_path / "x.bin"], tmp_path, stem="model", tied=False, tick=nothing)
    assert set(Weights.open(tmp_path)) == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("form", ["torch", "old", "pickle"])
def test_code_is_refused_and_not_run(tmp_path: Path, form: str) -> None:
    path, trace = tmp_path / "pytorch_model.bin", tmp_path / "executed"
    state: dict[str, Any] = {"a": torch.ones(1), "b": Payload(trace)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(state["b"], protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(FailedPrecondition, match=r"was not opened: .*posix\.system"):
        convert([path], tmp_path, stem="model", tick=nothing)
    assert not trace.exists()
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 4])
def test_pickles_that_torch_never_writes_are_refused_without_its_advice(
    tmp_path: Path, protocol: int
) -> None:
    path, trace = tmp_path / "pytorch_model.bin", tmp_path / "executed"
    path.write_bytes(pickle.dumps({"b": Payload(trace)}, protocol=protocol))
    with pytest.raises(DataLoss, match="without running code") as refused:
        convert([path], tmp_path, stem="model", tick=nothing)
    assert "weights_only" not in refused.value.message
    assert not trace.exists()


def test_shards_without_an_index_are_read_when_all_are_there(tmp_path: Path) -> None:
    state = {name: torch.randn(3) for name in "ab"}
    for i, name in enumerate(state, 1):
        torch.save({name: state[name]}, tmp_path / f"pytorch_model-0000{i}-of-00002.bin")
    found = checkpoint_files(tmp_path, "pytorch_model")
    convert(found, tmp_path, stem="model", tick=nothing)
    weights = Weights.open(tmp_path)
    assert all(torch.equal(weights.tensor(name), state[name]) for name in state)
    found[0].unlink()
    with pytest.raises(DataLoss, match=r"1 of 2 shards .* the first is number 1"):
        checkpoint_files(tmp_path, "pytorch_model")


def test_other_things_than_state_dicts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    for state, message in [
        ({"a": 3}, "a in x.bin is int"),
        ([torch.ones(1)], "holds list"),
        ({}, "holds no tensors"),
        ({"state_dict": {"a": torch.ones(1)}}, "expected a flat state dict"),
    ]:
        torch.save(state, path)
        with pytest.raises(FailedPrecondition, match=message):
            convert([path], tmp_path, stem="model", tick=nothing)


def test_damaged_files_are_data_loss(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.randn(1000)}, path)
    data = path.read_bytes()
    for damaged, said in (
        (data[:2000], "is damaged"),
        (b"", "is damaged"),
        (b"garbage " * 9, "is damaged"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataLoss, match=said):
            convert([path], tmp_path, stem="model", tick=nothing)
