"""The whole room on a tiny model: llama.cpp's real converter, quantizer and runtime."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.errors import DataLoss, FailedPrecondition, Preempted
from arriero.gates import Verdict
from arriero.gates.golden import Golden
from arriero.llama import Header, Model, QuantType, quantize, read_header, resolve_type
from arriero.operations.job import Job, Output
from arriero.prompts import Template, load
from arriero.quantization import converter, evaluate, reference
from arriero.quantization.evaluate import run_evaluate
from arriero.quantization.quantize import run_quantize
from arriero.store import Artifact, Store
from arriero.store.files import sha256_file
from arriero.testing.jobs import run_job
from arriero.testing.models import CORPUS
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
        assert output.labels == {"quant_type": output.name, "method": "onepass"}
        assert output.metrics["size_bytes"] == path.stat().st_size
        assert output.metrics["bits_per_weight"] == header.bits_per_weight
        assert header.metadata["general.name"] == "tiny"
        assert header.metadata["general.quantized_by"] == "Arriero"
        assert header.metadata["arriero.source"] == model.digest
        template = Template.from_json(header.metadata["arriero.template"])
        assert template == load("alpaca")
        with Model(path, vocab_only=True) as loaded:
            assert loaded.chat_template == template.chat_template
    assert [(g.gate, g.verdict, g.figure) for g in jobs[0].gates.results] == [
        ("gguf.tokens", Verdict.PASSED, 0.0),
        ("gguf.template", Verdict.PASSED, None),
        ("gguf.rope", Verdict.PASSED, 0.0),
    ]
    # Nothing of a model's size lay between: the outline is a header and a hole.
    (outline,) = jobs[0].scratch.rglob("*.gguf")
    assert outline.stat().st_blocks * 512 < outline.stat().st_size / 2
    assert not list(jobs[0].checkpoints.iterdir())

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


def test_a_space_that_llama_cpp_adds_after_special_tokens_is_told_with_a_remedy(
    model: Artifact, store: Store, publish: Publish, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(model.path, changed, copy_function=shutil.copyfile)
    # As transformers writes a LlamaTokenizer with legacy: false.
    data = json.loads((changed / "tokenizer.json").read_text())
    data["normalizer"] = None
    data["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "\u2581",
        "prepend_scheme": "first",
        "split": False,
    }
    (changed / "tokenizer.json").chmod(0o644)
    (changed / "tokenizer.json").write_text(json.dumps(data))
    config = changed / "tokenizer_config.json"
    config.chmod(0o644)
    config.write_text(json.dumps({**json.loads(config.read_text()), "legacy": False}))
    (changed / "arriero-template.json").unlink()
    load("vicuna").write(changed)  # text follows </s> in a second turn
    jobs: list[Job] = []
    quantized(publish(changed, "model"), store, tmp_path, "Q8_0", prepare=jobs.append)
    gate, *_ = jobs[0].gates.results
    assert gate.verdict is Verdict.FAILED
    assert "template vicuna" in gate.detail
    assert "set legacy: true in tokenizer_config.json" in gate.detail


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
    gate, *_ = jobs[0].gates.results
    assert gate.verdict is Verdict.FAILED
    assert gate.figure is not None
    assert gate.figure > 5
    assert "where the model's tokenizer has" in gate.detail
    assert [output.name for output in outputs] == ["Q8_0", "golden"]

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


def test_a_model_without_a_tokenizer_is_told(
    tiny_llama_dir: Path, store: Store, publish: Publish, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_llama_dir, bare)
    for path in bare.glob("tokenizer*"):
        path.unlink()
    spec = pb.QuantizeSpec(types=["Q8_0"])
    with pytest.raises(FailedPrecondition, match="holds no tokenizer"):
        run_job(run_quantize, "quantize", spec, {"model": publish(bare, "model")}, store, tmp_path)


def test_the_reference_chain_goes_on_where_an_attempt_was_stopped(
    model: Artifact, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    jobs: list[Job] = []

    def counted(source: Path, target: Path, kind: QuantType, **options: Any) -> Header:
        made.append(kind.name)
        if kind.name == "Q8_0" and jobs[0].attempt == 1:
            jobs[0].preempted.set()
        return quantize(source, target, kind, **options)

    monkeypatch.setattr(reference, "quantize", counted)
    types = ["F16", "Q8_0", "Q4_0"]
    spec = pb.QuantizeSpec(model=model.digest, types=types, method="reference")
    arguments = (run_quantize, "quantize", spec, {"model": model}, store, tmp_path)
    with pytest.raises(Preempted):
        run_job(*arguments, attempt=1, prepare=jobs.append)

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(converter, "convert", again)
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
    other = tmp_path / "golden"
    other.mkdir()
    mine = Golden.read(golden_dir)
    Golden(mine.tokens, mine.lengths, np.pad(mine.logprobs, ((0, 0), (0, 100)))).write(other)
    source = tmp_path / "file"
    source.mkdir()
    shutil.copy(tiny_gguf, source)
    gguf = publish(source, "gguf", name="tiny")
    with pytest.raises(FailedPrecondition, match="of 384 tokens, the golden logits one of 484"):
        evaluated([gguf], publish(other, "report"), store, tmp_path, None)


@pytest.fixture
def files(publish: Publish, tiny_gguf: Path, tmp_path: Path) -> list[Artifact]:
    """The tiny model's F16, Q8_0 and Q4_0 files, as imports: without golden logits."""
    made = []
    for name in ("F16", "Q8_0", "Q4_0"):
        source = tmp_path / "files" / name
        source.mkdir(parents=True)
        target = source / f"tiny.{name}.gguf"
        if name == "F16":
            shutil.copy(tiny_gguf, target)
        else:
            quantize(tiny_gguf, target, resolve_type(name), n_threads=1)
        made.append(publish(source, "gguf", name="tiny", labels={"quant_type": name}))
    return made


def test_perplexity_speed_and_the_distance_to_a_reference_are_reported(
    files: list[Artifact], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the reference did not fit: two windows at a time.
    monkeypatch.setattr(evaluate, "REFERENCE_BYTES", 2 * 31 * 384 * 4)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(CORPUS))
    spec = pb.EvaluateSpec(
        models=[a.digest for a in files[1:]],
        reference=files[0].digest,
        text=str(text),
        sha256="sha256:" + hashlib.sha256(text.read_bytes()).hexdigest(),
        context=64,
        chunks=3,
        speed=True,
    )
    spec.choose.smallest.max_kld = 0.01
    jobs: list[Job] = []
    chosen, made = run_job(
        run_evaluate, "evaluate", spec, {"models": files[1:], "reference": files[0]}, store,
        tmp_path, prepare=jobs.append,
    )  # fmt: skip
    data = json.loads((made.path / "report.json").read_text())
    assert data["windows"]["windows"] == 3
    assert data["windows"]["scored_tokens"] == 3 * 31
    q8, q4 = data["models"]
    assert q8["reference_kl"] < 0.01 < q4["reference_kl"]
    assert q8["reference_top1"] > q4["reference_top1"]
    assert q8["perplexity"] == pytest.approx(data["reference"]["perplexity"], rel=0.05)
    assert q8["kl_divergence"] is None
    assert q8["generation_tokens_per_second"] > 0
    assert chosen.existing == files[1].digest
    assert made.metrics["Q4_0.reference_kl"] == q4["reference_kl"]
    (gate,) = jobs[0].gates.results
    assert (gate.gate, gate.verdict) == ("quant.kld", Verdict.PASSED)
    shown = (made.path / "report.txt").read_text()
    assert "(reference)" in shown
    assert "perplexity" in shown


def test_a_reference_is_compared_over_the_golden_tokens_where_there_is_no_text(
    files: list[Artifact], golden: Artifact, store: Store, tmp_path: Path
) -> None:
    spec = pb.EvaluateSpec(
        models=[files[2].digest], reference=files[0].digest, golden=golden.digest
    )
    inputs = {"models": files[2:], "reference": files[0], "golden": golden}
    (made,) = run_job(run_evaluate, "evaluate", spec, inputs, store, tmp_path)
    (q4,) = json.loads((made.path / "report.json").read_text())["models"]
    # F16 of the tiny model is its golden logits but for rounding.
    assert q4["reference_kl"] == pytest.approx(q4["kl_divergence"], rel=0.05)


def test_rows_are_scored_as_a_training_evaluates_them(
    files: list[Artifact],
    store: Store,
    publish: Publish,
    write_tokens: Callable[..., Path],
    tmp_path: Path,
) -> None:
    ids = [1, *range(260, 300)]
    write_tokens(tmp_path / "rows", [(ids, [-100] * 20 + ids[20:]), (ids[:9], ids[:9])])
    rows = publish(tmp_path / "rows", "dataset", name="rows")
    spec = pb.EvaluateSpec(models=[files[0].digest], dataset=rows.digest)
    inputs = {"models": files[:1], "dataset": rows}
    (made,) = run_job(run_evaluate, "evaluate", spec, inputs, store, tmp_path)
    data = json.loads((made.path / "report.json").read_text())
    assert data["windows"] == {"dataset": rows.digest, "windows": 2, "scored_tokens": 21 + 8}
    assert data["models"][0]["scored_tokens"] == 29


def test_a_text_that_changed_since_is_refused(
    files: list[Artifact], store: Store, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("now this")
    spec = pb.EvaluateSpec(
        models=[files[0].digest], text=str(text), sha256="sha256:" + "0" * 64, context=64
    )
    with pytest.raises(DataLoss, match="changed since"):
        run_job(run_evaluate, "evaluate", spec, {"models": files[:1]}, store, tmp_path)


def test_a_text_in_another_encoding_is_refused(
    files: list[Artifact], store: Store, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("na" + "ï" * 400, encoding="latin-1")
    spec = pb.EvaluateSpec(
        models=[files[0].digest],
        text=str(text),
        sha256=f"sha256:{sha256_file(text)[1]}",
        context=64,
    )
    with pytest.raises(FailedPrecondition, match="no UTF-8 text: byte 0xef at offset 2"):
        run_job(run_evaluate, "evaluate", spec, {"models": files[:1]}, store, tmp_path)


def test_files_of_another_model_fail_quant_kld(
    files: list[Artifact], store: Store, publish: Publish, golden_dir: Path, tmp_path: Path
) -> None:
    mine = Golden.read(golden_dir)
    other = tmp_path / "golden"
    other.mkdir()
    # What another model of the same vocabulary would say: everything one token further.
    Golden(mine.tokens, mine.lengths, np.roll(mine.logprobs, 1, axis=1)).write(other)
    golden = publish(other, "report")
    jobs: list[Job] = []
    spec = pb.EvaluateSpec(models=[a.digest for a in files], golden=golden.digest)
    inputs = {"models": files, "golden": golden}
    run_job(run_evaluate, "evaluate", spec, inputs, store, tmp_path, prepare=jobs.append)
    (gate,) = jobs[0].gates.results
    assert gate.verdict is Verdict.FAILED
    assert gate.figure is not None
    assert gate.figure > 1
    assert "of one model" in gate.detail


def test_a_gguf_of_an_unknown_architecture_is_named(
    store: Store, publish: Publish, golden: Artifact, tiny_gguf: Path, tmp_path: Path
) -> None:
    source = tmp_path / "odd"
    source.mkdir()
    # Same length, so that every offset stays.
    data = tiny_gguf.read_bytes().replace(b"llama", b"lhama")
    (source / "odd.gguf").write_bytes(data)
    spec = pb.EvaluateSpec(models=["x"], golden=golden.digest)
    gguf = publish(source, "gguf", name="odd")
    with pytest.raises(DataLoss, match="unknown model architecture: 'lhama'"):
        run_job(run_evaluate, "evaluate", spec, {"models": gguf, "golden": golden}, store, tmp_path)
