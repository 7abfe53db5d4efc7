"""Old checkpoints as they are found: put right, and told; healthy ones are left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Room


@pytest.fixture
def old(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """As the first conversions of LLaMA 7B were shared."""
    source = shutil.copytree(tiny_llama_dir, tmp_path / "llama-old-hf")
    change(
        source / "config.json",
        architectures=["LLaMAForCausalLM"],
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=-1,
        max_position_embeddings=None,
        max_sequence_length=2048,
    )
    (source / "generation_config.json").unlink()
    change(
        source / "tokenizer_config.json",
        tokenizer_class="LLaMATokenizer",
        bos_token="",
        eos_token="",
        unk_token="",
        pad_token=None,
    )
    (source / "special_tokens_map.json").write_text("{}")
    return source


def change(path: Path, **fields: Any) -> None:
    data = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def test_an_old_checkpoint_is_put_right_and_it_is_said_how(room: Room, old: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = room.bring(old)
    config = read(output.path / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert "pad_token_id" not in config
    assert config["max_position_embeddings"] == 2048
    generation = read(output.path / "generation_config.json")
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    settings = read(output.path / "tokenizer_config.json")
    assert settings["tokenizer_class"] == "LlamaTokenizer"
    assert [settings[key] for key in ("bos_token", "eos_token", "unk_token")] == [
        "<s>",
        "</s>",
        "<unk>",
    ]
    said = output.labels["normalised"]
    for part in (
        "LLaMAForCausalLM is spelled LlamaForCausalLM",
        "LLaMATokenizer is spelled LlamaTokenizer",
        "config.json: bos_token_id was 0, the tokenizer's is 1",
        "eos_token_id was 1, the tokenizer's is 2",
        "pad_token_id -1 is no id of the vocabulary",
        "max_sequence_length is called max_position_embeddings",
        "bos_token was empty, it is '<s>'",
        "special_tokens_map.json: bos_token, eos_token, unk_token filled in",
        "generation_config.json was missing; written with bos_token_id 1, eos_token_id 2",
    ):
        assert part in said
    tokenizer = AutoTokenizer.from_pretrained(str(output.path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    AutoModelForCausalLM.from_pretrained(str(output.path))


def test_wrong_ids_in_the_generation_settings_are_put_right(room: Room, old: Path) -> None:
    (old / "generation_config.json").write_text(
        '{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 99999, "top_p": 0.9}'
    )
    output = room.bring(old)
    assert read(output.path / "generation_config.json") == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "top_p": 0.9,
    }


def test_what_may_be_meant_so_is_left_alone(
    room: Room, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_llama_dir, tmp_path / "chat")
    # A chat model that ends its turns with a token of its own, and a list of stops.
    change(source / "config.json", eos_token_id=300, pad_token_id=0)
    change(source / "generation_config.json", eos_token_id=[300, 2])
    output = room.bring(source)
    assert "normalised" not in output.labels
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (output.path / name).read_bytes() == (source / name).read_bytes()


def test_sentencepiece_alone_gets_a_tokenizer_with_its_very_ids(room: Room, old: Path) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    (old / "tokenizer.json").unlink()
    output = room.bring(old)
    assert "tokenizer.json was missing" in output.labels["normalised"]
    ours = AutoTokenizer.from_pretrained(str(output.path))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(old / "tokenizer.model"))
    for text in ("llama", " leading", "  two  spaces", "世界 x\n\ny"):
        assert ours(text).input_ids == [1, *theirs.encode(text)]
