"""Golden logits of what no training left any for."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from arriero.gates import Verdict
from arriero.gates.golden import Golden
from arriero.operations.job import Job, Output
from arriero.operations.kinds import ResolveContext
from arriero.quantization.evaluate import run_evaluate
from arriero.quantization.quantize import run_quantize
from arriero.quantization.quantize_spec import resolve_quantize
from arriero.settings import SourceSettings
from arriero.store import Artifact, ManifestDraft, Store
from arriero.testing.adapters import tiny_adapter
from arriero.testing.jobs import run_job
from arriero.testing.models import tiny_llama
from arriero.v1 import quantization_pb2 as pb
from arriero.v1 import types_pb2
from arriero.weights import MergedWeights, oracle

Publish = Callable[..., Artifact]


def quantized(
    store: Store,
    place: Path,
    model: Artifact,
    adapters: list[Artifact],
    jobs: list[Job] | None = None,
    **fields: object,
) -> dict[str, Output]:
    inputs = {"model": [model], "adapters": adapters}
    spec = pb.QuantizeSpec(
        model=model.digest,
        adapters=[adapter.digest for adapter in adapters],
        types=["Q8_0"],
        **fields,  # type: ignore[arg-type]
    )
    resolved = resolve_quantize(spec, ResolveContext(store, inputs, SourceSettings())).spec
    prepare = (jobs if jobs is not None else []).append
    made = run_job(run_quantize, "quantize", resolved, inputs, store, place, prepare=prepare)
    return {output.name: output for output in made}


def report_of(base: Path, adapter: Path, publish: Publish, place: Path) -> Artifact:
    place.mkdir()
    oracle.golden_of(MergedWeights.open(base, [adapter], [1.0]), [[1, 7, 9, 11], [1, 50]]).write(
        place
    )
    return publish(place, "report")


def test_a_weighted_blend_is_judged_by_logits_of_its_own(
    tiny_llama_dir: Path, store: Store, publish: Publish, tmp_path: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = publish(tiny_llama_dir, "model", name="tiny")
    directories = [
        tiny_adapter(tmp_path / str(i), tiny_llama_dir, seed=i, scale=0.2) for i in range(2)
    ]
    adapters = [publish(directory, "adapter", name="tuned") for directory in directories]
    made = quantized(store, tmp_path / "job", base, adapters, weights=[0.7, 0.4])
    assert list(made) == ["Q8_0", "golden"]
    assert made["Q8_0"].golden == "output:golden"
    report = json.loads((made["golden"].path / "report.json").read_text())
    assert report["made_by"] == "quantize"
    assert report["weights"] == [0.7, 0.4]

    golden = Golden.read(made["golden"].path)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    for directory, weight in zip(directories, (0.7, 0.4), strict=True):
        peft = PeftModel.from_pretrained(model, str(directory))
        for module in peft.modules():
            if hasattr(module, "lora_A"):
                module.scaling = {key: value * weight for key, value in module.scaling.items()}
        model = peft.merge_and_unload()
    with torch.inference_mode():
        ids = torch.tensor(golden.sequences[0][None].astype(np.int64))
        expected = torch.log_softmax(model(ids).logits[0], -1).numpy()
    found = golden.logprobs[: len(golden.sequences[0])]
    assert np.abs(found - expected).max() < 2e-2  # log-probabilities in float16

    # What evaluate then measures is what quantizing costs, and no more.
    place = store.staging("test", "file") / "gguf"
    made["Q8_0"].path.rename(place)
    report_artifact = publish(made["golden"].path, "report")
    file = store.publish(
        place, ManifestDraft(kind="gguf", name="tuned", golden=report_artifact.digest)
    )
    jobs: list[Job] = []
    evaluation = pb.EvaluateSpec(models=[file.digest], golden=report_artifact.digest)
    inputs = {"models": [file], "golden": [report_artifact]}
    run_job(
        run_evaluate, "evaluate", evaluation, inputs, store, tmp_path / "e", prepare=jobs.append
    )
    [gate] = [result for result in jobs[0].gates.results if result.gate == "quant.kld"]
    assert gate.verdict is Verdict.PASSED
    assert gate.figure is not None
    assert gate.figure < 0.01


def test_one_adapters_logits_are_not_those_of_half_of_it(
    tiny_llama_dir: Path, store: Store, publish: Publish, tmp_path: Path
) -> None:
    base = publish(tiny_llama_dir, "model", name="tiny")
    directory = tiny_adapter(tmp_path / "a", tiny_llama_dir, base_model_name_or_path=base.digest)
    report = report_of(base.path, directory, publish, tmp_path / "g")
    adapter = publish(directory, "adapter", name="tuned", golden=report.digest)
    whole = quantized(store, tmp_path / "whole", base, [adapter])
    assert list(whole) == ["Q8_0"]
    assert whole["Q8_0"].golden == report.digest
    half = quantized(store, tmp_path / "half", base, [adapter], weights=[0.5])
    assert list(half) == ["Q8_0", "golden"]
    assert half["Q8_0"].golden == "output:golden"


def test_a_model_alone_gets_logits_unless_they_are_skipped(
    tiny_llama_dir: Path, store: Store, publish: Publish, tmp_path: Path
) -> None:
    base = publish(tiny_llama_dir, "model", name="tiny")
    assert list(quantized(store, tmp_path / "a", base, [])) == ["Q8_0", "golden"]
    gates = {"quant.kld": types_pb2.GATE_MODE_SKIP}
    made = quantized(store, tmp_path / "b", base, [], gates=gates)
    assert list(made) == ["Q8_0"]
    assert made["Q8_0"].golden is None


@pytest.mark.parametrize("right", [True, False])
def test_an_adapter_of_another_base_is_refused_by_its_golden_logits(
    tiny_llama_dir: Path, store: Store, publish: Publish, tmp_path: Path, right: bool
) -> None:
    directory = tiny_adapter(
        tmp_path / "a", tiny_llama_dir, base_model_name_or_path="sha256:" + "a" * 64
    )
    report = report_of(tiny_llama_dir, directory, publish, tmp_path / "g")
    adapter = publish(directory, "adapter", name="tuned", golden=report.digest)
    source = tiny_llama_dir if right else tiny_llama(tmp_path / "other", seed=5)
    jobs: list[Job] = []
    made = quantized(store, tmp_path / "job", publish(source, "model"), [adapter], jobs)
    [gate] = [result for result in jobs[0].gates.results if result.gate == "merge.logits"]
    assert gate.verdict is (Verdict.PASSED if right else Verdict.FAILED)
    assert right or "it was trained on another model" in gate.detail
    assert gate in (made["Q8_0"].gates or ())
