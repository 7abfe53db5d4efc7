"""The work of the stage `evaluate`: measure, judge, choose.

Responsibility: tie golden logits, reference, windows and speed to a job's spec,
inputs and outputs. Does not know how any figure is computed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arriero.errors import DataLoss, FailedPrecondition
from arriero.gates.golden import Golden, compare, log_softmax
from arriero.llama import Model, golden_logits, read_header
from arriero.operations.job import Job, Output
from arriero.quantization import limits, scoring, speed, windows
from arriero.quantization.evaluation import Measurement, choose_smallest, metrics, report, table
from arriero.quantization.windows import Window
from arriero.store import Artifact
from arriero.store.files import sha256_file

# Log-probabilities of the reference that are kept on disk at a time.
REFERENCE_BYTES = 1 << 30
# Rows that a vocabulary may be padded by, over what golden logits have.
_PADDING = 1024


@dataclass
class _File:
    """A file under test, and what is known of it."""

    artifact: Artifact
    path: Path
    measured: Measurement

    @classmethod
    def of(cls, artifact: Artifact) -> _File:
        path = gguf_of(artifact)
        header = read_header(path)
        measured = Measurement(
            name=artifact.manifest.name,
            digest=artifact.digest,
            quant_type=limits.type_of(header, artifact.manifest.labels.get("quant_type")),
            size_bytes=header.size,
            bits_per_weight=header.bits_per_weight,
        )
        return cls(artifact, path, measured)


def run_evaluate(job: Job) -> list[Output]:
    """Measure every file; outputs `chosen` (if asked for), `report`."""
    source = job.optional_input("golden") or (
        job.store.get(job.spec.golden) if job.spec.golden else None
    )
    golden = Golden.read(source.path) if source else None
    files = [_File.of(artifact) for artifact in job.inputs["models"]]
    given = job.optional_input("reference")
    reference = _File.of(given) if given else None
    if golden is not None:
        _against_golden(job, files, golden)
    measured_on: dict[str, Any] | None = None
    if job.spec.text or job.inputs.get("dataset"):
        cut, measured_on = _windows(job, files[0].path)
        _over_windows(job, files, reference, cut)
    elif reference is not None:
        assert golden is not None, "the spec was checked"
        _against_reference(job, files, reference, golden)
    if job.spec.speed:
        _speeds(job, files)
    measurements = [file.measured for file in files]
    chosen: Measurement | None = None
    max_kld: float | None = None
    job.progress(phase="choosing", force=True)
    if job.spec.HasField("choose"):
        max_kld = job.spec.choose.smallest.max_kld
        chosen = choose_smallest(measurements, max_kld)
    limits.judge(job.gates, [chosen] if chosen else measurements)
    directory = job.output_dir("report")
    own = reference.measured if reference else None
    data = report(
        measurements,
        golden=source.digest if source else None,
        max_kld=max_kld,
        chosen=chosen,
        reference=own,
        windows=measured_on,
    )
    (directory / "report.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    text = table(measurements, chosen, own)
    (directory / "report.txt").write_text(text, encoding="utf-8")
    for line in text.splitlines():
        job.log.info("%s", line)
    outputs = [
        Output(
            name="report",
            kind="report",
            path=directory,
            artifact_name=measurements[0].name or "evaluation",
            metrics=metrics(measurements, chosen, own),
            labels={"report": "evaluation"},
        )
    ]
    if chosen is not None:
        outputs.insert(0, Output(name="chosen", kind="gguf", existing=chosen.digest))
    return outputs


def gguf_of(artifact: Artifact) -> Path:
    """Path of the one GGUF file of an artifact.

    Raises:
        FailedPrecondition: none, or several.
    """
    names = [entry.path for entry in artifact.manifest.files if entry.path.endswith(".gguf")]
    if len(names) != 1:
        raise FailedPrecondition(
            f"gguf {artifact.digest} holds {len(names)} *.gguf files, expected exactly one"
        )
    return artifact.file(names[0])


# -- golden logits -------------------------------------------------------------


def _against_golden(job: Job, files: Sequence[_File], golden: Golden) -> None:
    total = len(files) * len(golden.tokens)
    for i, file in enumerate(files):
        job.check_preempted()
        kind = file.measured.quant_type
        job.progress(
            phase=f"measuring {kind}", step=i * len(golden.tokens), total=total, unit="tokens"
        )
        started = time.monotonic()
        _check_vocabulary(file, golden)
        found = compare(golden, golden_logits(file.path, golden))
        file.measured.kl_divergence = found.kl_divergence
        file.measured.kl_max = found.kl_max
        file.measured.top1_agreement = found.top1_agreement
        file.measured.confident_disagreements = found.confident_disagreements
        file.measured.tokens = found.tokens
        file.measured.seconds += time.monotonic() - started
        job.log.info("%s: KL %.5f nats per token", kind, found.kl_divergence)


def _check_vocabulary(file: _File, golden: Golden) -> None:
    """Refuse golden logits of another vocabulary before the model is loaded."""
    with Model(file.path, vocab_only=True) as model:
        have = model.n_vocab
    want = golden.logprobs.shape[1]
    if not want <= have <= want + _PADDING:
        raise FailedPrecondition(
            f"{file.path.name} has a vocabulary of {have} tokens, the golden logits one of "
            f"{want}: another tokenizer or model; name the golden logits of the model that the "
            "file was made from",
            reason="OTHER_VOCABULARY",
        )


def _against_reference(job: Job, files: Sequence[_File], reference: _File, golden: Golden) -> None:
    """KL to the reference file over the golden logits' tokens."""
    job.progress(phase="running the reference", force=True)
    logits = log_softmax(golden_logits(reference.path, golden))
    own = Golden(golden.tokens, golden.lengths, logits.astype(np.float16))
    reference.measured.reference_kl = 0.0
    for file in files:
        job.check_preempted()
        job.progress(phase=f"comparing {file.measured.quant_type} with the reference")
        found = compare(own, golden_logits(file.path, golden))
        file.measured.reference_kl = found.kl_divergence
        file.measured.reference_kl_max = found.kl_max
        file.measured.reference_top1 = found.top1_agreement
        file.measured.scored_tokens = found.tokens


# -- perplexity ----------------------------------------------------------------


def _windows(job: Job, path: Path) -> tuple[list[Window], dict[str, Any]]:
    """What perplexity is measured on, and its description for the report."""
    spec = job.spec
    if not spec.text:
        dataset = job.input("dataset")
        cut = windows.of_rows(dataset.path, limit=spec.chunks)
        what: dict[str, Any] = {"dataset": dataset.digest}
    else:
        text = Path(spec.text)
        found = "sha256:" + sha256_file(text)[1]
        if found != spec.sha256:
            raise DataLoss(
                f"{text.name} changed since the work was asked for: it has {found}, expected "
                f"{spec.sha256}; start again with what it holds now"
            )
        job.progress(phase="tokenizing", force=True)
        with Model(path, vocab_only=True) as model:
            ids = model.tokenize(_text(text))
            bos = model.bos if model.adds_bos else None
            if spec.context > model.n_ctx_train:
                job.log.warning(
                    "windows of %d tokens are longer than the %d that the model was made for; its "
                    "perplexity there says little",
                    spec.context,
                    model.n_ctx_train,
                )
        cut = windows.of_text(ids, spec.context, bos=bos, limit=spec.chunks)
        what = {"text": found, "context": spec.context}
    return cut, {**what, "windows": len(cut), "scored_tokens": sum(w.scored for w in cut)}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FailedPrecondition(
            f"{path.name} is no UTF-8 text: byte {error.object[error.start]:#04x} at offset "
            f"{error.start}; convert it (`iconv -t UTF-8`), or take another text"
        ) from error


def _over_windows(
    job: Job, files: Sequence[_File], reference: _File | None, cut: Sequence[Window]
) -> None:
    """Perplexity of every file, and KL to the reference where there is one.

    The reference's log-probabilities are kept in the job's scratch, for as many
    windows at a time as fit, so that each file runs once over each window and no
    two models are in memory together.
    """
    running = [*([reference] if reference else []), *files]
    total = len(running) * sum(len(window.tokens) for window in cut)
    scores = {file.artifact.digest: scoring.Score() for file in running}
    done = 0

    for group in _groups(cut, reference):
        kept: scoring.Logprobs | None = None
        for file in running:
            phase = f"perplexity of {file.measured.quant_type}"

            def tick(tokens: int, phase: str = phase) -> None:
                nonlocal done
                job.check_preempted()
                done += tokens
                job.progress(phase=phase, step=done, total=total, unit="tokens")

            started = time.monotonic()
            if file is reference:
                kept = _room(job.scratch / "reference.f32", group, file.path)
                found = scoring.score(file.path, group, keep=kept, tick=tick)
            else:
                found = scoring.score(file.path, group, against=kept, tick=tick)
            scores[file.artifact.digest] += found
            file.measured.seconds += time.monotonic() - started
    for file in running:
        found = scores[file.artifact.digest]
        file.measured.perplexity = found.perplexity
        file.measured.perplexity_error = found.perplexity_error
        file.measured.scored_tokens = found.tokens
        if found.compared:
            file.measured.reference_kl = found.kl_divergence
            file.measured.reference_kl_max = found.kl_max
            file.measured.reference_top1 = found.top1_agreement


def _groups(cut: Sequence[Window], reference: _File | None) -> Iterator[Sequence[Window]]:
    """Windows whose log-probabilities of the reference fit into `REFERENCE_BYTES`."""
    if reference is None:
        yield cut
        return
    with Model(reference.path, vocab_only=True) as model:
        most = max(1, REFERENCE_BYTES // (4 * model.n_vocab))
    group: list[Window] = []
    rows = 0
    for window in cut:
        if group and rows + window.scored > most:
            yield group
            group, rows = [], 0
        group.append(window)
        rows += window.scored
    yield group


def _room(path: Path, group: Sequence[Window], model_path: Path) -> scoring.Logprobs:
    with Model(model_path, vocab_only=True) as model:
        shape = (sum(window.scored for window in group), model.n_vocab)
    path.unlink(missing_ok=True)
    return np.memmap(path, dtype=np.float32, mode="w+", shape=shape)


# -- speed ---------------------------------------------------------------------


def _speeds(job: Job, files: Sequence[_File]) -> None:
    total = speed.ROUNDS * len(files)
    done = 0

    def tick() -> None:
        nonlocal done
        job.check_preempted()
        done += 1
        job.progress(phase="measuring speed", step=done, total=total, unit="rounds")

    for file, found in zip(files, speed.measure([f.path for f in files], tick), strict=True):
        file.measured.prompt_tokens_per_second = found.prompt
        file.measured.generation_tokens_per_second = found.generation
