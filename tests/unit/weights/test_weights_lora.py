"""LoRA adapters: names, scales, what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arriero.errors import DataLoss, FailedPrecondition
from arriero.testing.adapters import tiny_adapter
from arriero.weights import LoraAdapter, LoraSettings, adapter_config

Q0 = "model.layers.0.self_attn.q_proj"


def settings(**more: Any) -> LoraSettings:
    return LoraSettings(rank=8, alpha=16, **more)


def rewrite(directory: Path, change: Any) -> None:
    path = directory / "adapter_model.safetensors"
    tensors = load_file(str(path))
    save_file(change(tensors), str(path))


def test_peft_names_are_mapped_to_the_bases(tmp_path: Path, tiny_llama_dir: Path) -> None:
    adapter = LoraAdapter.open(tiny_adapter(tmp_path / "a", tiny_llama_dir))
    assert len(adapter.pairs) == 4
    pair = adapter.pairs[Q0 + ".weight"]
    assert (pair.module, pair.rank, pair.shape, pair.scale) == (Q0, 4, (64, 64), 2.0)
    assert adapter.pairs["model.layers.1.self_attn.v_proj.weight"].shape == (32, 64)


def test_names_with_the_adapters_own_in_them_are_understood(
    tmp_path: Path, tiny_llama_dir: Path
) -> None:
    directory = tiny_adapter(tmp_path / "a", tiny_llama_dir)
    rewrite(directory, lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()})
    assert Q0 + ".weight" in LoraAdapter.open(directory).pairs


def test_the_scale_is_alpha_over_r_or_its_root() -> None:
    assert settings().scale_of(Q0) == 2.0
    assert settings(rslora=True).scale_of(Q0) == pytest.approx(16 / math.sqrt(8))


def test_patterns_override_rank_and_alpha_by_the_end_of_the_name() -> None:
    patterns = settings(
        rank_pattern={"q_proj": 2, r"layers\.1\..*v_proj": 4},
        alpha_pattern={"0.self_attn.q_proj": 1},
    )
    assert patterns.rank_of(Q0) == 2
    assert patterns.scale_of(Q0) == 0.5
    assert patterns.scale_of("model.layers.1.self_attn.q_proj") == 8.0
    assert patterns.rank_of("model.layers.1.self_attn.v_proj") == 4
    assert patterns.rank_of("model.layers.0.self_attn.v_proj") == 8
    assert patterns.rank_of("model.layers.0.self_attn.xq_proj") == 8


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "expected a magnitude"),
        ({"modules_to_save": ["lm_head"]}, "holds no such tensors"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"bias": "all"}, "bias 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_parameters": ["experts.up"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "of tomorrow"}, "init_lora_weights 'of tomorrow' is not known"),
        ({"use_lora_of_tomorrow": True}, "sets use_lora_of_tomorrow, which is not known"),
        ({"enable_lora": [True, False, True]}, "sets enable_lora"),
        ({"peft_type": "IA3"}, "peft_type is IA3"),
    ],
)
def test_features_that_cannot_be_folded_are_refused_by_name(
    tmp_path: Path, tiny_llama_dir: Path, config: dict[str, Any], named: str
) -> None:
    directory = tiny_adapter(tmp_path / "a", tiny_llama_dir, **config)
    with pytest.raises(FailedPrecondition, match=named):
        LoraAdapter.open(directory)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "has only lora_A"),
        (f"base_model.model.{Q0}.lora_magnitude_vector", "DoRA"),
        (
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
            "token_indices",
        ),
        (f"base_model.model.{Q0}.base_layer.weight", "modules_to_save"),
        (f"base_model.model.{Q0}.lora_B.bias", "bias"),
        ("strange", "is no LoRA matrix"),
    ],
)
def test_tensors_that_nothing_explains_are_refused(
    tmp_path: Path, tiny_llama_dir: Path, name: str, named: str
) -> None:
    directory = tiny_adapter(tmp_path / "a", tiny_llama_dir)
    rewrite(directory, lambda t: {**t, name: np.ones((2, 2), dtype=np.float32)})
    with pytest.raises(FailedPrecondition, match=named):
        LoraAdapter.open(directory)


def test_initialisations_that_leave_the_base_alone_are_accepted(
    tmp_path: Path, tiny_llama_dir: Path
) -> None:
    for init in (True, False, "gaussian", "eva", "orthogonal", "mica"):
        LoraAdapter.open(tiny_adapter(tmp_path / "a", tiny_llama_dir, init_lora_weights=init))


def test_every_setting_of_peft_is_known_here(tmp_path: Path, tiny_llama_dir: Path) -> None:
    from peft import LoraConfig

    directory = tiny_adapter(tmp_path / "a", tiny_llama_dir, r=8)
    config = LoraConfig(target_modules=["q_proj"], base_model_name_or_path="x").to_dict()
    config |= {"target_modules": ["q_proj"], "merge_weights": False, "enable_lora": None}
    config |= {"revision": "main", "task_type": "CAUSAL_LM", "auto_mapping": {"parent": "x"}}
    (directory / "adapter_config.json").write_text(json.dumps(config, default=str))
    assert LoraAdapter.open(directory).settings.rank == 8
    unread = (
        set(config) - set(adapter_config._KNOWN) - set(adapter_config._REFUSED) - {"enable_lora"}
    )
    assert not unread, "obey them, refuse them, or say that they change nothing"


def test_half_a_pair_is_refused(tmp_path: Path, tiny_llama_dir: Path) -> None:
    directory = tiny_adapter(tmp_path / "a", tiny_llama_dir)
    gone = f"base_model.model.{Q0}.lora_B.weight"
    rewrite(directory, lambda t: {k: v for k, v in t.items() if k != gone})
    with pytest.raises(FailedPrecondition, match=rf"{Q0} has only lora_A"):
        LoraAdapter.open(directory)


def test_ranks_other_than_the_configurations_are_refused(
    tmp_path: Path, tiny_llama_dir: Path
) -> None:
    directory = tiny_adapter(tmp_path / "a", tiny_llama_dir, r=4)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 8}))
    with pytest.raises(FailedPrecondition, match=r"A has shape \(4, 64\).*says rank 8"):
        LoraAdapter.open(directory)


def test_an_adapter_without_matrices_is_refused(tmp_path: Path, tiny_llama_dir: Path) -> None:
    directory = tiny_adapter(tmp_path / "a", tiny_llama_dir, targets=())
    with pytest.raises(FailedPrecondition, match="holds no LoRA matrices"):
        LoraAdapter.open(directory)


def test_a_truncated_adapter_is_data_loss(tmp_path: Path, tiny_llama_dir: Path) -> None:
    directory = tiny_adapter(tmp_path / "a", tiny_llama_dir)
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataLoss, match="cut off"):
        LoraAdapter.open(directory)


@pytest.mark.parametrize("text", ["{", "[]", '{"r": 4}', '{"r": 0, "lora_alpha": 1}', '{"r": "x"}'])
def test_a_wrong_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(FailedPrecondition, match=r"adapter_config.json"):
        LoraSettings.read(tmp_path)


def test_modules_that_were_saved_replace_the_bases(tmp_path: Path, tiny_llama_dir: Path) -> None:
    directory = tiny_adapter(tmp_path / "a", tiny_llama_dir, modules_to_save=["lm_head", "norm"])
    names = {
        "lm_head.weight": "lm_head.weight",
        "lm_head.modules_to_save.weight": "",  # the same again, by the wrapper's name
        "lm_head.original_module.weight": "",  # the base's own
        "model.norm.modules_to_save.default.weight": "model.norm.weight",
        "model.embed_tokens.base_layer.weight": "model.embed_tokens.weight",
    }
    values = {f"base_model.model.{n}": np.ones(2, dtype=np.float32) for n in names}
    rewrite(directory, lambda t: {**t, **values})
    replaced = LoraAdapter.open(directory).replaced
    assert {n: r.trained for n, r in replaced.items()} == {
        "lm_head.weight": True,
        "model.norm.weight": True,
        "model.embed_tokens.weight": False,
    }
    assert replaced["lm_head.weight"].info.name == "base_model.model.lm_head.weight"
