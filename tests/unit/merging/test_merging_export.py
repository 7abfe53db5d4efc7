"""Stage `export`: layouts that others read, and that come back bit by bit."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from arriero.errors import FailedPrecondition, InvalidArgument, Preempted
from arriero.store import Artifact
from arriero.testing import meta_llama as reference
from arriero.testing.adapters import tiny_adapter
from arriero.testing.models import tiny_llama
from arriero.weights import Weights

if TYPE_CHECKING:
    from conftest import Room

IDS = [1, 17, 250, 8, 99, 300, 5, 5, 210]


@pytest.fixture
def model(room: Room, tiny_llama_dir: Path) -> Artifact:
    return room.publish(tiny_llama_dir, "model", labels={"source": "hf://org/base@main"})


def names(path: Path) -> set[str]:
    return {item.name for item in path.iterdir()}


def same_tensors(one: Path, other: Path) -> None:
    ours, theirs = Weights.open(one), Weights.open(other)
    assert set(ours) == set(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert bytes(ours.raw(name)) == bytes(theirs.raw(name)), name


def test_shards_of_a_chosen_size_with_their_index(room: Room, model: Artifact) -> None:
    from transformers import AutoModelForCausalLM

    output = room.export(model, max_shard_size=100_000)
    index = json.loads((output.path / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) == output.metrics["shards"] >= 4
    assert all((output.path / name).stat().st_size < 110_000 for name in shards)
    same_tensors(output.path, model.path)
    beside = names(model.path) - {"model.safetensors"}
    for name in beside:
        assert (output.path / name).read_bytes() == (model.path / name).read_bytes()
    AutoModelForCausalLM.from_pretrained(str(output.path))


def test_another_dtype_is_cast_and_stated(room: Room, model: Artifact) -> None:
    output = room.export(model, dtype="bfloat16")
    ours, theirs = Weights.open(output.path), Weights.open(model.path)
    for name in theirs:
        assert ours.tensor(name).equal(theirs.tensor(name).bfloat16())
    assert json.loads((output.path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert output.golden is None


def test_eight_bit_floats_are_cast_too(room: Room, tiny_llama_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(tiny_llama_dir, tmp_path / "fp8")
    tensors = load_file(source / "model.safetensors")
    small = {n: t.to(torch.float8_e4m3fn) if "proj" in n else t for n, t in tensors.items()}
    save_file(small, source / "model.safetensors", metadata={"format": "pt"})
    output = room.export(room.publish(source, "model"), dtype="bfloat16")
    written = Weights.open(output.path)
    assert {info.dtype for info in written.values()} == {"BF16"}
    assert all(written.tensor(n).equal(small[n].to(torch.bfloat16)) for n in small)


def test_what_float16_cannot_hold_is_not_made_infinite(
    room: Room, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(tiny_llama_dir, tmp_path / "wide")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 70000.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FailedPrecondition, match=r"model.norm.weight holds 7e\+04, float16 ends"):
        room.export(room.publish(source, "model"), dtype="float16")


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_is_bit_identical(
    room: Room, tmp_path: Path, shards: int, dtype: Any
) -> None:
    source = tiny_llama(tmp_path / "tiny", dtype=dtype, hidden=96, layers=3)
    given = room.publish(source, "model")
    output = room.export(given, format="meta", shards=shards)
    files = {f"consolidated.{rank:02d}.pth" for rank in range(shards)}
    assert names(output.path) == files | {"params.json", "tokenizer.model"}
    back = room.bring(output.path)
    same_tensors(back.path, given.path)
    ours, theirs = (json.loads((p / "config.json").read_text()) for p in (back.path, given.path))
    assert {key: ours[key] for key in theirs if key != "max_position_embeddings"} == {
        key: theirs[key] for key in theirs if key != "max_position_embeddings"
    }
    assert (output.path / "tokenizer.model").read_bytes() == (
        source / "tokenizer.model"
    ).read_bytes()


def test_metas_code_says_what_the_model_says(room: Room, model: Artifact) -> None:
    from transformers import AutoModelForCausalLM

    output = room.export(model, format="meta", shards=2)
    params = json.loads((output.path / "params.json").read_text())
    assert params == {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "multiple_of": 128,
        "ffn_dim_multiplier": 0.4,
        "norm_eps": 1e-5,
        "vocab_size": 384,
    }
    assert reference.hidden_dim(params) == 128
    found = reference.logits(params, reference.load(output.path), IDS)
    theirs = AutoModelForCausalLM.from_pretrained(str(model.path), dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor([IDS])).logits[0]
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_files_are_sound_zips_that_torch_maps(room: Room, model: Artifact) -> None:
    output = room.export(model, format="meta")
    path = output.path / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    mapped = torch.load(path, weights_only=True, mmap=True)
    plain = torch.load(path, weights_only=True)
    assert list(mapped) == list(plain)
    for name, tensor in mapped.items():
        assert tensor.equal(plain[name])
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0


def test_tied_embeddings_become_an_output_layer_and_are_tied_again(
    room: Room, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    source = shutil.copytree(tiny_llama_dir, tmp_path / "tied")
    tensors = load_file(source / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    given = room.publish(source, "model")
    output = room.export(given, format="meta", shards=2)
    state = reference.load(output.path)
    assert state["output.weight"].equal(state["tok_embeddings.weight"])
    back = room.bring(output.path)
    same_tensors(back.path, given.path)
    assert json.loads((back.path / "config.json").read_text())["tie_word_embeddings"] is True


def test_llama_3s_ranks_come_back_to_the_byte(room: Room, tmp_path: Path) -> None:
    params = {
        **{"dim": 64, "n_layers": 1, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 32},
        **{"norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True, "vocab_size": 521},
    }
    state = reference.random_state(params, reference.hidden_dim(params), 521)
    directory = tmp_path / "llama3"
    reference.save(directory, params, state)
    ranks = reference.tiny_ranks(directory / "tokenizer.model").read_bytes()
    model = room.bring(directory)
    given = room.publish(model.path, "model")
    output = room.export(given, format="meta", shards=1)
    assert (output.path / "tokenizer.model").read_bytes() == ranks
    assert "lacking" not in output.labels
    found = json.loads((output.path / "params.json").read_text())
    assert found == {**params, "multiple_of": 64}
    loaded = reference.load(output.path, vocabulary_rows=True)
    assert all(loaded[name].equal(tensor) for name, tensor in state.items())


def test_a_llama_3_with_metas_tokenizer_beside_it_is_split_by_rows(
    room: Room, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_llama_dir, tmp_path / "llama3")
    reference.tiny_ranks(source / "tokenizer.model")
    output = room.export(room.publish(source, "model"), format="meta", shards=2)
    state = torch.load(output.path / "consolidated.00.pth", weights_only=True)
    assert state["tok_embeddings.weight"].shape == (192, 64)


def test_what_metas_code_would_miss_is_said(room: Room, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = tiny_llama(tmp_path / "grown")
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(2, 64)])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 386}))
    output = room.export(room.publish(source, "model"), format="meta")
    assert "tokenizer.model has 384 ids, the embeddings 386 rows" in output.labels["lacking"]

    given = room.publish(tiny_llama(tmp_path / "smollm", tokenizer="smollm"), "model")
    output = room.export(given, format="meta")
    assert output.labels["lacking"].startswith("no tokenizer.model is written")
    assert "tokenizer.model" not in names(output.path)


def test_a_tuned_output_layer_is_exported_though_the_configuration_says_tied(
    room: Room, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_llama_dir, tmp_path / "tuned")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    output = room.export(room.publish(source, "model"), format="meta")
    state = reference.load(output.path)
    assert state["output.weight"].equal(Weights.open(source).tensor("lm_head.weight"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "Meta's layout is LLaMA's"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "type 'linear' is unknown"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "has .*built in"),
        ({"head_dim": 32, "num_attention_heads": 4}, "heads are 32 wide"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_what_metas_code_cannot_express_is_refused(
    room: Room, tiny_llama_dir: Path, tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    source = shutil.copytree(tiny_llama_dir, tmp_path / "odd")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(FailedPrecondition, match=match):
        room.export(room.publish(source, "model"), format="meta")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"format": "gguf"}, "format"),
        ({"dtype": "int8"}, "dtype"),
        ({"shards": 2}, "only used with format: meta"),
        ({"format": "meta", "shards": 3}, "3 does not divide hidden_size 64, num_attention_heads"),
        ({"format": "meta", "shards": 4}, "4 does not divide num_key_value_heads 2"),
        ({"format": "meta", "shards": -1}, "below 0"),
        ({"format": "meta", "max_shard_size": 5}, "only used with format: hf"),
        ({"max_shard_size": 0}, "at least 1"),
        ({"target": "/tmp/x", "token_secret": "hub"}, "target.*no hub"),
        ({"target": "hf://org/name@" + "c" * 40, "token_secret": "hub"}, "names a commit"),
        ({"target": "hf://org/name"}, "token_secret.*is missing"),
        ({"target": "hf://org/name", "token_secret": "hf_" + "a" * 34}, "token itself"),
        ({"token_secret": "hub"}, "only used with target"),
        ({"gates": {"merge.delta": 2}}, "judges nothing"),
        ({"private": False}, "only used with target"),
    ],
)
def test_wrong_wishes_are_refused(
    room: Room, model: Artifact, fields: dict[str, Any], match: str
) -> None:
    with pytest.raises(InvalidArgument, match=match):
        room.export(model, **fields)


def test_what_has_one_layout_is_only_sent(
    room: Room, model: Artifact, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    adapter = room.publish(tiny_adapter(tmp_path / "adapter", tiny_llama_dir), "adapter")
    with pytest.raises(InvalidArgument, match="can only be sent"):
        room.export(adapter)
    with pytest.raises(InvalidArgument, match=r"format.*one layout"):
        room.export(adapter, format="meta", target="hf://org/a", token_secret="hub")
    exported = room.publish(room.export(model, format="meta").path, "model")
    with pytest.raises(FailedPrecondition, match="in Meta's layout already"):
        room.export(exported)


def test_a_job_that_must_leave_leaves(room: Room, model: Artifact) -> None:
    room.prepare = lambda job: job.preempted.set()
    with pytest.raises(Preempted):
        room.export(model, format="meta")
