"""The gates `merge.vocab` and `tokenizer.match`."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file

from arriero.merging.fold import write_merged
from arriero.merging.vocabulary import vocabulary_problems
from arriero.store import Artifact
from arriero.testing.adapters import tiny_adapter
from arriero.testing.models import tiny_llama
from arriero.v1 import types_pb2
from arriero.weights import MergedWeights, Weights
from arriero.weights.tokenizers import compare_tokenizers

if TYPE_CHECKING:
    from conftest import Room

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def grown(directory: Path, base: Path, rows: int = 390, **config: Any) -> Path:
    """An adapter that brings embeddings and output layer with more rows."""
    adapter = tiny_adapter(directory, base, **config)
    path = str(adapter / "adapter_model.safetensors")
    tensors, weights = load_file(path), Weights.open(base)
    for name in (EMBEDDINGS, HEAD):
        tensor = weights.tensor(name)
        tensors["base_model.model." + name] = tensor[[*range(384), *range(rows - 384)]].clone()
    save_file(tensors, path, {"format": "pt"})
    return adapter


def with_tokens(directory: Path, base: Path, *tokens: str, first: int = 384) -> Path:
    """The base's tokenizer with more tokens."""
    data = json.loads((base / "tokenizer.json").read_text())
    for number, token in enumerate(tokens):
        data["added_tokens"].append(
            {**data["added_tokens"][0], "content": token, "id": first + number}
        )
    (directory / "tokenizer.json").write_text(json.dumps(data))
    return directory


@pytest.fixture
def base(room: "Room", tiny_llama_dir: Path) -> Artifact:
    return room.publish(tiny_llama_dir, "model")


def test_a_grown_vocabulary_comes_with_its_tokenizer(
    room: "Room", base: Artifact, tmp_path: Path
) -> None:
    directory = with_tokens(grown(tmp_path / "a", base.path), base.path, "<one>", "<two>")
    model = room.merge(base, [room.publish(directory, "adapter")])[0]
    assert set(room.verdicts().values()) == {"passed"}
    config = json.loads((model.path / "config.json").read_text())
    assert config["vocab_size"] == 390
    assert Weights.open(model.path)[HEAD].shape == (390, 64)
    assert "<two>" in (model.path / "tokenizer.json").read_text()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(str(model.path))
    assert loaded.get_input_embeddings().weight.shape[0] == 390
    assert AutoTokenizer.from_pretrained(str(model.path)).convert_tokens_to_ids("<two>") == 385


def test_tokens_without_rows_fail_and_the_bases_tokenizer_stays(
    room: "Room", base: Artifact, tmp_path: Path
) -> None:
    directory = with_tokens(tiny_adapter(tmp_path / "a", base.path), base.path, "<one>")
    skipped = {"merge.logits": types_pb2.GATE_MODE_SKIP}
    model = room.merge(base, [room.publish(directory, "adapter")], gates=skipped)[0]
    assert room.verdicts()["tokenizer.match"] == "failed"
    [found] = [r for r in room.jobs[-1].gates.results if r.gate == "tokenizer.match"]
    assert "385 ids, the embeddings 384 rows" in found.detail
    assert "'<one>'" in found.detail
    assert "<one>" not in (model.path / "tokenizer.json").read_text()


def test_other_ids_for_the_same_tokens_fail(tiny_llama_dir: Path, tmp_path: Path) -> None:
    data = json.loads((tiny_llama_dir / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    proof = compare_tokenizers(tiny_llama_dir, [tmp_path], 384)
    assert "2 of 384 tokens of the base have other ids" in proof.problems[0]
    assert proof.extended is None


def test_the_same_tokenizer_passes(tiny_llama_dir: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_llama_dir / "tokenizer.json", tmp_path)
    proof = compare_tokenizers(tiny_llama_dir, [tmp_path], 384)
    assert (proof.problems, proof.tokens, proof.extended) == ([], 384, None)
    assert compare_tokenizers(tmp_path / "none", [], 384).problems == []


def test_rows_that_were_lost_are_found(tiny_llama_dir: Path, tmp_path: Path) -> None:
    merged = MergedWeights.open(tiny_llama_dir, [grown(tmp_path / "a", tiny_llama_dir)], [1.0])
    right = tmp_path / "m"
    right.mkdir()
    write_merged(merged, tiny_llama_dir, right, max_shard_size=10**9, tick=lambda *_: None)
    assert vocabulary_problems(right, merged.blends) == []
    path = str(right / "model.safetensors")
    tensors = load_file(path)
    save_file({**tensors, HEAD: tensors[HEAD][:384].clone()}, path)
    assert "brings 390 rows of lm_head.weight" in str(vocabulary_problems(right, merged.blends))
    lost = {**tensors, **{n: tensors[n][:384].clone() for n in (EMBEDDINGS, HEAD)}}
    save_file(lost, path)
    assert len(vocabulary_problems(right, merged.blends)) == 3
    save_file({n: t for n, t in tensors.items() if n != HEAD}, path)
    assert "lm_head.weight is missing" in str(vocabulary_problems(right, merged.blends))


def test_a_tuned_output_layer_that_is_tied_again_is_found(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(str(base / "model.safetensors"))
    del tensors[HEAD]
    save_file(tensors, str(base / "model.safetensors"), {"format": "pt"})
    adapter = tiny_adapter(tmp_path / "a", base, modules_to_save=["lm_head"])
    path = str(adapter / "adapter_model.safetensors")
    head = {"base_model.model." + HEAD: tensors[EMBEDDINGS] * 1.5}
    save_file({**load_file(path), **head}, path)
    merged = MergedWeights.open(base, [adapter], [1.0])
    target = tmp_path / "m"
    target.mkdir()
    write_merged(merged, base, target, max_shard_size=10**9, tick=lambda *_: None)
    assert vocabulary_problems(target, merged.blends) == []
    assert json.loads((target / "config.json").read_text())["tie_word_embeddings"] is False
    assert Weights.open(target).tensor(HEAD).equal(tensors[EMBEDDINGS] * 1.5)
    shutil.copy(base / "config.json", target)  # as if nobody had untied it
    assert "tuned the output layer" in str(vocabulary_problems(target, merged.blends))
