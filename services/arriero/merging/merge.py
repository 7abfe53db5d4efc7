"""The stage `merge`: adapters folded into a model, and proven.

Responsibility: put fold and proofs in order, and name the outputs. Publishes nothing;
does not know how tensors are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from arriero.errors import NotFound
from arriero.gates import Mode
from arriero.gates.golden import Golden
from arriero.merging import files
from arriero.merging.fold import write_merged
from arriero.merging.judgements import (
    judge_delta,
    judge_health,
    judge_logits,
    judge_tokenizers,
    judge_vocabulary,
    ticker,
)
from arriero.merging.qlora import measure, packing_for
from arriero.merging.specs import made_for
from arriero.operations.job import Job, Output
from arriero.store import Artifact
from arriero.weights import MergedWeights
from arriero.weights.roundtrip import Packing

__all__ = ["merge"]


def merge(job: Job) -> Sequence[Output]:
    """Stage `merge`: outputs `model`, and `golden` where none came with the adapter."""
    spec = job.spec
    base, adapters = job.input("model"), job.inputs["adapters"]
    unproved = [a.path for a in adapters if not (_trained(a) or _waived(a))]
    if unproved:
        # Again, because the import may have been told to skip it.
        judge_health(job, unproved)
    elif any(_waived(adapter) for adapter in adapters):
        job.gates.skip("adapter.health", "waived for the adapter, see its gates")
    merged, closeness = _open(job)
    own = [
        _check_lineage(job, blend.adapter.settings.base, artifact, base)
        for blend, artifact in zip(merged.blends, adapters, strict=True)
    ]
    target = job.output_dir("model")
    digests = write_merged(
        merged,
        base.path,
        target,
        max_shard_size=spec.max_shard_size,
        tick=ticker(job, "merging", "bytes"),
    )
    judge_tokenizers(job, merged, target)
    _copy_template(adapters, base, target)
    judge_delta(job, merged, target)
    judge_vocabulary(job, merged, target)
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
    foreign = _foreign(job, merged, own)
    golden, outputs = _golden(job, merged, output)
    judge_logits(job, merged, target, golden, foreign)
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
    from arriero.weights import oracle

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


def _golden(job: Job, merged: MergedWeights, model: Output) -> tuple[Golden | None, list[Output]]:
    """The golden logits to judge by, and the outputs with them named."""
    adapters: list[Artifact] = job.inputs["adapters"]
    report = job.optional_input("golden") or _carried(job, merged)
    if report is not None:
        model.golden = report.digest
        return Golden.read(report.path), [model]
    if job.gates.mode("merge.logits") is Mode.SKIP:
        job.log.info("no golden logits came with the adapter, and merge.logits is skipped")
        return None, [model]
    job.progress(phase="golden logits", force=True)
    golden = _make_golden(job, merged)
    target = job.output_dir("golden")
    golden.write_report(
        target,
        made_by="merge",
        model=job.input("model").digest,
        adapters=[adapter.digest for adapter in adapters],
        weights=list(job.spec.weights),
        base=_base_word(merged),
    )
    model.golden = "output:golden"
    output = Output(
        name="golden", kind="report", path=target, labels={"report": "golden"}, gates=()
    )
    return golden, [model, output]


def _carried(job: Job, merged: MergedWeights) -> Artifact | None:
    """The golden logits that came with the adapter, where they are of this very merge.

    Also where the base is not the one that it was trained on: then they tell.
    """
    adapters: list[Artifact] = job.inputs["adapters"]
    # Golden logits that a training made are of the base as it is stored.
    plain = len(adapters) == 1 and job.spec.weights[0] == 1.0 and not merged.base.altered
    digest = adapters[0].manifest.golden if plain else None
    if digest is None:
        return None
    try:
        return job.store.get(digest)
    except NotFound:
        job.log.warning("the golden logits %s that came with the adapter are gone", digest)
        return None


def _foreign(job: Job, merged: MergedWeights, own: Sequence[bool]) -> str:
    """Which adapters were trained on another model than this base; empty when none was.

    Only by golden logits that came with them, where the merge is not compared with
    those anyway.
    """
    if job.optional_input("golden") or job.gates.mode("merge.logits") is Mode.SKIP:
        return ""
    if _carried(job, merged) is not None:
        return ""
    from arriero.weights import oracle

    words = []
    base = job.input("model").path
    for artifact, same in zip(job.inputs["adapters"], own, strict=True):
        if same or artifact.manifest.golden is None:
            continue
        with suppress(NotFound), job.gates.timed():
            golden = Golden.read(job.store.get(artifact.manifest.golden).path)
            alone = MergedWeights.open(base, [artifact.path], [1.0])
            if why := oracle.foreign_base(alone, golden):
                words.append(f"adapter {artifact.manifest.name or artifact.digest}: {why}")
    return "; ".join(words)


def _make_golden(job: Job, merged: MergedWeights) -> Golden:
    from arriero.weights import oracle

    with job.gates.timed():
        return oracle.golden_of(merged, oracle.probe_ids(job.input("model").path))
