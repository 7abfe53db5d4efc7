import struct
from pathlib import Path

import numpy as np
import pytest

from arriero.errors import DataLoss, InvalidArgument
from arriero.llama import Context, Model, insert_metadata, read_header


def gguf(
    *,
    pairs: bytes = b"",
    pair_count: int = 0,
    infos: bytes = b"",
    tensor_count: int = 0,
    data: bytes = b"",
    version: int = 3,
) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, pair_count) + pairs + infos
    return head + bytes(-len(head) % 32) + data


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_real_file_is_described(tiny_gguf: Path) -> None:
    header = read_header(tiny_gguf)
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["tokenizer.ggml.add_bos_token"] is True
    assert header.arrays["tokenizer.ggml.tokens"] == 384
    assert header.parameters == sum(t.elements for t in header.tensors)
    assert header.size == tiny_gguf.stat().st_size
    assert 16.0 <= header.bits_per_weight < 16.2
    embedding = next(t for t in header.tensors if t.name == "token_embd.weight")
    assert (embedding.shape, embedding.type, embedding.size) == ((64, 384), "F16", 64 * 384 * 2)


def test_a_file_cut_off_anywhere_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    whole = tiny_gguf.read_bytes()
    header = read_header(tiny_gguf)
    cuts = [
        0,
        3,
        4,
        23,
        24,
        *range(25, header.data_offset, 997),
        header.data_offset,
        len(whole) - 1,
    ]
    for cut in cuts:
        with pytest.raises(DataLoss, match="GGUF"):
            read_header(written(tmp_path / "cut.gguf", whole[:cut]))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PK\3\4" + bytes(60), "starts with"),
        (gguf(version=1), "version 1"),
        (gguf(version=0x03000000), "version"),
        (gguf(tensor_count=1 << 40), "tensors"),
        (gguf(pair_count=1 << 40), "pairs"),
        (gguf(pair_count=1, pairs=text("key") + struct.pack("<I", 77)), "unknown value type"),
        (gguf(pair_count=1, pairs=struct.pack("<Q", 1 << 62)), "string"),
        (gguf(pair_count=1, pairs=text("k") + struct.pack("<IIQ", 9, 8, 1 << 60)), "array"),
        (gguf(pair_count=1, pairs=text("k") + struct.pack("<IIQ", 9, 4, 1 << 60)), "more bytes"),
        (
            gguf(
                pair_count=2,
                pairs=2 * (text("k") + struct.pack("<IB", 7, 1)),
            ),
            "twice",
        ),
        (
            gguf(pair_count=1, pairs=text("general.alignment") + struct.pack("<II", 4, 24)),
            "alignment",
        ),
        (gguf(tensor_count=1, infos=tensor("w", (8, 8), 0)), "cut off"),
        (gguf(tensor_count=1, infos=tensor("w", (8,), 99), data=bytes(64)), "unknown type"),
        (gguf(tensor_count=1, infos=tensor("w", (8,), 4), data=bytes(64)), "unknown type"),
        (gguf(tensor_count=1, infos=tensor("w", (33,), 8), data=bytes(64)), "blocks"),
        (gguf(tensor_count=1, infos=tensor("w", (1,) * 5, 0), data=bytes(64)), "dimensions"),
        (gguf(tensor_count=1, infos=tensor("w", (1 << 60, 1 << 60), 0), data=bytes(64)), "cut off"),
        (gguf(tensor_count=1, infos=tensor("w", (8,), 0, 1 << 60), data=bytes(64)), "cut off"),
        (gguf(tensor_count=1, infos=tensor("w", (8,), 0, 7), data=bytes(64)), "damaged"),
        (gguf(tensor_count=1, infos=tensor("w" * 64, (8,), 0), data=bytes(64)), "tensor name"),
    ],
)
def test_a_hostile_header_is_refused_with_what_is_wrong(
    tmp_path: Path, content: bytes, what: str
) -> None:
    with pytest.raises(DataLoss, match=what):
        read_header(written(tmp_path / "bad.gguf", content))


def test_added_metadata_leaves_the_model_what_it_was(tiny_gguf: Path, tmp_path: Path) -> None:
    changed = written(tmp_path / "changed.gguf", tiny_gguf.read_bytes())
    long = "{'template': 'ü 中文'}" * 500
    insert_metadata(changed, {"arriero.source": "sha256:abc", "arriero.template": long})
    before, after = read_header(tiny_gguf), read_header(changed)
    assert after.metadata == {
        **before.metadata,
        "arriero.source": "sha256:abc",
        "arriero.template": long,
    }
    assert (after.arrays, after.tensors) == (before.arrays, before.tensors)
    assert changed.read_bytes()[after.data_offset :] == tiny_gguf.read_bytes()[before.data_offset :]
    logits = []
    for path in (tiny_gguf, changed):
        with Model(path) as model, Context(model, n_ctx=64, n_threads=1) as context:
            logits.append(context.sequence_logits([1, 5, 300, 7]))
    assert np.array_equal(*logits)


def test_metadata_that_is_there_already_is_not_overwritten(tiny_gguf: Path, tmp_path: Path) -> None:
    copy = written(tmp_path / "copy.gguf", tiny_gguf.read_bytes())
    with pytest.raises(InvalidArgument, match=r"general\.name"):
        insert_metadata(copy, {"general.name": "other"})
    assert copy.read_bytes() == tiny_gguf.read_bytes()
