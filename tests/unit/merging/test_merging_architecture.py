"""Configuration, tensors and tokenizer held against each other."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arriero.errors import DataLoss, FailedPrecondition
from arriero.merging.architecture import check_model, expected_tensors, read_config, tokenizer_size
from arriero.weights import Weights

Edit = Callable[..., Path]


@pytest.fixture
def edited(tiny_llama_dir: Path, tmp_path: Path) -> Edit:
    """A copy of the tiny model with another configuration."""

    def edit(**changes: Any) -> Path:
        place = tmp_path / "model"
        shutil.copytree(tiny_llama_dir, place, dirs_exist_ok=True)
        config = {**read_config(tiny_llama_dir), **changes}
        (place / "config.json").write_text(json.dumps(config))
        return place

    return edit


def check(directory: Path) -> list[str]:
    return check_model(directory, Weights.open(directory))


def test_a_whole_model_has_nothing_to_complain_about(tiny_llama_dir: Path) -> None:
    assert check(tiny_llama_dir) == []
    assert set(expected_tensors(read_config(tiny_llama_dir))) == set(Weights.open(tiny_llama_dir))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"9 of 30 tensors.*missing, such as model\.layers\.2"),
        ({"vocab_size": 400}, r"model.embed_tokens.weight is \(384, 64\), expected \(400, 64\)"),
        ({"intermediate_size": 65}, "6 tensors have other shapes"),
        ({"hidden_size": None}, "says hidden_size None; expected .* positive integers"),
        ({"hidden_size": "64"}, "says hidden_size '64'"),
        ({"num_hidden_layers": -1}, "says num_hidden_layers -1"),
        ({"num_hidden_layers": 10**9}, "says num_hidden_layers 1000000000; expected at most"),
        ({"rope_scaling": "linear"}, "says rope_scaling 'linear'; expected an object"),
        ({"architectures": "LlamaForCausalLM"}, "says architectures .* expected a list"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized already \(gptq\)"),
    ],
)
def test_what_does_not_go_together_is_refused_with_figures(
    edited: Edit, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FailedPrecondition, match=message):
        check(edited(**changes))


def test_weights_that_are_integers_are_quantized_ones(edited: Edit) -> None:
    directory = edited()
    path = directory / "model.safetensors"
    tensors = load_file(str(path))
    packed = {n: t.astype(np.int8) if "proj" in n else t for n, t in tensors.items()}
    save_file(packed, str(path))
    with pytest.raises(FailedPrecondition, match=r"14 weights are integers, .*\(I8\)"):
        check(directory)


def test_a_tokenizer_larger_than_the_embeddings_is_refused(edited: Edit) -> None:
    directory = edited()
    (directory / "added_tokens.json").write_text('{"<more>": 384}')
    with pytest.raises(FailedPrecondition, match="tokenizer has 385 ids, the embeddings 384 rows"):
        check(directory)


def test_oddities_are_warned_about(edited: Edit) -> None:
    [warning] = check(edited(architectures=["GPT2LMHeadModel"]))
    assert "GPT2LMHeadModel is not of the LLaMA family" in warning
    [warning] = check(edited(auto_map={"AutoModel": "x.py"}))
    assert "never run" in warning
    directory = edited()
    for name in ("tokenizer.json", "tokenizer.model"):
        (directory / name).unlink()
    [warning] = check(directory)
    assert "no tokenizer" in warning


def test_the_tokenizers_size_counts_added_tokens(tiny_llama_dir: Path, tmp_path: Path) -> None:
    assert tokenizer_size(tiny_llama_dir) == 384
    assert tokenizer_size(tmp_path) is None
    unigram = {"model": {"vocab": [["a", 0.0], ["b", 0.0]]}, "added_tokens": [{"id": 7}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(unigram))
    assert tokenizer_size(tmp_path) == 8
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataLoss, match=r"tokenizer.json is not"):
        tokenizer_size(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_configuration_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(FailedPrecondition, match=r"holds no config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FailedPrecondition, match=r"config.json is not"):
        read_config(tmp_path)
