"""Stage `export`: a model in another layout, or sent to a hub.

Responsibility: stream weights into Hugging Face's or Meta's files, and let the
hub have them with a card. Publishes nothing in the store; does not know the
service that started it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.errors import FailedPrecondition
from arriero.merging import card, files, hub, meta, sources, tokenizer_model
from arriero.merging.export_spec import converted, plan_meta, target_of
from arriero.merging.pth import PthWriter
from arriero.operations.job import Job, Output
from arriero.store import Artifact
from arriero.weights import TensorPlan, Weights, WeightsWriter
from arriero.weights.layout import TORCH_NAMES

if TYPE_CHECKING:
    import torch

__all__ = ["export"]

_WEIGHTS = (".safetensors", ".safetensors.index.json")


def export(job: Job) -> Sequence[Output]:
    """Output `model`, `adapter` or `gguf`: what was given."""
    spec, given = job.spec, job.input("model")
    kind = given.manifest.kind
    if kind != "model":
        output = Output(name=kind, kind=kind, path=given.path, existing=given.digest)
        place = given.path
    else:
        place = job.output_dir("model")
        write = _write_meta if spec.format == "meta" else _write_hugging_face
        output = write(job, given, place)
    if spec.target:
        revision = _push(job, given, place)
        job.log.info("pushed to %s at %s", spec.target, revision)
        if output.existing is None:
            output.labels = {**output.labels, "target": spec.target, "revision": revision}
    return [output]


def _output(given: Artifact, place: Path, plans: Sequence[TensorPlan], layout: str) -> Output:
    manifest = given.manifest
    labels = {key: value for key, value in manifest.labels.items() if key != "dtype"}
    return Output(
        name="model",
        kind="model",
        path=place,
        artifact_name=manifest.name,
        labels={**labels, "layout": layout},
        metrics={"size_bytes": float(sum(plan.nbytes for plan in plans))},
        licenses=manifest.licenses,
        golden=manifest.golden,
    )


def _write_hugging_face(job: Job, given: Artifact, place: Path) -> Output:
    spec = job.spec
    weights = Weights.open(given.path)
    plans = converted(weights, spec.dtype)
    beside = [entry.path for entry in given.manifest.files if not entry.path.endswith(_WEIGHTS)]
    for name in beside:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(given.file(name), place / name)
    if spec.dtype != "auto":
        _state_dtype(place / "config.json", spec.dtype)
    total, done = sum(plan.nbytes for plan in plans), 0
    with WeightsWriter(place, plans, max_shard_size=spec.max_shard_size) as writer:
        for plan in plans:
            if weights[plan.name].dtype == plan.dtype:
                writer.write_raw(plan.name, weights.raw(plan.name))
            else:
                writer.write_rows(plan.name, _cast(_rows(weights.tensor(plan.name)), plan))
            done += plan.nbytes
            job.check_preempted()
            job.progress(phase="writing", step=done, total=total, unit="bytes")
    output = _output(given, place, plans, "hf")
    output.digests = writer.digests
    output.metrics = {**output.metrics, "shards": float(len(writer.files))}
    if spec.dtype != "auto":
        output.golden = None  # of other weights
    return output


def _write_meta(job: Job, given: Artifact, place: Path) -> Output:
    plan = plan_meta(given, shards=job.spec.shards, dtype=job.spec.dtype)
    weights = Weights.open(given.path)
    for path in files.matching(
        sorted(given.path.iterdir()), (*files.LICENCES, files.TEMPLATE_FILE)
    ):
        shutil.copyfile(path, place / path.name)
    lacking = _write_tokenizer(given, place, plan.params["vocab_size"])
    (place / "params.json").write_text(json.dumps(plan.params) + "\n", encoding="utf-8")
    writers = [
        PthWriter(place / f"consolidated.{rank:02d}.pth", plans)
        for rank, plans in enumerate(plan.files)
    ]
    everything = [item for plans in plan.files for item in plans]
    total, done = sum(item.nbytes for item in everything), 0
    try:
        # Tensor by tensor for all ranks, so that each is read from the disk once.
        for i, (name, target) in enumerate(plan.places.items()):
            tensor = weights.tensor(plan.sources[name])
            for rank, writer in enumerate(writers):
                item = plan.files[rank][i]
                part = meta.split(tensor, target, rank, plan.shards, plan.head_dim)
                writer.write(item.name, _cast(part, item))
                done += item.nbytes
                job.check_preempted()
                job.progress(phase="writing", step=done, total=total, unit="bytes")
    except BaseException:
        for writer in writers:
            writer.abandon()
        raise
    for writer in writers:
        writer.close()
    output = _output(given, place, everything, "meta")
    output.metrics = {**output.metrics, "shards": float(plan.shards)}
    if lacking:
        job.log.warning("%s", lacking)
        output.labels = {**output.labels, "lacking": lacking}
    output.golden = None  # nothing here could compare with them
    return output


def _write_tokenizer(given: Artifact, place: Path, vocabulary: object) -> str:
    """`tokenizer.model`, which Meta's code reads; what is not right with it, or nothing."""
    model, fast = given.path / "tokenizer.model", given.path / "tokenizer.json"
    target = place / "tokenizer.model"
    if model.is_file():
        shutil.copyfile(model, target)
    else:
        try:
            if not fast.is_file():
                raise FailedPrecondition("the model has no tokenizer")
            tokenizer_model.write_ranks(fast, target)
        except FailedPrecondition as error:
            target.unlink(missing_ok=True)
            return f"no tokenizer.model is written: {error.message}"
    size = tokenizer_model.ids_of(target)
    if size in (None, vocabulary):
        return ""
    return (
        f"tokenizer.model has {size} ids, the embeddings {vocabulary} rows: Meta's code loads a "
        "model only with as many; it has no added tokens and no padding"
    )


def _rows(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    row = tensor[:1].nbytes if tensor.dim() else tensor.nbytes
    step = max(1, meta.BLOCK_BYTES // max(1, row))
    for start in range(0, tensor.shape[0], step):
        yield tensor[start : start + step]


def _cast(blocks: Iterator[torch.Tensor], plan: TensorPlan) -> Iterator[torch.Tensor]:
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[plan.dtype])
    for block in blocks:
        if block.dtype == dtype:
            yield block
            continue
        cast = block.to(dtype)
        if dtype == torch.float16 and not cast.isfinite().all() and block.isfinite().all():
            raise FailedPrecondition(
                f"{plan.name} holds {block.abs().max().item():.3g}, float16 ends at 65504; export "
                "as bfloat16 or float32"
            )
        yield cast


def _state_dtype(path: Path, dtype: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("torch_dtype", "dtype"):
        if key in config:
            config[key] = dtype
    files.write_json(path, config)


# --- to a hub -------------------------------------------------------------------------


def _push(job: Job, given: Artifact, place: Path) -> str:
    spec = job.spec
    target = target_of(spec.target)
    job.progress(phase="pushing", force=True)
    lineage = job.store.lineage(given.digest)
    base = card.base_of(lineage)
    # Beside the files: the card, and an adapter's configuration that names its base.
    aside = job.scratch / "push"
    aside.mkdir()
    gates = {manifest.digest: job.store.gates(manifest) for manifest in lineage}
    text = card.write(lineage, gates, repository=target.repository, layout=spec.format)
    (aside / "README.md").write_text(text, encoding="utf-8")
    sent = {
        path.relative_to(place).as_posix(): path
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }
    if given.manifest.kind == "adapter" and base is not None:
        config = json.loads(given.file("adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base
        (aside / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    sent |= {path.name: path for path in aside.iterdir()}
    return hub.upload(
        target.repository,
        target.revision,
        sent,
        secret=sources.secret_variable(spec.token_secret),
        private=spec.private,
        message=f"{given.manifest.kind} {given.manifest.name} {given.digest}",
    )
