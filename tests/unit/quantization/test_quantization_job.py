"""The whole room on a tiny model: llama.cpp's real converter, quantizer and runtime."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arriero.errors import DataLoss, FailedPrecondition, Preempted
from arriero.gates import Verdict
from arriero.llama import Header, Model, QuantType, quantize, read_header
from arriero.operations.job import Job, Output
from arriero.prompts import Template, load
from arriero.quantization import converter
from arriero.quantization import job as quantization_job
from arriero.quantization.job import run_evaluate, run_quantize
from arriero.store import Artifact, Store
from arriero.testing.jobs import run_job
from arriero.v1 import quantization_pb2 as pb
from arriero.v1 import types_pb2

Publish = Callable[..., Artifact]


def quantized(
    model: Artifact,
    store: Store,
    tmp_path: Path,
    *types: str,
    prepare: Callable[[Job], None] | None = None,
    **fields: object,
) -> list[Output]:
    spec = pb.QuantizeSpec(model=model.digest, types=types, **fields)  # type: ignore[arg-type]
    return run_job(
        run_quantize, "quantize", spec, {"model": model}, store, tmp_path, prepare=prepare
    )


def evaluated(
    files: list[Artifact], golden: Artifact, store: Store, tmp_path: Path, max_kld: float | None
) -> list[Output]:
    spec = pb.EvaluateSpec(models=[a.digest for a in files], golden=golden.digest)
    if max_kld is not None:
        spec.choose.smallest.max_kld = max_kld
    inputs = {"models": files, "golden": golden}
    return run_job(run_evaluate, "evaluate", spec, inputs, store, tmp_path)


def test_a_model_becomes_files_that_are_measured_and_chosen_from(
    model: Artifact, golden: Artifact, store: Store, publish: Publish, tmp_path: Path
) -> None:
    jobs: list[Job] = []
    outputs = quantized(model, store, tmp_path, "F32", "Q8_0", "Q4_0", prepare=jobs.append)
    assert [o.name for o in outputs] == ["F32", "Q8_0", "Q4_0"]
    for output in outputs:
        (path,) = output.path.iterdir()
        assert path.name == f"tiny.{output.name}.gguf"
        header = read_header(path)
        assert output.kind == "gguf"
        assert output.golden == golden.digest
        assert output.labels == {"quant_type": output.name}
        assert output.metrics["size_bytes"] == path.stat().st_size
        assert output.metrics["bits_per_weight"] == header.bits_per_weight
        assert header.metadata["general.name"] == "tiny"
        assert header.metadata["arriero.source"] == model.digest
        template = Template.from_json(header.metadata["arriero.template"])
        assert template == load("alpaca")
        with Model(path, vocab_only=True) as loaded:
            assert loaded.chat_template == template.chat_template
    (gate,) = jobs[0].gates.results
    assert (gate.gate, gate.verdict, gate.figure) == ("gguf.tokens", Verdict.PASSED, 0.0)
    left = [*jobs[0].scratch.rglob("*.gguf"), *jobs[0].checkpoints.iterdir()]
    assert not left

    files = [
        publish(o.path, o.kind, name=o.artifact_name, golden=o.golden, labels=o.labels)
        for o in outputs
    ]
    chosen, report = evaluated(files, golden, store, tmp_path / "evaluate", 0.05)
    data = json.loads((report.path / "report.json").read_text())
    figures = {m["quant_type"]: m for m in data["models"]}
    assert figures["F32"]["kl_divergence"] < 1e-4
    assert figures["F32"]["top1_agreement"] == 1.0
    assert figures["F32"]["kl_divergence"] < figures["Q8_0"]["kl_divergence"] < 0.05
    assert figures["Q8_0"]["kl_divergence"] < figures["Q4_0"]["kl_divergence"]
    assert chosen.name == "chosen"
    assert data["chosen"] == chosen.existing
    smallest = min(
        (m for m in data["models"] if m["kl_divergence"] <= 0.05), key=lambda m: m["size_bytes"]
    )
    assert chosen.existing == smallest["digest"]
    assert report.metrics["kl_divergence"] == smallest["kl_divergence"]
    assert "chosen" in (report.path / "report.txt").read_text()

    with pytest.raises(FailedPrecondition, match="Q8_0"):
        evaluated(files[1:], golden, store, tmp_path / "strict", 1e-9)
    (only,) = evaluated(files[1:2], golden, store, tmp_path / "report", None)
    assert only.name == "report"


def test_another_tokenizer_fails_the_gate_and_keeps_the_files(
    model: Artifact, store: Store, publish: Publish, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(model.path, changed, copy_function=shutil.copyfile)
    path = changed / "tokenizer.json"
    data = json.loads(path.read_text())
    # The converter reads tokenizer.model; transformers would split digits off and lower them.
    data["normalizer"]["normalizers"].insert(0, {"type": "Lowercase"})
    path.chmod(0o644)
    path.write_text(json.dumps(data))
    other = publish(changed, "model", name="changed")
    jobs: list[Job] = []
    outputs = quantized(other, store, tmp_path, "Q8_0", prepare=jobs.append)
    (gate,) = jobs[0].gates.results
    assert gate.verdict is Verdict.FAILED
    assert gate.figure is not None
    assert gate.figure > 5
    assert "where the model's tokenizer has" in gate.detail
    assert len(outputs) == 1

    def skip(job: Job) -> None:
        jobs.append(job)

    gates = {"gguf.tokens": types_pb2.GATE_MODE_SKIP}
    quantized(other, store, tmp_path / "skip", "Q8_0", gates=gates, prepare=skip)
    assert jobs[1].gates.results[0].verdict is Verdict.SKIPPED


def test_a_tokenizer_that_the_converter_does_not_know_is_explained(
    model: Artifact,
    store: Store,
    publish: Publish,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(model.path, changed, copy_function=shutil.copyfile)
    (changed / "tokenizer.model").unlink()
    path = changed / "tokenizer.json"
    data = json.loads(path.read_text())
    data["normalizer"] = None
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}
    path.write_text(json.dumps(data))
    other = publish(changed, "model", name="changed")
    caplog.set_level(logging.INFO, logger="arriero.job")
    with pytest.raises(FailedPrecondition) as caught:
        quantized(other, store, tmp_path, "Q8_0")
    assert "llama.cpp's converter" in caught.value.message
    assert "Traceback" not in caught.value.message
    assert any("converter:" in record.message for record in caplog.records)


def test_an_attempt_goes_on_where_the_one_before_was_stopped(
    model: Artifact, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    jobs: list[Job] = []

    def counted(source: Path, target: Path, kind: QuantType, **options: Any) -> Header:
        made.append(kind.name)
        if kind.name == "Q8_0" and jobs[0].attempt == 1:
            jobs[0].preempted.set()
        return quantize(source, target, kind, **options)

    monkeypatch.setattr(quantization_job, "quantize", counted)
    spec = pb.QuantizeSpec(model=model.digest, types=["F16", "Q8_0", "Q4_0"])
    arguments = (run_quantize, "quantize", spec, {"model": model}, store, tmp_path)
    with pytest.raises(Preempted):
        run_job(*arguments, attempt=1, prepare=jobs.append)

    def gone() -> Path:
        raise AssertionError("converted again")

    monkeypatch.setattr(converter, "locate", gone)
    outputs = run_job(*arguments, attempt=2)
    assert made == ["F16", "Q8_0", "Q4_0"]
    assert [o.name for o in outputs] == ["F16", "Q8_0", "Q4_0"]
    assert all(len(list(o.path.iterdir())) == 1 for o in outputs)


def test_preemption_ends_the_converter(model: Artifact, store: Store, tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        quantized(model, store, tmp_path, "Q8_0", prepare=lambda job: job.preempted.set())


def test_a_cut_off_file_is_data_loss(
    golden: Artifact, store: Store, publish: Publish, tiny_gguf: Path, tmp_path: Path
) -> None:
    source = tmp_path / "cut"
    source.mkdir()
    (source / "tiny.gguf").write_bytes(tiny_gguf.read_bytes()[:-5000])
    with pytest.raises(DataLoss, match="cut off"):
        evaluated([publish(source, "gguf", name="cut")], golden, store, tmp_path, None)


def test_golden_logits_of_another_vocabulary_are_refused(
    golden_dir: Path, store: Store, publish: Publish, tiny_gguf: Path, tmp_path: Path
) -> None:
    import numpy as np

    from arriero.gates.golden import Golden

    other = tmp_path / "golden"
    other.mkdir()
    mine = Golden.read(golden_dir)
    Golden(mine.tokens, mine.lengths, np.pad(mine.logprobs, ((0, 0), (0, 100)))).write(other)
    source = tmp_path / "file"
    source.mkdir()
    shutil.copy(tiny_gguf, source)
    gguf = publish(source, "gguf", name="tiny")
    with pytest.raises(FailedPrecondition, match="another tokenizer or model"):
        evaluated([gguf], publish(other, "report"), store, tmp_path, None)
