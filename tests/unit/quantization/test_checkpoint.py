import json
import struct
from pathlib import Path

import pytest

from arriero.errors import DataLoss, FailedPrecondition
from arriero.quantization.checkpoint import read_checkpoint
from arriero.testing.models import tiny_llama


@pytest.mark.parametrize(
    ("dtype", "exact", "width"), [("float32", "f32", 4), ("bfloat16", "bf16", 2)]
)
def test_weights_are_counted_and_kept_exactly(
    tmp_path: Path, dtype: str, exact: str, width: int
) -> None:
    found = read_checkpoint(tiny_llama(tmp_path / "model", dtype=dtype))  # type: ignore[arg-type]
    assert found.parameters == 123_200
    assert found.size == found.parameters * width
    assert found.largest == 384 * 64
    assert found.exact_type == exact


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="safetensors"):
        read_checkpoint(tmp_path)


def test_a_cut_off_file_is_data_loss(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path / "model") / "model.safetensors"
    whole = path.read_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataLoss, match=r"model\.safetensors"):
            read_checkpoint(path.parent)


@pytest.mark.parametrize("header", ["[]", "{}x", '{"w": 3}', '{"w": {"dtype": "F32", "shape": 1}}'])
def test_a_damaged_header_is_data_loss(tmp_path: Path, header: str) -> None:
    data = header.encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data)
    with pytest.raises(DataLoss, match=r"model\.safetensors"):
        read_checkpoint(tmp_path)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    data = json.dumps({"__metadata__": {}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data)
    with pytest.raises(FailedPrecondition, match="no tensors"):
        read_checkpoint(tmp_path)
