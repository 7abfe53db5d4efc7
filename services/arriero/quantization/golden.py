"""What quantized files are compared with: golden logits that came along, or new ones.

Responsibility: find them, make them where nothing did, and see whether adapters are
merged into the model that they were trained on. Does not know quantizing.
"""

from __future__ import annotations

from functools import cached_property

from arriero.errors import FailedPrecondition, NotFound
from arriero.gates import Mode
from arriero.gates.golden import Golden
from arriero.operations.job import Job, Output
from arriero.quantization.limits import GATE as QUANT_KLD
from arriero.store import Artifact, Manifest, Store
from arriero.weights import LoraAdapter, MergedWeights

MERGE_LOGITS = "merge.logits"


def carried(
    store: Store, model: Manifest, adapters: list[Manifest], weights: list[float]
) -> Artifact | None:
    """The golden logits that came with what is quantized; None where none are of it.

    Those of one adapter are not of several, nor of one that is merged by half.
    """
    carriers = adapters or [model]
    if len(carriers) > 1 or any(weight != 1.0 for weight in weights[: len(adapters)]):
        return None
    if not carriers[0].golden:
        return None
    try:
        return store.get(carriers[0].golden)
    except NotFound:
        return None


class GoldenLogits:
    """Those of a job's model and adapters, made when they are asked for."""

    def __init__(self, job: Job) -> None:
        """Take the job; nothing is done yet."""
        self._job = job
        self._model = job.input("model")
        self._adapters = job.inputs.get("adapters", [])
        self._weights = list(job.spec.weights) or [1.0] * len(self._adapters)

    @cached_property
    def artifact(self) -> Artifact | None:
        """The report that was named, or came along; None where there is none."""
        named = self._job.optional_input("golden")
        if named is None and self._job.spec.golden:
            named = self._job.store.get(self._job.spec.golden)
        return named or carried(
            self._job.store,
            self._model.manifest,
            [adapter.manifest for adapter in self._adapters],
            self._weights,
        )

    @cached_property
    def values(self) -> Golden | None:
        """The logits; None where `quant.kld` is skipped and none came along."""
        if self.artifact is not None:
            return Golden.read(self.artifact.path)
        if self._job.gates.mode(QUANT_KLD) is Mode.SKIP:
            return None
        from arriero.weights import oracle

        self._job.check_preempted()
        self._job.progress(phase="golden logits", force=True)
        merged = MergedWeights.open(
            self._model.path, [adapter.path for adapter in self._adapters], self._weights
        )
        try:
            return oracle.golden_of(merged, oracle.probe_ids(self._model.path))
        except FailedPrecondition as error:
            self._job.log.warning("no golden logits: %s", error.message)
            return None

    @property
    def digest(self) -> str | None:
        """What outputs name as theirs."""
        if self.artifact is not None:
            return self.artifact.digest
        return None if self.values is None else "output:golden"

    def output(self) -> list[Output]:
        """The report that holds what was made here; empty where nothing was."""
        if self.artifact is not None or self.values is None:
            return []
        directory = self._job.output_dir("golden")
        self.values.write_report(
            directory,
            made_by="quantize",
            model=self._model.digest,
            adapters=[adapter.digest for adapter in self._adapters],
            weights=self._weights,
            base="full",
        )
        made_of = (self._model, *self._adapters)
        return [
            Output(
                name="golden",
                kind="report",
                path=directory,
                parents=tuple(artifact.digest for artifact in made_of),
                labels={"report": "golden"},
                gates=(),
            )
        ]

    def judge_bases(self) -> None:
        """Judge `merge.logits` of adapters that say they were trained on another model.

        By the golden logits that came with each; without those nothing is known.
        """
        foreign = [
            (adapter, report)
            for adapter in self._adapters
            if self._model.digest
            not in (LoraAdapter.open(adapter.path).settings.base, *adapter.manifest.parents)
            and (report := carried(self._job.store, adapter.manifest, [], [])) is not None
        ]
        if not foreign or not self._job.gates.wanted(MERGE_LOGITS):
            return
        from arriero.weights import oracle

        self._job.progress(phase="comparing bases", force=True)
        words = []
        with self._job.gates.timed():
            for adapter, report in foreign:
                alone = MergedWeights.open(self._model.path, [adapter.path], [1.0])
                if why := oracle.foreign_base(alone, Golden.read(report.path)):
                    words.append(f"adapter {adapter.manifest.name or adapter.digest}: {why}")
        self._job.gates.judge(
            MERGE_LOGITS,
            not words,
            figure=float(len(words)),
            threshold=0.0,
            unit="adapters",
            detail="; ".join(words),
        )
