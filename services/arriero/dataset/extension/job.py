"""The job of stage `extend_tokenizer`: a model in, the same model with more tokens out.

Responsibility: the order of the work and its report. Does not know how pieces,
files or rows are made.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from arriero.dataset import sources
from arriero.dataset.extension import embeddings, fast, pieces, proof
from arriero.dataset.extension.corpus import LONGEST_LINE, Corpus
from arriero.dataset.extension.spec import MEAN, located, model_config
from arriero.dataset.extension.tokenizer import Additions, BaseTokenizer, source_pieces
from arriero.dataset.spec import check_digests
from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.operations.handoff import to_json
from arriero.operations.job import Job, Output
from arriero.weights.reader import INDEX_SUFFIX, Weights

__all__ = ["extend_tokenizer"]

FORMAT = 1
REPORT_FILE = "report.json"
_LEASE_SECONDS = 24 * 3600.0
# Written anew, or not part of a safetensors model.
_REPLACED = (".safetensors", INDEX_SUFFIX, ".bin", ".pth", ".pt", ".gguf")
_NAMED = 200


def extend_tokenizer(job: Job) -> list[Output]:
    """Extend a model's vocabulary: outputs `model` and `report`.

    Raises:
        FailedPrecondition: the corpus is too small for `vocab_size`, or nothing is new.
    """
    stored = [text for text in job.spec.corpus if sources.is_stored(text)]
    if not stored:
        return _extend(job)
    with job.store.lease("dataset", stored, ttl=_LEASE_SECONDS):
        return _extend(job)


def _extend(job: Job) -> list[Output]:
    spec, model = job.spec, job.input("model")
    found = sources.fetch(
        located(spec, job.store, None), job.scratch / "sources", token=None, field="corpus"
    )
    check_digests(found, spec.sha256)
    corpus = Corpus(found, spec.held_out, spec.max_corpus_bytes, spec.seed)

    job.progress(phase="loading tokenizer", force=True)
    base = BaseTokenizer(model.path, job.scratch)
    made = _additions(job, base, corpus)
    job.log.info("%d tokens and %d pieces for %d", len(made.tokens), len(made.pieces), base.next_id)

    target, report = job.output_dir("model"), job.output_dir("report")
    for path in sorted(model.path.iterdir()):
        if path.is_file() and not path.name.endswith(_REPLACED):
            shutil.copyfile(path, target / path.name)
    base.write(target, made)
    rows = _weights(job, base, made, target)

    job.progress(phase="proving", force=True)
    lines = corpus.held_out_lines()
    kept_apart = bool(lines)
    if not lines:
        lines = [line for line, _ in zip(corpus.lines(), range(1000), strict=False)]
    compression = proof.measure(base, target, lines)
    proof.judge(job.gates, base, target, made, lines, rows=rows)
    facts = {
        "format": FORMAT,
        "kind": "extend_tokenizer",
        "tokens": {
            "before": base.next_id,
            "after": base.next_id + len(made),
            "rows": rows,
            "added": list(made.tokens)[:_NAMED],
            "pieces": _named(base, target, made),
        },
        # Of a corpus too small to keep lines apart it says how well it was learnt, no more.
        "compression": {**compression.to_json(), "held_out": kept_apart} if lines else None,
        "spec": to_json(spec),
    }
    (report / REPORT_FILE).write_text(
        json.dumps(facts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    metrics = {
        "tokens": float(base.next_id + len(made)),
        "new_tokens": float(len(made)),
        "rows": float(rows),
    }
    if compression.lines:
        metrics["compression_gain"] = compression.gain
        job.log.info(
            "%d tokens of %s text instead of %d",
            compression.after,
            "held-out" if kept_apart else "the corpus'",
            compression.before,
        )
    parents = [artifact.digest for artifacts in job.inputs.values() for artifact in artifacts]
    parents += [source.artifact for source in found if source.artifact]
    parents = list(dict.fromkeys(parents))
    return [
        Output("model", "model", target, parents=parents, metrics=metrics),
        Output(
            "report",
            "report",
            report,
            parents=parents,
            metrics=metrics,
            labels={"report": "extend_tokenizer"},
        ),
    ]


def _named(base: BaseTokenizer, target: Path, made: Additions) -> list[str]:
    from tokenizers import Tokenizer

    new = Tokenizer.from_file(str(target / fast.FILE))
    return proof.readable(base, new, list(made.pieces.values())[:_NAMED])


def _additions(job: Job, base: BaseTokenizer, corpus: Corpus) -> Additions:
    spec = job.spec
    source = job.optional_input("pieces_from")
    if source is not None:
        candidates = source_pieces(source.path)
    elif spec.corpus and spec.vocab_size:
        candidates = _learn(job, base, corpus)
    else:
        candidates = []
    job.progress(phase="adding pieces", force=True)
    made = base.add(spec.tokens, candidates, spec.vocab_size)
    if not made:
        raise FailedPrecondition(
            f"nothing is new: the tokenizer has all of it among its {base.next_id} tokens"
        )
    total = base.next_id + len(made)
    if spec.vocab_size and total < spec.vocab_size:
        raise FailedPrecondition(
            f"only {len(made)} new tokens were found, {total} in all; expected {spec.vocab_size}: "
            f"give more text, or set vocab_size to {total} or less"
        )
    if spec.vocab_size and total > spec.vocab_size:
        raise InvalidArgument.field(
            "vocab_size",
            f"{spec.vocab_size} leaves no room for {len(made.tokens)} tokens beside the "
            f"{base.next_id} that are there; expected at least {total}",
        )
    return made


def _learn(job: Job, base: BaseTokenizer, corpus: Corpus) -> list[str]:
    """Candidates from the corpus: as many as suffice even if all old pieces are among them."""
    spec = job.spec
    job.progress(phase="reading corpus", force=True)
    size = corpus.size()
    lines = corpus.training(size)
    job.progress(phase="learning pieces", force=True)
    job.log.info("learning from %d bytes of text", min(size, spec.max_corpus_bytes or size))
    if base.sentencepiece is None:
        return base.fast.learn(lines, spec.vocab_size)
    return pieces.learn(
        base.sentencepiece,
        lines,
        vocab_size=spec.vocab_size,
        model_type=spec.model_type,
        character_coverage=spec.character_coverage,
        longest=LONGEST_LINE,
    )


def _weights(job: Job, base: BaseTokenizer, made: Additions, target: Path) -> int:
    """Write weights and config with a row for each token; the number of rows."""
    config = model_config(target)
    weights = Weights.open(base.directory)
    names = embeddings.check(weights, tied=bool(config.get("tie_word_embeddings", False)))
    multiple = job.spec.pad_to_multiple_of
    needed = max(base.next_id + len(made), *(weights[name].shape[0] for name in names))
    rows: int = -(-needed // multiple) * multiple
    origins: dict[int, list[int]] = made.origins
    if job.spec.embedding_init != MEAN:
        origins = {number: [] for number in origins}

    def report(done: int, total: int) -> None:
        job.check_preempted()
        job.progress(phase="writing", step=done, total=total, unit="bytes")

    embeddings.resize(
        weights,
        target,
        names,
        rows=rows,
        origins=origins,
        tokens=base.next_id,
        scratch=job.scratch,
        report=report,
    )
    config["vocab_size"] = rows
    _write_json(target / "config.json", config)
    return rows


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
