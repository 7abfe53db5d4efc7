"""The sums, against PEFT's own merge."""

from pathlib import Path
from typing import Any

import pytest
import torch

from arriero.testing.adapters import tiny_adapter
from arriero.testing.models import tiny_llama
from arriero.weights import LoraAdapter, Weights, delta, fold, spacing

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def by_peft(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=dtype)
    merged: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return dict(merged.state_dict())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1.5, "layers.0.mlp.*": 3}},
        {"fan_in_fan_out": True},  # wrong for linear layers; PEFT ignores it
    ],
    ids=["plain", "rslora", "patterns", "fan-in-fan-out"],
)
def test_merged_weights_are_pefts_within_one_ulp(
    tmp_path: Path, dtype: Any, config: dict[str, Any]
) -> None:
    base = tiny_llama(tmp_path / "base", dtype=dtype)
    directory = tiny_adapter(tmp_path / "adapter", base, targets=TARGETS, **config)
    expected = by_peft(base, directory, getattr(torch, dtype))
    weights, adapter = Weights.open(base), LoraAdapter.open(directory)
    assert len(adapter.pairs) == 14
    for name, pair in adapter.pairs.items():
        ours = fold(weights.tensor(name), [(adapter.delta(pair), 1.0)])
        theirs = expected[name]
        assert ours.dtype == theirs.dtype == getattr(torch, dtype)
        off = (ours.double() - theirs.double()).abs() / spacing(theirs.double(), theirs.dtype)
        assert off.max() <= 1.0
        assert not ours.equal(weights.tensor(name))


def test_deltas_are_summed_before_they_are_rounded() -> None:
    weight = torch.tensor([256.0], dtype=torch.bfloat16)  # one ulp is 2
    half = torch.tensor([0.75])
    assert fold(weight, [(half, 1.0), (half, 1.0)]).item() == 258.0
    assert fold(fold(weight, [(half, 1.0)]), [(half, 1.0)]).item() == 256.0


def test_factors_scale_and_the_base_is_left_alone() -> None:
    weight = torch.zeros(2, 2)
    change = delta(torch.ones(1, 2), torch.ones(2, 1), 3.0)
    assert fold(weight, [(change, -0.5)]).tolist() == [[-1.5, -1.5]] * 2
    assert weight.tolist() == [[0.0, 0.0]] * 2
    assert fold(weight, [(change, 1.0)], torch.float16).dtype == torch.float16


def test_conv1d_weights_take_the_delta_turned_over() -> None:
    a, b = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [10.0]])
    assert delta(a, b, 1.0).tolist() == [[1, 2, 3], [10, 20, 30]]
    assert delta(a, b, 1.0, transposed=True).tolist() == [[1, 10], [2, 20], [3, 30]]


def test_double_weights_are_summed_in_double() -> None:
    weight = torch.tensor([1.0], dtype=torch.float64)
    tiny = torch.tensor([2.0**-40])
    assert fold(weight, [(tiny, 1.0)]).item() == 1.0 + 2.0**-40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_spacing_is_the_distance_to_the_next_number(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 1.5, 2.0, -3.0, 0.1, 1e-3], dtype=dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    following = (values.view(bits) + 1).view(dtype)
    expected = (following.double() - values.double()).abs()
    assert spacing(values.double(), dtype).equal(expected)
