"""The whole job, in this process, against a real store."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from arriero.errors import DiskFull, FailedPrecondition, Preempted  # noqa: E402
from arriero.gates import Verdict  # noqa: E402
from arriero.gates.golden import Golden, compare  # noqa: E402
from arriero.testing.jobs import run_job  # noqa: E402
from arriero.training.golden import golden_logits, merged  # noqa: E402
from arriero.training.job import train  # noqa: E402
from arriero.training.spec import resolve  # noqa: E402
from arriero.v1 import training_pb2, types_pb2  # noqa: E402
from arriero.weights import LoraAdapter, MergedWeights, Weights  # noqa: E402
from arriero.weights.health import check_adapter  # noqa: E402

FAST = {
    "max_steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "dtype": "float32",
    "save_steps": 2,
    "lora": {"r": 4, "target_modules": ["all-linear"]},
}


@pytest.fixture
def room(kit, tmp_path: Path):
    """Resolves and runs a spec, as the service and its job do."""

    def run(prepare=None, attempt: int = 1, inputs=None, **fields):
        spec = training_pb2.TrainSpec(**{**FAST, **fields})
        resolved = resolve(spec, kit.context(**inputs)).spec
        return run_job(
            train, "train", resolved, inputs, kit.store, tmp_path, attempt=attempt, prepare=prepare
        )

    return run


class KeptJob:
    """Keeps the job that a handler gets."""

    def __call__(self, job):
        self.job = job


def test_a_model_and_rows_become_an_adapter_and_golden_logits(room, model, dataset, val_dataset):
    kept = KeptJob()
    inputs = {"model": model, "dataset": dataset, "val_dataset": val_dataset}
    adapter, golden = room(kept, inputs=inputs)

    assert (adapter.name, adapter.kind, adapter.golden) == ("adapter", "adapter", "output:golden")
    files = sorted(path.name for path in adapter.path.iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "arriero-template.json"]
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == model.digest
    assert config["r"] == 4
    assert len(LoraAdapter.open(adapter.path).pairs) == 2 * 7
    assert check_adapter(adapter.path, base=Weights.open(model.path)) == []
    assert adapter.metrics["steps"] == 6
    assert adapter.metrics["tokens"] > adapter.metrics["trained_tokens"] > 0
    assert adapter.metrics["loss_last"] < adapter.metrics["loss_first"]
    assert adapter.metrics["val_loss"] > 0
    assert adapter.licenses == ("mit",)
    verdicts = {item.gate: item.verdict for item in kept.job.gates.results}
    assert verdicts == {
        "train.finite": Verdict.PASSED,
        "train.improves": Verdict.WARNED,  # these rows are noise: by heart is all there is
        "adapter.health": Verdict.PASSED,
    }

    assert (golden.kind, golden.labels) == ("report", {"report": "golden"})
    read = Golden.read(golden.path)
    probe = json.loads((dataset.path / "probe.json").read_text())["sequences"]
    assert [ids.tolist() for ids in read.sequences] == probe
    report = json.loads((golden.path / "report.json").read_text())
    assert len(report["losses"]) == 6
    progress = kept.job.meter.read()
    assert progress.HasField("checkpoint_time")
    # The adapter really changed the model.
    untuned = _logits(model.path, probe)
    assert compare(read, untuned).kl_divergence > 1e-3


def _logits(directory: Path, sequences, adapter: Path | None = None) -> np.ndarray:
    """transformers' own float32, with PEFT's own unmerged adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([ids])).logits[0].numpy() for ids in sequences]
    return np.concatenate(rows)


def test_golden_logits_are_those_of_the_trained_adapter(room, model, dataset):
    adapter, golden = room(inputs={"model": model, "dataset": dataset})
    read = Golden.read(golden.path)
    sequences = [ids.tolist() for ids in read.sequences]
    found = compare(read, _logits(model.path, sequences, adapter.path))
    assert found.kl_divergence < 2e-4  # what golden's fp16 leaves
    assert found.top1_agreement == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_golden_logits_are_those_of_the_merged_checkpoint_exactly(kit, room, tmp_path, dtype):
    """Merge into files of the base's type, load those in float32: the same numbers."""
    from safetensors.torch import save_file

    model = kit.model(dtype=dtype)
    dataset = kit.dataset(kit.draw_rows(12), model.digest)
    adapter, golden = room(inputs={"model": model, "dataset": dataset})

    weights = MergedWeights.open(model.path, [adapter.path], [1.0])
    tensors = {name: weights.tensor(name) for name in weights}
    target = tmp_path / "merged"
    target.mkdir()
    save_file(tensors, str(target / "model.safetensors"), metadata={"format": "pt"})
    (target / "config.json").write_bytes((model.path / "config.json").read_bytes())

    read = Golden.read(golden.path)
    expected = torch.log_softmax(
        torch.from_numpy(_logits(target, [ids.tolist() for ids in read.sequences])), dim=-1
    )
    # fp16 keeps 11 bits.
    np.testing.assert_allclose(read.logprobs.astype(np.float32), expected.numpy(), rtol=1e-3)
    assert merged(model.path, adapter.path).dtype == getattr(torch, dtype)


def test_golden_logits_of_a_base_with_mixed_types_keep_each_type(kit, room, tmp_path):
    from safetensors.torch import load_file, save_file

    def mix(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(str(path))
        for name in tensors:
            if "norm" not in name:
                tensors[name] = tensors[name].bfloat16()
        save_file(tensors, str(path), metadata={"format": "pt"})

    model = kit.model(tweak=mix)
    dataset = kit.dataset(kit.draw_rows(12), model.digest)
    adapter, _ = room(inputs={"model": model, "dataset": dataset})
    whole = merged(model.path, adapter.path)
    weight = whole.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, weight.bfloat16().float())


def test_logits_that_overflow_are_refused(kit, room, model, dataset):
    adapter, _ = room(inputs={"model": model, "dataset": dataset})
    path = adapter.path / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor * 1e30 for name, tensor in load_file(str(path)).items()}
    save_file(tensors, str(path))
    with pytest.raises(FailedPrecondition, match="logits are not finite"):
        golden_logits(model.path, adapter.path, [[1, 2, 3]])


class StopAt:
    """Asks the job to leave once it reports a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, job):
        self.job = job
        update = job.meter.update

        def watched(**progress):
            update(**progress)
            if progress["phase"] == "training" and progress["step"] >= self.step:
                job.preempted.set()

        job.meter.update = watched


def losses(outputs) -> list[float]:
    return json.loads((outputs[1].path / "report.json").read_text())["losses"]


def test_a_preempted_job_saves_and_the_next_attempt_gives_the_same_adapter(
    room, model, dataset, tmp_path
):
    inputs = {"model": model, "dataset": dataset}
    with pytest.raises(Preempted, match="step 3 of 6"):
        room(StopAt(3), inputs=inputs)
    second = KeptJob()
    resumed = room(second, attempt=2, inputs=inputs)
    (tmp_path / "staging").rename(tmp_path / "first")  # nothing to resume from
    moved = tmp_path / "first/attempts/2/outputs"
    straight = room(attempt=3, inputs=inputs)
    resumed_losses = json.loads((moved / "golden/report.json").read_text())["losses"]
    assert resumed_losses == pytest.approx(losses(straight), abs=1e-5)
    one = (moved / "adapter/adapter_model.safetensors").read_bytes()
    other = (straight[0].path / "adapter_model.safetensors").read_bytes()
    assert one == other
    assert resumed[0].metrics == pytest.approx(straight[0].metrics)


def test_a_job_that_was_killed_goes_on_from_its_newest_whole_checkpoint(
    room, model, dataset, tmp_path
):
    inputs = {"model": model, "dataset": dataset}
    with pytest.raises(Preempted):
        room(StopAt(5), inputs=inputs)
    newest = sorted((tmp_path / "staging/checkpoints").iterdir())[-1]
    (newest / "tensors.pt").write_bytes(b"torn")
    seen = []

    def watch(job):
        update = job.meter.update
        job.meter.update = lambda **now: (seen.append(now), update(**now))

    room(watch, attempt=2, inputs=inputs)
    training = [now for now in seen if now["phase"] == "training"]
    # It says where it goes on, so that the time left is told from this process' own speed.
    assert [now["step"] for now in training] == [4, 5, 6]
    assert training[0]["checkpoint_time"] is not None
    assert training[0]["tokens"] > 0


def test_an_adapter_that_learned_nothing_is_refused_by_its_gate(room, model, dataset, monkeypatch):
    from arriero.training.loop import Loop

    monkeypatch.setattr(Loop, "_apply", lambda *_: True)
    kept = KeptJob()
    outputs = room(kept, inputs={"model": model, "dataset": dataset})
    assert [output.name for output in outputs] == ["adapter"]
    (verdict,) = kept.job.gates.failed
    assert "B matrices are zero" in verdict.detail


def test_a_skipped_gate_is_recorded_as_such(room, model, dataset):
    kept = KeptJob()
    gates = {"adapter.health": types_pb2.GATE_MODE_SKIP}
    outputs = room(kept, inputs={"model": model, "dataset": dataset}, gates=gates)
    assert len(outputs) == 2
    (verdict,) = (item for item in kept.job.gates.results if item.gate == "adapter.health")
    assert verdict.verdict is Verdict.SKIPPED


def test_a_full_store_is_found_after_the_first_step(room, model, dataset, monkeypatch, tmp_path):
    seen = []

    def limit(job):
        monkeypatch.setenv("ARRIERO_STORE_QUOTA_BYTES", "1000")
        update = job.meter.update
        job.meter.update = lambda **now: (seen.append(now), update(**now))

    with pytest.raises(DiskFull) as caught:
        room(limit, inputs={"model": model, "dataset": dataset})
    assert caught.value.needed > 1000
    assert max(now["step"] for now in seen if now["phase"] == "training") == 1
    assert list((tmp_path / "staging/checkpoints").iterdir()) == []


def test_a_loss_that_is_not_finite_fails_with_its_step(room, model, dataset):
    with pytest.raises(FailedPrecondition, match="at step") as caught:
        room(
            inputs={"model": model, "dataset": dataset},
            learning_rate=1e30,
            max_steps=20,
            max_grad_norm=0,
        )
    assert caught.value.reason == "LOSS_NOT_FINITE"


def test_a_dataset_without_a_probe_is_probed_with_its_own_rows(kit, room, model):
    from arriero.store import ManifestDraft

    staged = kit.store.staging("test", "bare") / "files"
    kit.write_dataset(staged, kit.draw_rows(8), model.digest)
    (staged / "probe.json").unlink()
    bare = kit.store.publish(staged, ManifestDraft(kind="dataset", name="bare"))
    _, golden = room(inputs={"model": model, "dataset": bare})
    assert len(Golden.read(golden.path).lengths) == 8


def test_an_early_request_to_leave_is_heard_before_the_model_is_loaded(room, model, dataset):
    with pytest.raises(Preempted):
        room(lambda job: job.preempted.set(), inputs={"model": model, "dataset": dataset})
