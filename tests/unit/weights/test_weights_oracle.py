"""Logits of models that stay on disk, against transformers and PEFT."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from arriero.errors import FailedPrecondition
from arriero.testing.models import tiny_llama
from arriero.weights import MergedWeights, Weights, oracle

IDS = [[3, 9, 27, 81], list(range(40, 104)), [7, 5], [11, 12, 13]]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32).eval()


def by_transformers(model: Any) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([ids])).logits[0] for ids in IDS]
    found: np.ndarray[Any, Any] = torch.cat(rows).numpy()
    return found


def tied(directory: Path) -> Path:
    model = load(tiny_llama(directory / "plain"))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(str(directory / "tied"))
    return directory / "tied"


@pytest.mark.parametrize("block", [1 << 25, 64 * 4 * 7], ids=["whole", "in blocks of rows"])
def test_logits_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(oracle, "_BLOCK", block)
    for base in (tiny_llama(tmp_path / "half", dtype="bfloat16"), tied(tmp_path)):
        found = oracle.logits_of(base, IDS)
        assert found.shape == (4 + 64 + 2 + 3, 384)
        assert np.abs(found - by_transformers(load(base))).max() < 1e-4


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ALL},
        {"target_modules": ALL, "use_dora": True},
        {"target_modules": ["q_proj"], "use_rslora": True, "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"], "use_dora": True},
    ],
    ids=["lora", "dora", "modules to save", "embeddings", "embeddings dora"],
)
@pytest.mark.parametrize("with_tied", [False, True], ids=["", "tied"])
def test_golden_logits_are_what_peft_says_before_a_merge(
    tmp_path: Path, config: dict[str, Any], with_tied: bool
) -> None:
    from peft import LoraConfig, get_peft_model

    base = tied(tmp_path) if with_tied else tiny_llama(tmp_path / "base")
    torch.manual_seed(0)
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", r=4, **config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.05
    model.save_pretrained(str(tmp_path / "a"))
    golden = oracle.golden_of(MergedWeights.open(base, [tmp_path / "a"], [1.0]), IDS)
    expected = torch.log_softmax(torch.from_numpy(by_transformers(model)), dim=-1).numpy()
    assert golden.lengths.tolist() == [4, 64, 2, 3]
    # fp16 keeps 11 bits.
    np.testing.assert_allclose(golden.logprobs.astype(np.float32), expected, rtol=1e-3, atol=5e-3)
    before = torch.log_softmax(torch.from_numpy(oracle.logits_of(base, IDS)), dim=-1).numpy()
    assert np.abs(before - expected).max() > 0.1


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Twice the layers, and no more memory: nothing is kept of a layer that has run."""

    def peak(layers: int) -> int:
        model = tiny_llama(tmp_path / str(layers), hidden=256, layers=layers)
        kept: list[int] = []
        values = oracle._Stored(Weights.open(model))
        hollow = oracle._hollow(oracle.read_config(model), values)
        for module in hollow.modules():
            module.register_forward_hook(
                lambda module, *_: kept.append(
                    sum(
                        p.untyped_storage().nbytes()
                        for p in hollow.parameters()
                        if p.device.type != "meta"
                    )
                )
            )
        with torch.inference_mode():
            hollow(input_ids=torch.tensor([IDS[1]]))
        return max(kept)

    norms = 4 * 256
    assert peak(4) <= 9 * norms
    assert peak(8) - peak(4) == 8 * norms  # two more norms in each layer, and no matrix


def test_what_a_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "m")
    weights = Weights.open(base)
    kept = {n: weights.tensor(n).clone() for n in weights if "layers.1.mlp.up_proj" not in n}
    save_file(kept, str(base / "model.safetensors"), {"format": "pt"})
    with pytest.raises(FailedPrecondition, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        oracle.logits_of(base, IDS)


def test_a_model_that_transformers_does_not_know_is_named(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "spiral"}))
    with pytest.raises(FailedPrecondition, match=r"does not know 'spiral'.*merge\.logits: skip"):
        oracle.logits_of(model, [[1, 2, 3]])
