"""Reading safetensors: whole, sharded, damaged."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from arriero.errors import DataLoss, FailedPrecondition, NotFound
from arriero.weights import Weights, read_header


def shard(directory: Path, parts: dict[str, dict[str, np.ndarray]]) -> Path:
    """Files by name, and the index that says so."""
    directory.mkdir(exist_ok=True)
    places = {}
    for file, tensors in parts.items():
        save_file(tensors, str(directory / file))
        places |= dict.fromkeys(tensors, file)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
    )
    return directory


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return shard(
        tmp_path / "m",
        {
            "model-00001-of-00002.safetensors": {"a": np.arange(6, dtype=np.float32)},
            "model-00002-of-00002.safetensors": {"b": np.ones((2, 3), dtype=np.float16)},
        },
    )


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_whole_file_is_read_as_safetensors_reads_it(tiny_llama_dir: Path) -> None:
    from safetensors.torch import load_file

    weights = Weights.open(tiny_llama_dir)
    expected = load_file(str(tiny_llama_dir / "model.safetensors"))
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        assert weights[name].shape == tuple(tensor.shape)
        assert weights.tensor(name).equal(tensor)
        assert bytes(weights.raw(name)) == tensor.numpy().tobytes()
    assert weights.elements == sum(t.numel() for t in expected.values())
    assert weights.nbytes == 4 * weights.elements


def test_shards_are_found_by_their_index(sharded: Path) -> None:
    weights = Weights.open(sharded)
    assert [file.name for file in weights.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert weights.tensor("b").shape == (2, 3)


def test_other_files_beside_the_index_are_left_alone(sharded: Path) -> None:
    save_file({"z": np.ones(1, dtype=np.float32)}, str(sharded / "consolidated.safetensors"))
    assert set(Weights.open(sharded)) == {"a", "b"}


def test_changing_a_tensor_changes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(4, dtype=np.float32)}, str(path))
    path.chmod(0o444)
    before = path.read_bytes()
    Weights.open(tmp_path).tensor("a").add_(1)
    assert path.read_bytes() == before


def test_empty_and_scalar_tensors_are_read(tmp_path: Path) -> None:
    save_file(
        {"empty": np.zeros((0, 4), dtype=np.float32), "one": np.array(3, dtype=np.int64)},
        str(tmp_path / "model.safetensors"),
    )
    weights = Weights.open(tmp_path)
    assert weights.tensor("empty").shape == (0, 4)
    assert weights.tensor("one").item() == 3
    assert weights.raw("empty").nbytes == 0


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DataLoss, match=r"model-00002-of-00002.safetensors for 1 tensors.*missing"):
        Weights.open(sharded)


def test_a_missing_shard_without_index_is_counted(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert set(Weights.open(sharded)) == {"a", "b"}
    (sharded / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(DataLoss, match="1 of 2 shards of model are missing, the first is number 1"):
        Weights.open(sharded)


def test_an_index_that_places_a_tensor_wrongly_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(DataLoss, match=r"places b in model-00001-of-00002\.safetensors"):
        Weights.open(sharded)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "", ".."])
def test_an_index_that_climbs_out_is_refused(sharded: Path, file: str) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": file}}))
    with pytest.raises(DataLoss, match="expected a plain file name"):
        Weights.open(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DataLoss, match="is not a safetensors index"):
        Weights.open(sharded)


def test_one_tensor_in_two_files_without_index_is_refused(tmp_path: Path) -> None:
    for file in ("x.safetensors", "y.safetensors"):
        save_file({"a": np.ones(1, dtype=np.float32)}, str(tmp_path / file))
    with pytest.raises(DataLoss, match=r"a is in x.safetensors and in y.safetensors"):
        Weights.open(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="holds no weights"):
        Weights.open(tmp_path)


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "model.safetensors"
    save_file({"a": np.arange(8, dtype=np.float32)}, str(whole))
    data = whole.read_bytes()
    for size in (0, 3, 8, 20, len(data) - 1):
        whole.write_bytes(data[:size])
        with pytest.raises(DataLoss, match="not a whole safetensors file"):
            Weights.open(tmp_path)
    whole.write_bytes(data + b"x")
    with pytest.raises(DataLoss, match="its header describes"):
        Weights.open(tmp_path)


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataLoss, match="git lfs pull"):
        Weights.open(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]},
        {"dtype": "F32"},
        [],
    ],
)
def test_entries_that_do_not_add_up_are_refused(tmp_path: Path, entry: object) -> None:
    with pytest.raises(DataLoss):
        read_header(write(tmp_path / "x.safetensors", {"a": entry}, b"\0" * 8))


def test_an_unknown_type_is_named(tmp_path: Path) -> None:
    entry = {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}
    with pytest.raises(FailedPrecondition, match=r"a in x.safetensors has type F4"):
        read_header(write(tmp_path / "x.safetensors", {"a": entry}, b"\0" * 4))


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"x.safetensors does not exist"):
        Weights.open_file(tmp_path / "x.safetensors")
