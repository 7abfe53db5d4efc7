"""Adapters of quantized bases: which base they are merged into."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.gates.golden import compare
from arriero.merging.qlora import packing_for
from arriero.store import Artifact
from arriero.testing.adapters import tiny_adapter
from arriero.testing.models import tiny_llama
from arriero.weights import MergedWeights, Weights, oracle
from arriero.weights.roundtrip import Packing, RoundTrip

if TYPE_CHECKING:
    from conftest import Room

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def base(room: "Room", tmp_path: Path) -> Artifact:
    return room.publish(tiny_llama(tmp_path / "base", dtype="bfloat16"), "model")


def trained(room: "Room", base: Artifact, place: Path, **spec: Any) -> Artifact:
    adapter = tiny_adapter(place, base.path, targets=ALL, base_model_name_or_path=base.digest)
    return room.publish(adapter, "adapter", spec=spec)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double", [False, True])
def test_values_are_those_of_bitsandbytes_layers(base: Artifact, kind: str, double: bool) -> None:
    import bitsandbytes as bnb

    weights = Weights.open(base.path)
    view = RoundTrip.of(base.path, Packing(kind, double))
    assert Q0 in view.altered
    assert "lm_head.weight" not in view.altered
    assert view.tensor("lm_head.weight").equal(weights.tensor("lm_head.weight"))
    before = weights.tensor(Q0)
    x = torch.eye(64, dtype=torch.bfloat16)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False, threshold=0)
        layer.weight = bnb.nn.Int8Params(before.clone(), requires_grad=False)
        layer = layer.to("cpu")
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(before.half())
        expected = (codes.float() * scales.view(-1, 1) / 127).bfloat16()
    else:
        layer = bnb.nn.Linear4bit(
            64, 64, bias=False, compute_dtype=torch.bfloat16, compress_statistics=double,
            quant_type=kind,
        )  # fmt: skip
        layer.weight = bnb.nn.Params4bit(
            before.clone(), requires_grad=False, compress_statistics=double, quant_type=kind
        )
        layer = layer.to("cpu")
        expected = layer(x).T
    found = view.tensor(Q0)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), atol=2e-3)
    assert not found.equal(before)
    assert view.tensor(Q0) is found


def test_modules_that_were_left_whole_are_not_altered(base: Artifact) -> None:
    view = RoundTrip.of(base.path, Packing("int8", whole=("mlp",)))
    assert not any("mlp" in name for name in view.altered)
    assert len(view.altered) == 2 * 4


def test_the_closer_base_is_measured_and_taken(
    room: "Room", base: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    adapter = trained(room, base, tmp_path / "a", **NF4)
    model, golden = room.merge(base, [adapter])
    assert set(room.verdicts().values()) == {"passed"}
    assert model.labels["qlora_base"] == "dequantized"
    assert model.metrics["kl_dequantized"] < 1e-3 < model.metrics["kl_full"]
    assert "taking dequantized" in caplog.text
    assert golden.kind == "report"
    packing = packing_for([adapter.manifest.spec], "auto")
    assert packing == Packing("nf4", double=True)
    merged = MergedWeights.open(base.path, [adapter.path], [1.0], packing=packing)
    written = Weights.open(model.path)
    assert all(written.tensor(name).equal(merged.tensor(name)) for name in written)
    assert written.raw("lm_head.weight") == Weights.open(base.path).raw("lm_head.weight")


def test_the_trained_model_is_transformers_with_bitsandbytes(
    room: "Room", base: Artifact, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    adapter = trained(room, base, tmp_path / "a", **NF4)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live: Any = AutoModelForCausalLM.from_pretrained(
            str(base.path), dtype=torch.bfloat16, quantization_config=config
        )
        live = PeftModel.from_pretrained(live, str(adapter.path)).float().eval()
    ids = [list(range(3, 90))]
    with torch.no_grad():
        found = live(input_ids=torch.tensor(ids, device=live.device)).logits[0]
        logits = found.float().cpu().numpy()
    packing = packing_for([NF4], "auto")
    near = MergedWeights.open(base.path, [adapter.path], [1.0], packing=packing)
    far = MergedWeights.open(base.path, [adapter.path], [1.0])
    kl_near = compare(oracle.golden_of(near, ids), logits).kl_divergence
    kl_far = compare(oracle.golden_of(far, ids), logits).kl_divergence
    assert kl_near < 1e-3
    assert kl_near < kl_far / 5
    assert np.isfinite(kl_far)


@pytest.mark.parametrize("wanted", ["full", "dequantized"])
def test_the_base_can_be_chosen(room: "Room", base: Artifact, tmp_path: Path, wanted: str) -> None:
    adapter = trained(room, base, tmp_path / "a", load_in_8bit=True)
    model = room.merge(base, [adapter], qlora_base=wanted)[0]
    assert set(room.verdicts().values()) == {"passed"}
    assert "kl_full" not in model.metrics
    same = (
        Weights.open(model.path)
        .tensor(Q0)
        .equal(MergedWeights.open(base.path, [adapter.path], [1.0]).tensor(Q0))
    )
    assert same == (wanted == "full")


def test_without_a_quantized_base_there_is_nothing_to_choose(
    room: "Room", base: Artifact, tmp_path: Path
) -> None:
    adapter = trained(room, base, tmp_path / "a")
    model = room.merge(base, [adapter])[0]
    assert "qlora_base" not in model.labels
    with pytest.raises(InvalidArgument, match="no adapter says that its base was quantized"):
        room.merge(base, [adapter], qlora_base="dequantized")
    with pytest.raises(InvalidArgument, match="'int4' is not known"):
        room.merge(base, [adapter], qlora_base="int4")


def test_adapters_of_different_bases_are_refused() -> None:
    with pytest.raises(FailedPrecondition, match="nf4, full precision"):
        packing_for([NF4, {}], "auto")
    with pytest.raises(FailedPrecondition, match="nf4, int8"):
        packing_for([NF4, {"load_in_8bit": True}], "dequantized")
    assert packing_for([NF4, {}], "full") is None
