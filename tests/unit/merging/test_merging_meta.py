"""Meta's checkpoints in: whole, sharded, with grouped queries; and what is wrong with them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig

from arriero.errors import DataLoss, FailedPrecondition, InvalidArgument
from arriero.merging import meta, meta_source
from arriero.testing import meta_llama as reference
from arriero.testing.models import VOCABULARY
from arriero.weights import Weights

if TYPE_CHECKING:
    from conftest import Room

PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 4,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
INNER = 192
IDS = [1, 17, 250, 8, 99, 300, 5, 5, 210]


@pytest.fixture
def checkpoint(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """Two shards of a random LLaMA with grouped queries, and a SentencePiece tokenizer."""
    directory = tmp_path / "Tiny-2b"
    reference.save(directory, PARAMS, reference.random_state(PARAMS, INNER, VOCABULARY), ranks=2)
    # One for all sizes, in the directory above: how Meta ships it.
    shutil.copy(tiny_llama_dir / "tokenizer.model", tmp_path / "tokenizer.model")
    (directory / "LICENSE").write_text("Meta's.")
    (directory / "checklist.chk").write_text("sums")
    return directory


def logits_of(path: Path, ids: list[int] = IDS) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return found


@pytest.mark.parametrize(
    ("change", "ranks", "rows"),
    [
        ({}, 1, False),
        ({}, 4, False),
        ({}, 4, True),
        ({"n_kv_heads": None, "rope_theta": 500000.0}, 2, True),
        ({"ffn_dim_multiplier": 1.3, "multiple_of": 16}, 2, False),
    ],
)
def test_the_converted_model_says_what_metas_code_says(
    tmp_path: Path, change: dict[str, Any], ranks: int, rows: bool
) -> None:
    params = {k: v for k, v in {**PARAMS, **change}.items() if v is not None}
    state = reference.random_state(params, reference.hidden_dim(params), VOCABULARY)
    source, target = tmp_path / "meta", tmp_path / "hf"
    reference.save(source, params, state, ranks=ranks, vocabulary_rows=rows)
    target.mkdir()
    meta_source.convert(source, target, tokenizer=None, tick=lambda done, total: None)
    found, expected = logits_of(target), reference.logits(params, state, IDS)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_scaled_rope_computes_what_metas_code_computes(tmp_path: Path) -> None:
    # Of four frequencies one stays, one is blended and two are slowed down.
    params = {**PARAMS, "rope_theta": 500000.0, "use_scaled_rope": True}
    state = reference.random_state(params, INNER, VOCABULARY)
    ids = (torch.arange(700) * 37 % VOCABULARY).tolist()
    source, target = tmp_path / "meta", tmp_path / "hf"
    reference.save(source, params, state, ranks=2)
    target.mkdir()
    meta_source.convert(source, target, tokenizer=None, tick=lambda done, total: None)
    found = logits_of(target, ids)
    expected = reference.logits(params, state, ids)
    unscaled = reference.logits({**params, "use_scaled_rope": False}, state, ids)
    limit = 1e-4 * expected.abs().max()
    assert (found - expected).abs().max() < limit
    assert (found - unscaled).abs().max() > 10 * limit  # it makes a difference here


def test_a_checkpoint_is_imported_with_its_tokenizer(
    room: Room, checkpoint: Path, tiny_llama_dir: Path
) -> None:
    from transformers import AutoTokenizer

    output = room.bring(checkpoint)
    assert (output.kind, output.artifact_name) == ("model", "tiny-2b")
    assert output.labels["converted_from"] == "meta"
    assert "4096 is what Meta's release of this kind has" in output.labels["normalised"]
    names = {path.name for path in output.path.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"} <= names
    assert {"LICENSE"} == names & {"LICENSE", "checklist.chk", "params.json"}
    config = json.loads((output.path / "config.json").read_text())
    assert (config["vocab_size"], config["intermediate_size"]) == (VOCABULARY, INNER)
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    ours = AutoTokenizer.from_pretrained(str(output.path))
    theirs = AutoTokenizer.from_pretrained(str(tiny_llama_dir))
    for text in ("Two  spaces, Ümlaut 世界\n", " leading", "llama 123"):
        assert ours(text).input_ids == theirs(text).input_ids


def test_the_output_layer_that_is_the_embeddings_is_written_once(tmp_path: Path) -> None:
    state = reference.random_state(PARAMS, INNER, VOCABULARY)
    state["output.weight"] = state["tok_embeddings.weight"].clone()
    reference.save(tmp_path / "meta", PARAMS, state, ranks=2, vocabulary_rows=True)
    (tmp_path / "hf").mkdir()
    notes = meta_source.convert(
        tmp_path / "meta", tmp_path / "hf", tokenizer=None, tick=lambda done, total: None
    )
    assert any("tied" in note for note in notes)
    assert "lm_head.weight" not in Weights.open(tmp_path / "hf")
    expected = reference.logits(PARAMS, state, IDS)
    found = logits_of(tmp_path / "hf")
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("scaled", [False, True])
def test_llama_3s_tokenizer_is_converted(room: Room, tmp_path: Path, scaled: bool) -> None:
    from transformers import AutoTokenizer

    directory = tmp_path / "llama3"
    vocabulary = 265 + 256
    params = {**PARAMS, "rope_theta": 500000.0, "vocab_size": vocabulary}
    if scaled:
        params["use_scaled_rope"] = True
    reference.save(directory, params, reference.random_state(params, INNER, vocabulary))
    reference.tiny_ranks(directory / "tokenizer.model")
    output = room.bring(directory)
    tokenizer = AutoTokenizer.from_pretrained(str(output.path))
    ids = tokenizer("the llama 1234<|eot_id|>").input_ids
    assert ids == [265, ord("t"), 261, 32, 259, 32, 264, ord("4"), 265 + 9]
    assert tokenizer.decode(ids[1:-1]) == "the llama 1234"
    config = json.loads((output.path / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (265, 266)
    assert config["max_position_embeddings"] == (131072 if scaled else 8192)
    assert ("rope_scaling" in config) == scaled
    generation = json.loads((output.path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == ([266, 273, 274] if scaled else [266, 274])


def test_a_pickle_with_code_is_refused_and_not_run(
    room: Room, checkpoint: Path, tmp_path: Path
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    torch.save({"tok_embeddings.weight": Evil()}, checkpoint / "consolidated.01.pth")
    with pytest.raises(FailedPrecondition, match=r"consolidated.01.pth wants to run code"):
        room.bring(checkpoint)
    assert not (tmp_path / "ran").exists()


def test_a_missing_shard_is_named(room: Room, checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "consolidated.01.pth").unlink()
    with pytest.raises(DataLoss, match=r"32 of 64 columns, so there must be 2 files"):
        room.bring(checkpoint)
    (checkpoint / "consolidated.00.pth").rename(checkpoint / "consolidated.01.pth")
    with pytest.raises(DataLoss, match=r"consolidated.00.pth is missing"):
        room.bring(checkpoint)


def test_files_that_do_not_belong_together_are_refused(
    room: Room, checkpoint: Path, tmp_path: Path
) -> None:
    other = reference.random_state(PARAMS, INNER, VOCABULARY, seed=1)
    reference.save(tmp_path / "other", PARAMS, other, ranks=2)
    shutil.copy(tmp_path / "other" / "consolidated.01.pth", checkpoint)
    with pytest.raises(DataLoss, match=r"differs between consolidated.00.pth and its siblings"):
        room.bring(checkpoint)
    params = json.dumps({**PARAMS, "n_layers": 3})
    (tmp_path / "other" / "params.json").write_text(params)
    with pytest.raises(FailedPrecondition, match=r"9 missing, such as model.layers.2"):
        room.bring(tmp_path / "other")
    (tmp_path / "other" / "params.json").write_text('{"dim": 64}')
    with pytest.raises(FailedPrecondition, match="lacks a size"):
        room.bring(tmp_path / "other")
    (tmp_path / "other" / "params.json").unlink()
    with pytest.raises(FailedPrecondition, match=r"no params.json"):
        room.bring(tmp_path / "other")


def test_a_truncated_shard_is_data_loss(room: Room, checkpoint: Path) -> None:
    path = checkpoint / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataLoss, match=r"consolidated.01.pth is damaged"):
        room.bring(checkpoint)


def test_a_tokenizer_of_another_model_or_of_none_is_told(
    room: Room, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(FailedPrecondition, match="521 ids, the embeddings have 384 rows"):
        room.bring(checkpoint, tokenizer=str(reference.tiny_ranks(tmp_path / "ranks.model")))
    (tmp_path / "broken.model").write_bytes(b"\x00\x01 no tokenizer")
    with pytest.raises(DataLoss, match="neither a SentencePiece model nor"):
        room.bring(checkpoint, tokenizer=str(tmp_path / "broken.model"))
    (tmp_path / "tokenizer.model").unlink()
    assert "no tokenizer" in room.bring(checkpoint).labels["normalised"]


def test_a_tokenizer_is_only_given_with_a_meta_checkpoint(
    room: Room, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama_dir, tmp_path / "hf")
    with pytest.raises(InvalidArgument, match="only used with Meta's checkpoints"):
        room.bring(tmp_path / "hf", tokenizer=str(tmp_path / "hf" / "tokenizer.model"))


@pytest.mark.parametrize(
    ("dim", "inner", "multiple", "multiplier"),
    [
        (4096, 11008, 256, None),  # LLaMA 7B
        (5120, 13824, 256, None),  # 13B
        (6656, 17920, 256, None),  # 33B
        (8192, 22016, 256, None),  # 65B
        (8192, 28672, 4096, 1.3),  # Llama 2 70B, Llama 3 70B
        (4096, 14336, 1024, 1.3),  # Llama 3 8B
        (2048, 8192, 256, 1.5),  # Llama 3.2 1B
    ],
)
def test_metas_own_sizes_are_found_again(
    dim: int, inner: int, multiple: int, multiplier: float | None
) -> None:
    assert meta.hidden_dim(dim, multiple, multiplier) == inner
    config = {
        "hidden_size": dim,
        "num_attention_heads": 32,
        "num_hidden_layers": 2,
        "intermediate_size": inner,
    }
    assert reference.hidden_dim(meta.Params.json_of(config, vocabulary=-1)) == inner


def test_a_configuration_that_is_silent_means_what_transformers_takes() -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    params = meta.Params.json_of({**sizes, "intermediate_size": 128}, vocabulary=8)
    assert params["norm_eps"] == LlamaConfig(**sizes).rms_norm_eps == 1e-6
    assert "rope_theta" not in params


def test_a_llama_3_is_one_without_its_tokenizer_too(tmp_path: Path) -> None:
    params = {**PARAMS, "dim": 8, "n_heads": 2, "n_kv_heads": 1, "rope_theta": 500000.0}
    params = {**params, "n_layers": 1, "multiple_of": 8}
    state = reference.random_state(params, reference.hidden_dim(params), 128256)
    source, target = tmp_path / "meta", tmp_path / "hf"
    reference.save(source, params, state)
    target.mkdir()
    meta_source.convert(source, target, tokenizer=None, tick=lambda done, total: None)
    config = json.loads((target / "config.json").read_text())
    found = [config[f"{key}_token_id"] for key in ("bos", "eos")]
    assert (config["max_position_embeddings"], found) == (8192, [128000, 128001])


@pytest.mark.parametrize("inner", [1, 2, 100, 1001, 1536, 5632, 4864, 11007, 65537])
def test_any_width_can_be_said_in_metas_words(inner: int) -> None:
    config = {
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_hidden_layers": 1,
        "intermediate_size": inner,
    }
    assert reference.hidden_dim(meta.Params.json_of(config, vocabulary=-1)) == inner


@pytest.mark.parametrize(
    ("parameters", "files"),
    [(6.7e9, 1), (8.0e9, 1), (13.0e9, 2), (32.5e9, 4), (65.2e9, 8), (70.6e9, 8)],
)
def test_files_are_as_many_as_meta_ships(parameters: float, files: int) -> None:
    assert meta.default_shards(int(parameters)) == files
