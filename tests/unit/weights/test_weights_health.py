"""Ill adapters are told from healthy ones by their files alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from arriero.weights import TensorInfo, Weights
from arriero.weights.health import check_adapter, check_model, linear_modules, matches

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def healthy() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    tensors = {}
    for module in MODULES:
        for side, shape in (("A", (2, 8)), ("B", (6, 2))):
            name = f"base_model.model.{module}.lora_{side}.weight"
            tensors[name] = random.standard_normal(shape).astype(np.float32)
    return tensors


def write(directory: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    save_file(tensors, str(directory / "adapter_model.safetensors"))
    (directory / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return directory


def base(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    found = {f"{module}.weight": (6, 8) for module in MODULES}
    found |= {"model.embed_tokens.weight": (9, 8), "lm_head.weight": (9, 8)}
    found |= {"model.norm.weight": (8,), **shapes}
    return {name: TensorInfo(name, "F32", shape, Path(), 0, 0) for name, shape in found.items()}


def test_a_healthy_adapter_has_no_problems(tmp_path: Path):
    assert check_adapter(write(tmp_path, healthy()), base=base()) == []


def test_the_adapter_of_443_bytes_is_told(tmp_path: Path):
    problems = check_adapter(write(tmp_path, {}))
    assert len(problems) == 1
    assert "holds no LoRA tensors" in problems[0]


def test_an_untrained_adapter_is_told(tmp_path: Path):
    tensors = {n: t * (0 if "lora_B" in n else 1) for n, t in healthy().items()}
    (problem,) = check_adapter(write(tmp_path, tensors))
    assert "all 2 B matrices are zero" in problem


def test_an_untrained_adapter_whose_b_was_drawn_is_told(tmp_path: Path):
    tensors = {n: t * (0 if "lora_A" in n else 1) for n, t in healthy().items()}
    (problem,) = check_adapter(write(tmp_path, tensors, init_lora_weights="mica"))
    assert "all 2 A matrices are zero" in problem


def test_one_zero_b_is_no_illness(tmp_path: Path):
    tensors = healthy()
    tensors[f"base_model.model.{MODULES[0]}.lora_B.weight"][:] = 0
    assert check_adapter(write(tmp_path, tensors)) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(tmp_path: Path, value: float):
    tensors = healthy()
    name = f"base_model.model.{MODULES[1]}.lora_A.weight"
    tensors[name][1, 3] = value
    (problem,) = check_adapter(write(tmp_path, tensors))
    assert "NaN or infinite" in problem
    assert name in problem


def test_half_a_pair_is_named(tmp_path: Path):
    tensors = healthy()
    del tensors[f"base_model.model.{MODULES[0]}.lora_B.weight"]
    (problem,) = check_adapter(write(tmp_path, tensors))
    assert f"{MODULES[0]} has only A" in problem


def test_another_rank_than_the_configuration_s_is_told(tmp_path: Path):
    problems = check_adapter(write(tmp_path, healthy(), r=4))
    assert "2 pairs of another rank" in problems[0]
    assert check_adapter(write(tmp_path, healthy(), r=4, rank_pattern={"[qv]_proj": 2})) == []


def test_biases_of_lora_are_no_matrices(tmp_path: Path):
    bias = {f"base_model.model.{MODULES[1]}.lora_B.bias": np.ones(6, dtype=np.float32)}
    assert check_adapter(write(tmp_path, healthy() | bias, lora_bias=True), base=base()) == []
    (problem,) = check_adapter(write(tmp_path, healthy() | bias))
    assert "1 tensors that no LoRA layer explains" in problem


def test_an_adapter_of_alpha_0_changes_nothing(tmp_path: Path):
    (problem,) = check_adapter(write(tmp_path, healthy(), lora_alpha=0))
    assert "lora_alpha is 0 for every pair" in problem
    assert (
        check_adapter(write(tmp_path, healthy(), lora_alpha=0, alpha_pattern={"q_proj": 1})) == []
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 4.5}, "a rank of 4.5"),
        ({"r": 0}, "has r 0"),
        ({"lora_alpha": float("inf")}, "lora_alpha inf"),
        ({"rank_pattern": {"q_proj": "two"}}, "two"),
        ({"rank_pattern": {"q_proj": 0}}, "has r 0, 2"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj(": 2}}, "unterminated subpattern"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "nan"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
    ],
)
def test_a_wrong_configuration_is_one_problem(tmp_path: Path, config: dict[str, Any], said: str):
    (problem,) = check_adapter(write(tmp_path, healthy(), **config))
    assert problem.startswith("adapter_config.json ")
    assert said in problem


def test_a_target_without_tensors_is_named(tmp_path: Path):
    tensors = {name: tensor for name, tensor in healthy().items() if MODULES[1] not in name}
    (problem,) = check_adapter(write(tmp_path, tensors), base=base())
    assert "without LoRA tensors" in problem
    assert MODULES[1] in problem
    assert check_adapter(write(tmp_path, tensors, exclude_modules=["v_proj"]), base=base()) == []


def test_another_base_is_told_by_names_and_shapes(tmp_path: Path):
    write(tmp_path, healthy())
    other = base(**{f"{MODULES[0]}.weight": (6, 16)})
    assert "shapes that do not fit" in check_adapter(tmp_path, base=other)[0]
    del other[f"{MODULES[0]}.weight"]
    assert "does not have" in check_adapter(tmp_path, base=other)[0]


def test_tensors_that_nothing_explains_are_named(tmp_path: Path):
    tensors = healthy() | {"base_model.model.model.norm.weight": np.ones(8, np.float32)}
    (problem,) = check_adapter(write(tmp_path, tensors))
    assert "model.norm.weight" in problem


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, missing: str):
    (write(tmp_path, healthy()) / missing).unlink()
    assert missing in check_adapter(tmp_path)[0]


def test_damaged_files_are_problems_and_no_exceptions(tmp_path: Path):
    write(tmp_path, healthy())
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert len(check_adapter(tmp_path)) == 1
    (tmp_path / "adapter_config.json").write_text("[]")
    assert check_adapter(tmp_path) == ["adapter_config.json is not a JSON object"]


def test_bfloat16_is_read(tmp_path: Path):
    """NaN in bfloat16 is 0x7FC0; numpy has no such type."""
    bits = {n: (t.view(np.uint32) >> 16).astype(np.uint16) for n, t in healthy().items()}
    write(tmp_path, bits)
    path = tmp_path / "adapter_model.safetensors"

    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(b'"U16"', b'"BF16"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    assert check_adapter(tmp_path) == []
    whole = bytearray(path.read_bytes())
    whole[-2:] = (0x7FC0).to_bytes(2, "little")
    path.write_bytes(whole)
    assert "NaN" in check_adapter(tmp_path)[0]


def test_linear_layers_are_told_from_the_weights():
    assert list(linear_modules(base())) == list(MODULES)


def test_targets_match_as_in_peft():
    assert matches("model.layers.0.mlp.up_proj", ["up_proj"])
    assert matches("model.layers.0.mlp.up_proj", ["mlp.up_proj"])
    assert not matches("model.layers.0.mlp.up_proj", ["p_proj"])
    assert matches("model.layers.0.mlp.up_proj", r".*\.layers\.0\..*")
    assert not matches("model.layers.1.mlp.up_proj", r".*\.layers\.0\..*")
    assert matches("anything", "all-linear")
    assert not matches("anything", None)


def with_dora(value: float = 1.0, rows: int = 6) -> dict[str, np.ndarray]:
    tensors = healthy()
    for module in MODULES:
        name = f"base_model.model.{module}.lora_magnitude_vector.weight"
        tensors[name] = np.full(rows, value, dtype=np.float32)
    return tensors


def test_dora_has_a_magnitude_above_zero_for_each_row(tmp_path: Path):
    def problems(tensors: dict[str, np.ndarray]) -> list[str]:
        return check_adapter(write(tmp_path, tensors, use_dora=True), base=base())

    assert problems(with_dora()) == []
    (problem,) = problems({**with_dora(), **{n: t for n, t in with_dora(0.0).items() if "v_" in n}})
    assert "not above 0: model.layers.0.self_attn.v_proj" in problem
    (problem,) = problems(with_dora(rows=5))
    assert "another shape than the weight's rows" in problem
    assert "(5,) for 6 rows" in problem
    (problem,) = problems(healthy())
    assert "2 DoRA pairs without magnitudes" in problem


WHOLE = "base_model.model.model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((9, 8), None),
        ((12, 8), None),  # more tokens
        ((9, 7), "embed_tokens.weight: (9, 7), the base's is (9, 8)"),
        (None, "modules_to_save without tensors: embed_tokens"),
    ],
)
def test_whole_modules_are_there_and_fit(tmp_path: Path, shape, said):
    tensors = healthy()
    if shape:
        tensors[WHOLE] = np.ones(shape, dtype=np.float32)
    problems = check_adapter(
        write(tmp_path, tensors, modules_to_save=["embed_tokens"]), base=base()
    )
    assert len(problems) == (said is not None)
    assert all(said in problem for problem in problems)


def test_a_tied_output_layer_is_measured_by_the_embeddings(tmp_path: Path):
    tensors = healthy() | {"base_model.model.lm_head.weight": np.ones((9, 8), dtype=np.float32)}
    tied = {name: info for name, info in base().items() if name != "lm_head.weight"}
    found = check_adapter(write(tmp_path, tensors, modules_to_save=["lm_head"]), base=tied)
    assert found == []


def model(directory: Path, **tensors: np.ndarray) -> Path:
    directory.mkdir(exist_ok=True)
    random = np.random.default_rng(1)
    found = {"a.weight": random.standard_normal((4, 3)).astype(np.float32)}
    found["norm.weight"] = np.ones(3, dtype=np.float16)
    found |= {name.replace("_weight", ".weight"): tensor for name, tensor in tensors.items()}
    save_file(found, str(directory / "model.safetensors"))
    return directory


def test_a_trained_model_is_its_base_changed(tmp_path: Path):
    root = Weights.open(model(tmp_path / "base"))
    changed = np.full((4, 3), 0.5, dtype=np.float32)
    assert check_model(model(tmp_path / "tuned", a_weight=changed), root) == []
    (problem,) = check_model(model(tmp_path / "same"), root)
    assert "all 2 tensors are the base's: the model was not trained" in problem


def test_an_ill_model_is_told(tmp_path: Path):
    root = Weights.open(model(tmp_path / "base"))
    broken = np.full((4, 3), np.nan, dtype=np.float32)
    (problem,) = check_model(model(tmp_path / "nan", a_weight=broken), root)
    assert "NaN or infinite: a.weight" in problem
    wide = np.ones((5, 3), dtype=np.float32)
    (problem,) = check_model(model(tmp_path / "wide", a_weight=wide), root)
    assert "a.weight: (5, 3), the base's is (4, 3)" in problem
    more = model(tmp_path / "more", b_weight=wide)
    (problem,) = check_model(more, root)
    assert "the base does not have: b.weight" in problem
    lacking = check_model(tmp_path / "base", Weights.open(more))
    assert any("missing: b.weight" in problem for problem in lacking)
