"""The verdicts of `import` and `merge`.

Responsibility: have each gate's proof made, its cost counted, and its result judged.
Does not know how a merge is written, nor what follows from a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from arriero.errors import FailedPrecondition
from arriero.gates import golden as golden_logits
from arriero.gates.golden import Comparison, Golden
from arriero.merging import files
from arriero.merging.proof import MAX_ULP, prove_delta
from arriero.merging.vocabulary import vocabulary_problems
from arriero.operations.job import Job
from arriero.weights import MergedWeights
from arriero.weights.health import check_adapter
from arriero.weights.layout import DTYPES
from arriero.weights.merged import embeddings_of
from arriero.weights.tokenizers import compare_tokenizers

__all__ = [
    "judge_delta",
    "judge_health",
    "judge_logits",
    "judge_tokenizers",
    "judge_vocabulary",
    "ticker",
]

# Mean KL divergence in nats per token. Measured: 4e-5 to 5e-5 for equal weights (golden's
# own fp16 rounding; SmolLM2-135M and random models), 1e-4 to 2e-4 where golden logits of
# weights that were not rounded meet bfloat16 ones.
MAX_KL = 1e-3
# Where the merge shortens every weight of the base, large models lose more.
MAX_KL_SHORTER = 5e-3
# Share of merged numbers that differ from the base's, below which it is worth a word.
FEW = 1e-3


def ticker(job: Job, phase: str, unit: str) -> Callable[[int, int], None]:
    """Progress in `unit`, and the place where a job that must leave does so."""

    def tick(done: int, total: int) -> None:
        job.check_preempted()
        job.progress(phase=phase, step=done, total=total, unit=unit)

    return tick


def judge_health(job: Job, adapters: Sequence[Path]) -> None:
    """`adapter.health` of adapters that no training vouches for."""
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


def judge_tokenizers(job: Job, merged: MergedWeights, target: Path) -> None:
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
    proof.judge(job.gates)


def judge_vocabulary(job: Job, merged: MergedWeights, target: Path) -> None:
    """`merge.vocab` of a written merge."""
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


def judge_delta(job: Job, merged: MergedWeights, target: Path) -> None:
    """`merge.delta` of a written merge."""
    if not job.gates.wanted("merge.delta"):
        return
    with job.gates.timed():
        proof = prove_delta(merged, target, ticker(job, "proving", "bytes"))
    if proof.passed and proof.merged and proof.changed < FEW:
        job.log.warning(
            "the merged model is all but its base: %.2g%% of what the adapters touch differs, "
            "since their changes are smaller than the type of the merged weights can hold; "
            "dtype: float32 would keep them",
            100 * proof.changed,
        )
    job.gates.judge(
        "merge.delta",
        proof.passed,
        figure=proof.worst_ulp if math.isfinite(proof.worst_ulp) else None,
        threshold=MAX_ULP,
        unit="ulp",
        detail=proof.detail,
    )


def judge_logits(
    job: Job, merged: MergedWeights, target: Path, golden: Golden | None, foreign: str
) -> None:
    """`merge.logits` of a written merge.

    Args:
        job: whose gates judge.
        merged: what was written.
        target: where.
        golden: what it should compute; None where nothing says.
        foreign: which adapters belong to another base, in words; empty when none does.
    """
    if not job.gates.wanted("merge.logits") or golden is None:
        return
    from arriero.weights import oracle

    job.progress(phase="comparing logits", force=True)
    shorter = any(
        DTYPES[plan.dtype] < DTYPES[merged.base[merged.source(name)].dtype]
        for name, plan in merged.items()
    )
    threshold = MAX_KL_SHORTER if shorter else MAX_KL
    if foreign:
        job.gates.judge("merge.logits", False, threshold=threshold, detail=foreign)
        return
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
