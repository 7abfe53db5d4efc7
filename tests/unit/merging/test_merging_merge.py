"""Stage `merge`: outputs, gates, refusals."""

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.gates import GateResult, Mode, Verdict
from arriero.gates.golden import Golden
from arriero.merging.fold import write_merged
from arriero.merging.proof import prove_delta
from arriero.operations.kinds import ResolveContext
from arriero.settings import SourceSettings
from arriero.store import Artifact
from arriero.testing.adapters import tiny_adapter
from arriero.testing.models import tiny_llama
from arriero.v1 import merging_pb2, types_pb2
from arriero.weights import MergedWeights, Weights, oracle

if TYPE_CHECKING:
    from conftest import Room

SKIP_LOGITS = {"merge.logits": types_pb2.GATE_MODE_SKIP}
TARGETS = ("q_proj", "v_proj", "down_proj")


def nothing(done: int, total: int) -> None:
    pass


@pytest.fixture
def base(room: "Room", tiny_llama_dir: Path) -> Artifact:
    return room.publish(tiny_llama_dir, "model", labels={"architecture": "LlamaForCausalLM"})


@pytest.fixture
def adapter(room: "Room", base: Artifact, tmp_path: Path) -> Artifact:
    return room.publish(tiny_adapter(tmp_path / "a", base.path, targets=TARGETS), "adapter")


def result(room: "Room", gate: str) -> GateResult:
    [found] = [r for r in room.jobs[-1].gates.results if r.gate == gate]
    return found


# --- what is made ---------------------------------------------------------------------


def test_an_imported_adapter_is_merged_and_proven(
    room: "Room", base: Artifact, adapter: Artifact
) -> None:
    model, golden = room.merge(base, [adapter])
    assert (model.name, model.kind, model.golden) == ("model", "model", "output:golden")
    assert (golden.name, golden.kind) == ("golden", "report")
    assert golden.labels == {"report": "golden"}
    assert room.verdicts() == {
        "adapter.health": "passed",
        "merge.delta": "passed",
        "merge.logits": "passed",
        "merge.vocab": "passed",
        "tokenizer.match": "passed",
    }
    assert result(room, "merge.logits").figure < 3e-4
    assert result(room, "merge.delta").figure <= 1.0
    files = {path.name for path in model.path.iterdir()}
    assert files == {path.name for path in base.path.iterdir()}
    report = json.loads((golden.path / "report.json").read_text())
    assert report["tokens"] == 256
    assert report["model"] == base.digest
    assert Golden.read(golden.path).logprobs.shape == (256, 384)
    assert model.metrics["merged_tensors"] == 6


def test_the_merged_model_is_pefts(room: "Room", base: Artifact, adapter: Artifact) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = room.merge(base, [adapter])[0]
    plain = AutoModelForCausalLM.from_pretrained(str(base.path), dtype=torch.float32)
    peft: Any = PeftModel.from_pretrained(plain, str(adapter.path))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = peft(input_ids=ids).logits[0]
    found = oracle.logits_of(model.path, [ids[0].tolist()])
    assert np.abs(found - expected.numpy()).max() < 1e-4
    assert np.abs(found - oracle.logits_of(base.path, [ids[0].tolist()])).max() > 1e-2


def test_untouched_tensors_keep_their_bytes(
    room: "Room", base: Artifact, adapter: Artifact
) -> None:
    model = room.merge(base, [adapter], gates=SKIP_LOGITS)[0]
    before, after = Weights.open(base.path), Weights.open(model.path)
    assert list(after) == list(before)
    changed = {name for name in before if after.raw(name) != before.raw(name)}
    assert {name.rsplit(".", 2)[1] for name in changed} == set(TARGETS)


def test_shards_hold_the_same_model(room: "Room", base: Artifact, adapter: Artifact) -> None:
    whole = room.merge(base, [adapter], gates=SKIP_LOGITS)[0]
    sharded = room.merge(base, [adapter], max_shard_size=100_000, gates=SKIP_LOGITS)[0]
    assert room.verdicts()["merge.delta"] == "passed"
    assert (sharded.path / "model.safetensors.index.json").is_file()
    first, second = Weights.open(whole.path), Weights.open(sharded.path)
    assert len(second.files) > 3
    assert all(first.raw(name) == second.raw(name) for name in first)
    ids = [[1, 5, 9]]
    assert np.array_equal(oracle.logits_of(whole.path, ids), oracle.logits_of(sharded.path, ids))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_type_can_be_chosen(
    room: "Room", base: Artifact, adapter: Artifact, dtype: str
) -> None:
    model = room.merge(base, [adapter], dtype=dtype)[0]
    words = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    assert {info.dtype for info in Weights.open(model.path).values()} == {words[dtype]}
    assert json.loads((model.path / "config.json").read_text())["torch_dtype"] == dtype
    assert set(room.verdicts().values()) == {"passed"}


def test_a_bfloat16_base_stays_bfloat16(room: "Room", tmp_path: Path) -> None:
    base = room.publish(tiny_llama(tmp_path / "m", dtype="bfloat16"), "model")
    adapter = room.publish(tiny_adapter(tmp_path / "a", base.path), "adapter")
    model = room.merge(base, [adapter])[0]
    assert {info.dtype for info in Weights.open(model.path).values()} == {"BF16"}
    assert set(room.verdicts().values()) == {"passed"}
    assert result(room, "merge.logits").figure < 5e-4


def test_changes_that_the_type_cannot_hold_are_told(
    room: "Room", tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = room.publish(tiny_llama(tmp_path / "m", dtype="bfloat16"), "model")
    adapter = room.publish(tiny_adapter(tmp_path / "a", base.path, scale=5e-6), "adapter")
    room.merge(base, [adapter], dtype="float32", gates=SKIP_LOGITS)
    assert "all but its base" not in caplog.text
    model = room.merge(base, [adapter], gates=SKIP_LOGITS)[0]
    assert "the merged model is all but its base: 0%" in caplog.text
    name = "model.layers.0.self_attn.q_proj.weight"
    assert Weights.open(model.path).tensor(name).equal(Weights.open(base.path).tensor(name))


def test_several_adapters_are_blended_by_weight(
    room: "Room", base: Artifact, adapter: Artifact, tmp_path: Path
) -> None:
    other = room.publish(
        tiny_adapter(tmp_path / "b", base.path, r=2, seed=1, use_rslora=True), "adapter"
    )
    model, _ = room.merge(base, [adapter, other], weights=[0.7, -0.4])
    assert set(room.verdicts().values()) == {"passed"}
    name = "model.layers.1.self_attn.v_proj.weight"
    expected = Weights.open(base.path).tensor(name).double()
    for artifact, factor, scale in ((adapter, 0.7, 2.0), (other, -0.4, 8 / math.sqrt(2))):
        tensors = load_file(str(artifact.path / "adapter_model.safetensors"))
        stem = "base_model.model." + name.removesuffix(".weight")
        a, b = tensors[stem + ".lora_A.weight"], tensors[stem + ".lora_B.weight"]
        expected += factor * scale * (b.double() @ a.double())
    found = Weights.open(model.path).tensor(name).double()
    assert (found - expected).abs().max() < 1e-6


def test_the_template_comes_with_the_adapter(room: "Room", base: Artifact, tmp_path: Path) -> None:
    directory = tiny_adapter(tmp_path / "a", base.path)
    (directory / "arriero-template.json").write_text('{"name": "alpaca"}')
    adapter = room.publish(directory, "adapter")
    model = room.merge(base, [adapter], gates=SKIP_LOGITS)[0]
    assert (model.path / "arriero-template.json").read_text() == '{"name": "alpaca"}'


# --- golden logits --------------------------------------------------------------------


def golden_report(room: "Room", base: Path, adapter: Path, place: Path) -> Artifact:
    merged = MergedWeights.open(base, [adapter], [1.0])
    golden = oracle.golden_of(merged, [[1, 7, 9, 11], [1, 50]])
    place.mkdir()
    golden.write(place)
    (place / "report.json").write_text("{}")
    return room.publish(place, "report")


def test_golden_logits_that_come_with_the_adapter_are_used(
    room: "Room", base: Artifact, tmp_path: Path
) -> None:
    directory = tiny_adapter(tmp_path / "a", base.path, base_model_name_or_path=base.digest)
    report = golden_report(room, base.path, directory, tmp_path / "g")
    adapter = room.publish(directory, "adapter", golden=report.digest)
    [model] = room.merge(base, [adapter])
    assert model.golden == report.digest
    assert result(room, "merge.logits").verdict is Verdict.PASSED
    assert "over 6 tokens" in result(room, "merge.logits").detail


def test_with_another_weight_golden_logits_are_made_anew(
    room: "Room", base: Artifact, tmp_path: Path
) -> None:
    directory = tiny_adapter(tmp_path / "a", base.path, base_model_name_or_path=base.digest)
    report = golden_report(room, base.path, directory, tmp_path / "g")
    adapter = room.publish(directory, "adapter", golden=report.digest)
    outputs = room.merge(base, [adapter], weights=[0.5])
    assert [output.name for output in outputs] == ["model", "golden"]
    assert set(room.verdicts().values()) == {"passed"}


def test_an_equal_base_of_another_digest_is_told_by_the_golden_logits(
    room: "Room", base: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = "sha256:" + "a" * 64
    directory = tiny_adapter(tmp_path / "a", base.path, base_model_name_or_path=stranger)
    report = golden_report(room, base.path, directory, tmp_path / "g")
    adapter = room.publish(directory, "adapter", golden=report.digest)
    [model] = room.merge(base, [adapter])
    assert model.golden == report.digest
    assert f"was trained on {stranger}" in caplog.text
    assert set(room.verdicts().values()) == {"passed"}
    room.merge(base, [adapter], weights=[0.5])
    assert set(room.verdicts().values()) == {"passed"}


def test_a_wrong_base_is_refused_by_what_came_with_the_adapter(
    room: "Room", base: Artifact, tmp_path: Path
) -> None:
    # As a training with load_in_4bit leaves it: golden logits of the base as it is stored.
    trained_on = {"model": base.digest, "load_in_4bit": True}
    directory = tiny_adapter(tmp_path / "a", base.path, base_model_name_or_path=base.digest)
    report = golden_report(room, base.path, directory, tmp_path / "g")
    adapter = room.publish(directory, "adapter", golden=report.digest, spec=trained_on)
    wrong = room.publish(tiny_llama(tmp_path / "other", seed=5), "model")
    for weights, qlora_base in (([1.0], "full"), ([0.5], "full"), ([1.0], "dequantized")):
        room.merge(wrong, [adapter], weights=weights, qlora_base=qlora_base)
        found = result(room, "merge.logits")
        assert found.verdict is Verdict.FAILED
        assert "merge it into th" in found.detail or "merge into the model" in found.detail
    second = room.publish(tiny_adapter(tmp_path / "b", base.path, seed=2), "adapter")
    room.merge(wrong, [second, adapter], qlora_base="full")
    assert result(room, "merge.logits").verdict is Verdict.FAILED
    # On the base that it was trained on the same blends are healthy.
    room.merge(base, [second, adapter], qlora_base="full")
    assert set(room.verdicts().values()) == {"passed"}


def test_golden_logits_that_are_gone_are_made_anew(
    room: "Room", base: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tiny_adapter(tmp_path / "a", base.path, base_model_name_or_path=base.digest)
    adapter = room.publish(directory, "adapter", golden="sha256:" + "b" * 64)
    outputs = room.merge(base, [adapter])
    assert [output.name for output in outputs] == ["model", "golden"]
    assert "are gone" in caplog.text


def test_golden_logits_of_another_model_fail_the_gate(
    room: "Room", base: Artifact, adapter: Artifact, tmp_path: Path
) -> None:
    other = tiny_adapter(tmp_path / "b", base.path, seed=9, scale=0.3)
    report = golden_report(room, base.path, other, tmp_path / "g")
    [model] = room.merge(base, [adapter], golden=report)
    found = result(room, "merge.logits")
    assert found.verdict is Verdict.FAILED
    assert found.figure is not None
    assert found.figure > 1e-3
    assert "not the one that the golden logits were made of" in found.detail
    assert model.golden == report.digest


def test_golden_logits_of_another_vocabulary_fail_the_gate(
    room: "Room", base: Artifact, adapter: Artifact, tmp_path: Path
) -> None:
    place = tmp_path / "g"
    place.mkdir()
    rows = np.full((2, 500), -6.2, dtype=np.float16)
    Golden(np.array([1, 2], np.int32), np.array([2], np.int32), rows).write(place)
    room.merge(base, [adapter], golden=room.publish(place, "report"))
    found = result(room, "merge.logits")
    assert found.verdict is Verdict.FAILED
    assert "another tokenizer or model" in found.detail


def test_skipping_the_logits_makes_none(room: "Room", base: Artifact, adapter: Artifact) -> None:
    [model] = room.merge(base, [adapter], gates=SKIP_LOGITS)
    assert model.golden is None
    assert room.verdicts()["merge.logits"] == "skipped"


# --- the proof ------------------------------------------------------------------------


def merged_by_hand(base: Path, adapter: Path, target: Path, dtype: str = "auto") -> Any:
    plan = MergedWeights.open(base, [adapter], [1.0], dtype)
    target.mkdir()
    write_merged(plan, base, target, max_shard_size=10**9, tick=nothing)
    assert prove_delta(plan, target, nothing).passed
    return plan


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_merge_does_not_pass(tiny_llama_dir: Path, tmp_path: Path, dtype: str) -> None:
    adapter = tiny_adapter(tmp_path / "a", tiny_llama_dir)
    target = tmp_path / "merged"
    plan = merged_by_hand(tiny_llama_dir, adapter, target, dtype)
    path = str(target / "model.safetensors")
    right = load_file(path)
    touched, norm = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"

    def spoil(name: str, change: Any) -> Any:
        wrong = {key: tensor.clone() for key, tensor in right.items()}
        wrong[name] = change(wrong[name])
        save_file(wrong, path)
        return prove_delta(plan, target, nothing)

    base = Weights.open(tiny_llama_dir).tensor(touched).to(right[touched].dtype)
    forgotten = spoil(touched, lambda t: base)
    assert not forgotten.passed
    assert forgotten.worst_tensor == touched
    doubled = spoil(touched, lambda t: t + (t - base))
    assert not doubled.passed
    assert "units in the last place" in doubled.detail
    single = spoil(touched, lambda t: t.index_put((torch.tensor(63), torch.tensor(63)), t[0, 0]))
    assert not single.passed
    nan = spoil(
        touched, lambda t: t.index_put((torch.tensor(0), torch.tensor(0)), t[0, 0] * math.nan)
    )
    assert nan.worst_ulp == math.inf
    other = spoil(norm, lambda t: t * 1.0625)
    assert other.differing == (norm,)
    assert "untouched" in other.detail
    save_file({key: tensor for key, tensor in right.items() if key != norm}, path)
    assert prove_delta(plan, target, nothing).missing == (norm,)


def test_large_tensors_are_sampled_evenly(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arriero.merging.proof._SAMPLE", 1000)
    adapter = tiny_adapter(tmp_path / "a", tiny_llama_dir)
    plan = merged_by_hand(tiny_llama_dir, adapter, tmp_path / "m")
    proof = prove_delta(plan, tmp_path / "m", nothing)
    assert proof.merged == 4
    assert proof.sampled < 4 * 1000
    assert proof.changed > 0.9


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_nan_in_the_bases_weights_does_not_pass(
    room: "Room", tiny_llama_dir: Path, tmp_path: Path, name: str
) -> None:
    place = shutil.copytree(tiny_llama_dir, tmp_path / "sick")
    path = str(place / "model.safetensors")
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = math.nan
    save_file(tensors, path, {"format": "pt"})
    adapter = tiny_adapter(tmp_path / "a", place)
    report = golden_report(room, tiny_llama_dir, adapter, tmp_path / "g")
    base = room.publish(place, "model")
    room.merge(base, [room.publish(adapter, "adapter")], golden=report)
    assert room.verdicts()["merge.logits"] == "failed"


def test_an_untrained_adapter_fails_its_gate_and_the_model_is_kept(
    room: "Room", base: Artifact, tmp_path: Path
) -> None:
    directory = tiny_adapter(tmp_path / "a", base.path)
    path = str(directory / "adapter_model.safetensors")
    save_file({n: t * ("lora_A" in n) for n, t in load_file(path).items()}, path)
    outputs = room.merge(base, [room.publish(directory, "adapter")], gates=SKIP_LOGITS)
    assert room.verdicts()["adapter.health"] == "failed"
    assert outputs[0].gates is None  # all of the job's: published, quarantined


def test_a_trained_adapter_is_not_judged_again(
    room: "Room", base: Artifact, tmp_path: Path
) -> None:
    gate = GateResult("adapter.health", Mode.ENFORCE, Verdict.PASSED)
    adapter = room.publish(tiny_adapter(tmp_path / "a", base.path), "adapter", gates=[gate])
    room.merge(base, [adapter], gates=SKIP_LOGITS)
    assert "adapter.health" not in room.verdicts()


def test_an_adapter_of_another_model_is_refused_before_any_work(
    room: "Room", adapter: Artifact, tmp_path: Path
) -> None:
    narrow = room.publish(tiny_llama(tmp_path / "narrow", hidden=32), "model")
    with pytest.raises(FailedPrecondition, match=r"base \(32, 32\), adapter \(64, 64\)"):
        room.merge(narrow, [adapter])
    assert not room.jobs


def test_an_unsupported_adapter_is_refused_before_any_work(
    room: "Room", base: Artifact, tmp_path: Path
) -> None:
    pooled = room.publish(tiny_adapter(tmp_path / "a", base.path, use_qalora=True), "adapter")
    with pytest.raises(FailedPrecondition, match="use_qalora is not supported"):
        room.merge(base, [pooled])
    assert not room.jobs


def test_a_quantized_base_is_refused(
    room: "Room", adapter: Artifact, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    place = shutil.copytree(tiny_llama_dir, tmp_path / "q")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "quantization_config": {"x": 1}}))
    with pytest.raises(FailedPrecondition, match="the base is quantized"):
        room.merge(room.publish(place, "model"), [adapter])


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"weights": [1.0, 2.0]}, "weights"),
        ({"weights": [0.0]}, "weights[0]"),
        ({"weights": [math.nan]}, "weights[0]"),
        ({"weights": [math.inf]}, "weights[0]"),
        ({"dtype": "int4"}, "dtype"),
        ({"max_shard_size": 0}, "max_shard_size"),
        ({"max_shard_size": -5}, "max_shard_size"),
        ({"gates": {"nothing": 1}}, "gates['nothing']"),
    ],
)
def test_wrong_fields_are_named(
    room: "Room", base: Artifact, adapter: Artifact, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        room.merge(base, [adapter], **fields)
    assert caught.value.violations[0].field == field


def test_adapters_are_needed_and_differ(room: "Room", base: Artifact, adapter: Artifact) -> None:
    for adapters in ([], [adapter, adapter]):
        with pytest.raises(InvalidArgument) as caught:
            room.merge(base, adapters)
        assert caught.value.violations[0].field == "adapters"


def test_a_spec_is_checked_before_its_inputs_exist(room: "Room") -> None:
    from arriero.merging.specs import check_merge

    context = ResolveContext(room.store, {}, SourceSettings())
    check_merge(merging_pb2.MergeSpec(model="base", adapters=["sft"], weights=[2]), context)
    with pytest.raises(InvalidArgument, match="2 entries for 1 adapters"):
        check_merge(merging_pb2.MergeSpec(model="base", adapters=["sft"], weights=[1, 2]), context)


def test_an_adapter_that_was_waived_is_not_judged_again(
    room: "Room", base: Artifact, tmp_path: Path
) -> None:
    directory = tiny_adapter(tmp_path / "zero", base.path, targets=TARGETS)
    path = str(directory / "adapter_model.safetensors")
    save_file({n: t * ("lora_A" in n) for n, t in load_file(path).items()}, path)
    failed = GateResult("adapter.health", Mode.ENFORCE, Verdict.FAILED, detail="B is zero")
    zero = room.publish(directory, "adapter", gates=[failed], labels={"source": "/x"})
    room.merge(base, [zero], gates=SKIP_LOGITS)
    assert room.verdicts()["adapter.health"] == "failed"
    room.store.waive(zero.digest, "adapter.health", "a placeholder", "ann")
    room.merge(base, [room.store.get(zero.digest)], gates=SKIP_LOGITS)
    assert room.verdicts()["adapter.health"] == "skipped"
