"""What runs in the room's job processes: `quantize` and `evaluate`.

Responsibility: put the room's pieces in order and report progress. Does not
know gRPC, nor how outputs are published.
"""

from __future__ import annotations

import os
from pathlib import Path

from arriero.errors import FailedPrecondition, NotFound, ResourceExhausted
from arriero.gates.golden import Golden
from arriero.llama import (
    QuantType,
    insert_metadata,
    quantize,
    read_header,
    resolve_type,
    threads,
)
from arriero.operations.job import Job, Output, main
from arriero.prompts import Template
from arriero.quantization import converter
from arriero.quantization.checkpoint import read_checkpoint
from arriero.quantization.evaluate import run_evaluate
from arriero.quantization.proof import prove_tokens
from arriero.store import Artifact

TEMPLATE_KEY = "arriero.template"
SOURCE_KEY = "arriero.source"


def run_quantize(job: Job) -> list[Output]:
    """Convert once, then quantize to each type; one `gguf` output per type.

    What is complete lies among the checkpoints until everything is: an attempt
    after a kill goes on with the type that was being made.
    """
    model = job.input("model")
    name = model.manifest.name or "model"
    workers = threads(job.spec.threads)
    master = _converted(job, model, name, workers)
    golden = _golden(job, model)
    job.progress(phase="comparing tokens", force=True)
    prove_tokens(
        job.gates,
        model=model.path,
        gguf=master,
        golden=Golden.read(golden.path) if golden else None,
        log=job.log,
    )
    kinds = [resolve_type(text) for text in job.spec.types]
    made = [_quantized(job, master, kind, workers) for kind in kinds]
    outputs = []
    for kind, path in zip(kinds, made, strict=True):
        directory = job.output_dir(kind.name)
        header = read_header(path)
        path.rename(directory / f"{name}.{kind.name}.gguf")
        outputs.append(
            Output(
                name=kind.name,
                kind="gguf",
                path=directory,
                artifact_name=name,
                parents=(model.digest,),
                golden=golden.digest if golden else None,
                metrics={
                    "size_bytes": header.size,
                    "bits_per_weight": header.bits_per_weight,
                    "parameters": header.parameters,
                },
                labels={"quant_type": kind.name},
            )
        )
    master.unlink()
    return outputs


def _converted(job: Job, model: Artifact, name: str, workers: int) -> Path:
    """The model as one lossless GGUF file that knows its template and its source."""
    kept = job.checkpoints / "master.gguf"
    if kept.exists():
        return kept
    checkpoint = read_checkpoint(model.path)
    template = Template.read(model.path)

    def written(size: int) -> None:
        total = max(size, checkpoint.size)
        job.progress(phase="converting", step=size, total=total, unit="bytes")

    written(0)
    target = job.scratch / "master.gguf"
    log = job.scratch / "converter.log"
    view = converter.prepare_view(
        model.path, job.scratch / "view" / name, template.chat_template if template else None
    )
    try:
        converter.convert(
            converter.locate(),
            view,
            target,
            out_type=checkpoint.exact_type,
            name=name,
            log=log,
            threads=workers,
            on_progress=written,
            check=job.check_preempted,
        )
    except (FailedPrecondition, ResourceExhausted):
        _keep_log(job, log, whole=True)
        raise
    _keep_log(job, log, whole=False)
    metadata = {SOURCE_KEY: model.digest}
    if template is not None:
        metadata[TEMPLATE_KEY] = template.to_json()
    insert_metadata(target, metadata)
    return _keep(target, kept)


def _quantized(job: Job, master: Path, kind: QuantType, workers: int) -> Path:
    """One type's file."""
    kept = job.checkpoints / f"{kind.name}.gguf"
    if kept.exists():
        return kept
    job.check_preempted()

    def done(step: int, total: int) -> None:
        job.progress(phase=f"quantizing {kind.name}", step=step, total=total, unit="tensors")

    done(0, len(read_header(master).tensors))
    target = job.scratch / f"{kind.name}.gguf"
    header = quantize(master, target, kind, n_threads=workers, on_progress=done)
    megabytes = header.size / 1e6
    job.log.info("%s: %.1f MB, %.2f bits/weight", kind.name, megabytes, header.bits_per_weight)
    return _keep(target, kept)


def _keep(made: Path, kept: Path) -> Path:
    """Move a whole file among the checkpoints; a name there means complete bytes."""
    with made.open("rb") as file:
        os.fsync(file.fileno())
    made.rename(kept)
    return kept


def _golden(job: Job, model: Artifact) -> Artifact | None:
    """The golden report that travels with the files, if there is one."""
    named = job.optional_input("golden")
    if named is not None:
        return named
    if not model.manifest.golden:
        return None
    try:
        return job.store.get(model.manifest.golden)
    except NotFound:
        job.log.warning("the model's golden logits %s are gone", model.manifest.golden)
        return None


def _keep_log(job: Job, log: Path, *, whole: bool) -> None:
    """The converter's words, into the operation's log: all of them, or the warnings."""
    output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    for line in output.replace("\r", "\n").splitlines():
        if line.startswith("Writing:") or not line.strip():
            continue  # a progress bar
        if whole or line.startswith(("WARNING", "ERROR")):
            job.log.info("converter: %s", line.rstrip())


if __name__ == "__main__":
    main({"quantize": run_quantize, "evaluate": run_evaluate})
