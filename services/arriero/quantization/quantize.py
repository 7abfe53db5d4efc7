"""The stage `quantize`: which way the files are made, and what is handed on.

Responsibility: put the room's pieces in order and report progress. Does not know
how tensors are computed, nor how outputs are published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from arriero.cores import threads
from arriero.errors import FailedPrecondition, ResourceExhausted
from arriero.gates.golden import compare
from arriero.llama import (
    Header,
    Importance,
    QuantType,
    Recipe,
    TypePlan,
    insert_metadata,
    plan_types,
    read_header,
    resolve_type,
    write_header,
)
from arriero.llama.activations import WINDOW, collect
from arriero.operations.job import Job, Output
from arriero.prompts import Template
from arriero.quantization import adapter_file, bnb, converter, imatrix, limits, onepass, reference
from arriero.quantization.checkpoint import Checkpoint
from arriero.quantization.converter import Conversion, Outline
from arriero.quantization.evaluation import Measurement
from arriero.quantization.golden import GoldenLogits
from arriero.quantization.proof import prove_tokens
from arriero.quantization.rows import sequences
from arriero.quantization.template_proof import prove_rope, prove_template, trained_rows
from arriero.store import Artifact
from arriero.weights import LoraAdapter, MergedWeights, Weights
from arriero.weights.merged import embeddings_of
from arriero.weights.sink import Written
from arriero.weights.tokenizers import TokenizerProof, compare_tokenizers

TEMPLATE_KEY = "arriero.template"
SOURCE_KEY = "arriero.source"
ADAPTERS_KEY = "arriero.adapters"
IMATRIX_KEY = "arriero.imatrix"
ONEPASS, REFERENCE = "onepass", "reference"
# One of them is in every tokenizer that llama.cpp's converter knows.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "qwen.tiktoken")
_SHOWN = 4


def run_quantize(job: Job) -> list[Output]:
    """Make every file at once, tensor by tensor; one `gguf` output per type.

    Where the one pass cannot (or `method` says so), the model is merged,
    converted and quantized one after the other.
    """
    if job.spec.adapter_only:
        return _adapter_alone(job)
    golden = GoldenLogits(job)
    wide = [_checkpoint(job, text, golden) for text in job.spec.types if text in bnb.TYPES]
    made = {output.name: output for output in [*wide, *_files(job, golden)]}
    # In the order asked for; an importance matrix and golden logits come last.
    ordered = [made.pop(text) for text in job.spec.types]
    return [*ordered, *made.values(), *golden.output()]


def _files(job: Job, golden: GoldenLogits) -> list[Output]:
    """The GGUF files."""
    kinds = [resolve_type(text) for text in job.spec.types if text not in bnb.TYPES]
    if not kinds:
        return []
    judged = len(job.gates.results)
    work = _Work(job)
    method = work.method
    _check_overrides(work)
    importance, matrix = work.importance()
    recipe = replace(work.recipe, importance=importance)
    plans = [plan_types(work.outline.path, kind, recipe) for kind in kinds]
    for kind, plan in zip(kinds, plans, strict=True):
        _check_plan(job, kind, plan, importance)
    job.progress(phase="comparing tokens", force=True)
    if work.tokenizers is not None:
        work.tokenizers.judge(job.gates)
    prove_tokens(
        job.gates,
        model=work.view,
        gguf=work.outline.path,
        golden=golden.values if golden.artifact else None,
        log=job.log,
    )
    prove_template(
        job.gates,
        gguf=work.outline.path,
        recorded=work.template,
        rows=trained_rows(job.store, golden.artifact),
        log=job.log,
    )
    prove_rope(job.gates, config=work.view / "config.json", gguf=work.outline.path)
    golden.judge_bases()
    digest = golden.digest
    paths = [job.output_dir(k.name) / f"{work.name}.{k.name}.gguf" for k in kinds]
    digests: Mapping[str, Written] = {}
    if method == ONEPASS:
        digests = _in_one_pass(work, kinds, plans, recipe, paths)
    else:
        reference.run(
            job,
            work.conversion,
            work.merged,
            kinds,
            recipe,
            paths,
            n_threads=work.workers,
        )
    outputs = []
    for kind, plan, path in zip(kinds, plans, paths, strict=True):
        header = read_header(path)
        job.log.info(
            "%s: %.1f MB, %.2f bits/weight", kind.name, header.size / 1e6, header.bits_per_weight
        )
        outputs.append(
            Output(
                name=kind.name,
                kind="gguf",
                path=path.parent,
                artifact_name=work.name,
                parents=work.parents,
                golden=digest,
                gates=job.gates.results[judged:],
                metrics={
                    "size_bytes": header.size,
                    "bits_per_weight": header.bits_per_weight,
                    "parameters": header.parameters,
                    "fallback_tensors": len(plan.fallbacks),
                },
                labels={"quant_type": kind.name, "method": method},
                digests=digests,
            )
        )
    return [*outputs, *([matrix] if matrix else [])]


def _adapter_alone(job: Job) -> list[Output]:
    """The adapter as GGUF files, one per type."""
    base, source = job.input("model"), job.input("adapters")
    name = source.manifest.name or "adapter"
    adapter = LoraAdapter.open(source.path)
    outputs = []
    for step, kind in enumerate(job.spec.types):
        job.progress(
            phase=f"converting to {kind}", step=step, total=len(job.spec.types), unit="files"
        )
        path = job.output_dir(kind) / f"{name}.{kind}.gguf"
        adapter_file.convert(
            adapter,
            base.path,
            path,
            kind,
            name=name,
            scratch=job.scratch,
            log=job.log,
            check=job.check_preempted,
        )
        metadata = {SOURCE_KEY: base.digest, ADAPTERS_KEY: source.digest}
        if template := Template.read(source.path):
            metadata[TEMPLATE_KEY] = template.to_json()
        insert_metadata(path, metadata)
        outputs.append(
            Output(
                name=kind,
                kind="adapter",
                path=path.parent,
                artifact_name=name,
                golden=job.spec.golden or None,
                metrics={"size_bytes": path.stat().st_size, "tensors": 2 * len(adapter.pairs)},
                labels={"quant_type": kind, "format": "gguf"},
            )
        )
    return outputs


def _checkpoint(job: Job, kind: str, golden: GoldenLogits) -> Output:
    """A checkpoint of bitsandbytes, judged by the golden logits."""
    model, judged = job.input("model"), len(job.gates.results)
    job.check_preempted()
    job.progress(phase=f"quantizing {kind}", force=True)
    directory = job.output_dir(kind)
    bnb.write(model.path, directory, kind)
    size = sum(path.stat().st_size for path in directory.iterdir())
    measured = Measurement(model.manifest.name, "", kind, size, 0.0)
    metrics = {"size_bytes": float(size)}
    if golden.values is not None:
        job.progress(phase=f"measuring {kind}", force=True)
        with job.gates.timed():
            found = compare(golden.values, bnb.golden_logits(directory, golden.values))
        measured.kl_divergence = found.kl_divergence
        metrics |= {"kl_divergence": found.kl_divergence, "top1_agreement": found.top1_agreement}
        job.log.info("%s: KL %.5f nats per token", kind, found.kl_divergence)
    limits.judge(job.gates, [measured])
    return Output(
        name=kind,
        kind="model",
        path=directory,
        artifact_name=model.manifest.name or "model",
        parents=(model.digest,),
        golden=golden.digest,
        gates=job.gates.results[judged:],
        metrics=metrics,
        labels={"quant_type": kind},
    )


class _Work:
    """What a job was asked for, opened."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = job.input("model")
        self.adapters = job.inputs.get("adapters", [])
        self.name = (self.adapters or [self.model])[-1].manifest.name or "model"
        self.workers = threads(job.spec.threads)
        base = Weights.open(self.model.path)
        self.source: onepass.Source = onepass.Stored(base)
        self.merged: MergedWeights | None = None
        if self.adapters:
            self.merged = self._open_merged()
            self.source = onepass.Merged(self._open_merged)
        self.checkpoint = Checkpoint.of((self.merged or base).values())
        self.recipe = Recipe(
            # A proto map has no order, and the first match wins.
            tensor_types=dict(sorted(job.spec.tensor_types.items(), key=_longest_first)),
            output_tensor_type=job.spec.output_tensor_type,
            token_embedding_type=job.spec.token_embedding_type,
        )

    def _open_merged(self) -> MergedWeights:
        weights = list(self.job.spec.weights) or [1.0] * len(self.adapters)
        return MergedWeights.open(
            self.model.path, [adapter.path for adapter in self.adapters], weights
        )

    @cached_property
    def tokenizers(self) -> TokenizerProof | None:
        """The adapters' tokenizers and the model's, compared; None without adapters."""
        name = embeddings_of(self.merged.base) if self.merged else None
        if self.merged is None or name is None:
            return None
        paths = [adapter.path for adapter in self.adapters]
        with self.job.gates.timed():
            return compare_tokenizers(self.model.path, paths, self.merged[name].shape[0])

    @cached_property
    def view(self) -> Path:
        """A directory that looks like the merged model."""
        template = self.template
        extended = self.tokenizers.extended if self.tokenizers else None
        view = converter.prepare_view(
            self.model.path,
            self.job.scratch / "view" / self.name,
            template.chat_template if template else None,
            merged=self.merged,
            tokenizer=None if extended is None else self.adapters[extended].path,
        )
        if not any((view / name).is_file() for name in _VOCABULARIES):
            raise FailedPrecondition(
                f"the model holds no tokenizer (none of {', '.join(_VOCABULARIES)}), and a GGUF "
                "file needs it; import the model again with its tokenizer's files",
                reason="NO_TOKENIZER",
            )
        return view

    @cached_property
    def template(self) -> Template | None:
        """What the rows were rendered with: the last adapter's, else the model's."""
        found = [Template.read(artifact.path) for artifact in (*self.adapters[::-1], self.model)]
        return next((template for template in found if template is not None), None)

    @cached_property
    def conversion(self) -> Conversion:
        """What the converter is asked for."""
        metadata = {SOURCE_KEY: self.model.digest}
        if self.adapters:
            metadata[ADAPTERS_KEY] = ",".join(adapter.digest for adapter in self.adapters)
        if given := self.job.optional_input("imatrix"):
            metadata[IMATRIX_KEY] = given.digest
        if self.template is not None:
            metadata[TEMPLATE_KEY] = self.template.to_json()
        return Conversion(self.view, self.checkpoint.exact_type, self.name, metadata)

    @cached_property
    def outline(self) -> Outline:
        """The file between model and outputs, without its tensors."""
        self.job.progress(phase="reading metadata", force=True)
        log = self.job.scratch / "converter.log"
        try:
            made = converter.outline(
                self.conversion,
                self.job.scratch / "outline.gguf",
                log=log,
                check=self._prepare,
            )
        except (FailedPrecondition, ResourceExhausted):
            converter.tell(log, self.job.log, whole=True)
            raise
        converter.tell(log, self.job.log, whole=False)
        return made

    def _prepare(self) -> None:
        """While the converter reads: what the pass needs, which is there after the first time."""
        self.job.check_preempted()
        import torch  # noqa: F401

    @cached_property
    def method(self) -> str:
        """`onepass` or `reference`.

        Raises:
            FailedPrecondition: the one pass was asked for by name, and cannot.
            DiskFull: it cannot, and there is no room for the other way.
        """
        asked = self.job.spec.method
        if asked == REFERENCE:
            return REFERENCE
        why = onepass.obstacle(self.outline, self.source)
        if not why:
            return ONEPASS
        if asked == ONEPASS:
            raise FailedPrecondition(
                f"this model cannot be quantized in one pass: {why}; choose method auto",
                reason="NO_ONE_PASS",
            )
        self.job.log.warning(
            "not in one pass, since %s: merging, converting and quantizing one after the other", why
        )
        between = read_header(self.outline.path).size
        self.job.store.preflight(between * (2 if self.adapters else 1))
        return REFERENCE

    def importance(self) -> tuple[Importance | None, Output | None]:
        """The importance matrix, and the report that holds one that was computed here."""
        given = self.job.optional_input("imatrix")
        if given is None:
            return None, None
        header = read_header(self.outline.path)
        if given.manifest.kind == "report":
            importance = imatrix.read(given.path)
            imatrix.check(importance, header)
            return importance, None
        return self._computed(given, header)

    def _computed(self, rows: Artifact, header: Header) -> tuple[Importance, Output]:
        limit = self.job.spec.imatrix_tokens
        path = self.job.scratch / "exact.gguf"
        self.job.store.preflight(header.size)
        kind = resolve_type(self.conversion.out_type)
        if self.method == ONEPASS:
            plan = plan_types(self.outline.path, kind)
            _in_one_pass(self, [kind], [plan], Recipe(), [path], scratch=True)
        else:
            reference.convert(self.job, self.conversion, self.merged, path, self.workers)

        def evaluated(tokens: int) -> None:
            self.job.check_preempted()
            self.job.progress(phase="computing importance", step=tokens, total=limit, unit="tokens")

        evaluated(0)
        found = collect(
            path,
            sequences(rows.path, limit),
            n_threads=self.job.spec.threads,
            on_progress=evaluated,
        )
        path.unlink()
        name = rows.manifest.name or rows.digest
        importance = imatrix.importance_of(found, name)
        imatrix.check(importance, header)
        directory = self.job.output_dir("imatrix")
        imatrix.write(directory / imatrix.FILE_NAME, found, dataset=name, window=WINDOW)
        return importance, Output(
            name="imatrix",
            kind="report",
            path=directory,
            artifact_name=self.name,
            parents=(*self.parents[:-1], rows.digest),
            metrics={"sequences": found.sequences},
            labels={"report": "imatrix"},
            gates=(),
        )

    @property
    def parents(self) -> tuple[str, ...]:
        """What the files are made of."""
        given = self.job.optional_input("imatrix")
        made_of = (self.model, *self.adapters, *([given] if given else []))
        return tuple(artifact.digest for artifact in made_of)


def _longest_first(override: tuple[str, str]) -> tuple[int, str]:
    return -len(override[0]), override[0]


def _check_overrides(work: _Work) -> None:
    """Refuse overrides that would change nothing.

    Raises:
        FailedPrecondition: patterns that are found in no tensor's name.
    """
    names = [tensor.name for tensor in read_header(work.outline.path).tensors]
    idle = [
        pattern
        for pattern in work.recipe.tensor_types
        if not any(re.search(pattern, name) for name in names)
    ]
    if idle:
        raise FailedPrecondition(
            f"tensor_types: {', '.join(map(repr, idle))} is found in none of the file's "
            f"{len(names)} tensors, which have names such as {', '.join(names[:_SHOWN])}; mend the "
            "pattern or leave it out",
            reason="OVERRIDE_MATCHES_NOTHING",
        )


def _check_plan(job: Job, kind: QuantType, plan: TypePlan, importance: Importance | None) -> None:
    """Tell of fallbacks; refuse types that would need what is not there.

    Raises:
        FailedPrecondition: tensors without an entry in the importance matrix, by name.
    """
    if plan.fallbacks:
        chosen = sorted({plan.types[name] for name in plan.fallbacks})
        job.log.warning(
            "%s: the rows of %d of %d tensors do not fill its blocks; they become %s, such as %s",
            kind.name, len(plan.fallbacks), len(plan.types), ", ".join(chosen),
            ", ".join(plan.fallbacks[:_SHOWN]),
        )  # fmt: skip
    lacking = imatrix.uncovered(plan.types, importance)
    if lacking:
        raise FailedPrecondition(
            f"{kind.name}: {len(lacking)} tensors get a type that needs an importance matrix, and "
            f"there is none for them, such as {', '.join(lacking[:_SHOWN])}; choose another type "
            "for them in tensor_types, output_tensor_type or token_embedding_type, or give a "
            "matrix that holds them",
            reason="IMATRIX_MISSING",
        )


def _in_one_pass(
    work: _Work,
    kinds: Sequence[QuantType],
    plans: Sequence[TypePlan],
    recipe: Recipe,
    paths: Sequence[Path],
    *,
    scratch: bool = False,
) -> dict[str, Written]:
    job = work.job
    importance = recipe.importance
    metadata = importance.metadata() if importance else {}
    targets = [
        onepass.Target(
            path,
            write_header(
                work.outline.path, path, file_type=kind.ftype, types=plan.types, metadata=metadata
            ),
            scratch,
        )
        for kind, plan, path in zip(kinds, plans, paths, strict=True)
    ]
    # Exact by now; the files are still sparse.
    job.store.preflight(sum(target.header.size for target in targets))
    names = ", ".join(kind.name for kind in kinds)
    return onepass.fill(
        work.outline,
        read_header(work.outline.path),
        work.source,
        targets,
        importance=importance.values if importance else {},
        n_threads=work.workers,
        tick=lambda done, total: job.progress(
            phase=f"quantizing {names}", step=done, total=total, unit="weights"
        ),
        check=job.check_preempted,
    )
