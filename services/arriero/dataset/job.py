"""The dataset room's job: sources and a tokenizer in, prepared splits out.

Responsibility: tie the preparation to a job's spec, inputs and outputs. Does
not know how rows are encoded or judged.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arriero.dataset import arrow, packing, preparation, selection, sources
from arriero.dataset.encoding import MASKED, Encoder, template_of
from arriero.dataset.report import FORMAT, Tally
from arriero.dataset.spec import SKIP, check_digests
from arriero.dataset.transform.job import transform
from arriero.dataset.vocabulary import Vocabulary
from arriero.errors import FailedPrecondition, Preempted
from arriero.gates.golden import TOKENS, probe_sequences
from arriero.operations.handoff import to_json
from arriero.operations.job import Job, Output, main

DATASET_FILE = "dataset.json"
PROBE_FILE = "probe.json"
REPORT_FILE = "report.json"
_LEASE_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class _Work:
    """What the outputs are written from."""

    job: Job
    encoder: Encoder
    spool: arrow.Spool
    probe: list[list[int]]
    parents: Sequence[str]


def prepare(job: Job) -> list[Output]:
    """Prepare a dataset: outputs `train`, `val` if rows are held out, `report`."""
    # Sources in the store are no inputs of the stage: gc knows of them by this alone.
    stored = [text for text in job.spec.sources if not text.startswith("/")]
    if not stored:
        return _prepare(job)
    with job.store.lease("dataset", stored, ttl=_LEASE_SECONDS):
        return _prepare(job)


def _prepare(job: Job) -> list[Output]:
    spec = job.spec
    tokenizer = job.input("tokenizer")
    located = [
        sources.locate(text, store=job.store, allowed=None, field=f"sources[{i}]")
        for i, text in enumerate(spec.sources)
    ]
    check_digests(located, spec.sha256)
    skip = spec.on_bad_row == SKIP

    found = preparation.survey(located, _reporter(job))
    chosen = preparation.choose(
        found, seed=spec.seed, max_rows=spec.max_rows, val_set_size=spec.val_set_size
    )
    preparation.judge_schema(job.gates, found, skip=skip)

    job.progress(phase="loading tokenizer", force=True)
    vocabulary = Vocabulary.load(tokenizer.path)
    declared = template_of(spec.template, tokenizer.path)
    encoder = Encoder(
        template=declared.bind(bos_token=vocabulary.bos, eos_token=vocabulary.eos),
        vocabulary=vocabulary,
        cutoff_len=spec.cutoff_len,
        train_on_inputs=spec.train_on_inputs,
        add_eos_token=spec.add_eos_token,
    )
    with arrow.Spool(job.scratch / "tokens.bin") as spool:
        encoded = preparation.encode(
            located, chosen, encoder, spool, drop_masked=skip, report=_reporter(job)
        )
        with job.gates.timed():
            preparation.judge_labels(job.gates, encoded, encoder, skip=skip)
            preparation.judge_bos(job.gates, encoded, encoder, declared)

        kept = [encoded.places[number] for number in chosen if number in encoded.places]
        if not kept:
            raise FailedPrecondition(
                f"no row is left: all {encoded.masked.count} have prompts longer than cutoff_len "
                f"{spec.cutoff_len}; raise it"
            )
        held_out = selection.held_out(len(kept), spec.val_set_size)
        val, train = kept[:held_out], kept[held_out:]
        work = _Work(
            job=job,
            encoder=encoder,
            spool=spool,
            # Training rows follow where the held-out ones are too few.
            probe=_probe(spool, [*val, *train]),
            parents=[
                tokenizer.digest,
                *dict.fromkeys(source.artifact for source in located if source.artifact),
            ],
        )
        outputs = [_split(work, "train", train)]
        if val:
            outputs.append(_split(work, "val", val))
    report = {
        "format": FORMAT,
        "kind": "dataset",
        "rows": {
            "read": found.total,
            "usable": len(found.usable),
            "chosen": len(chosen),
            "train": len(train),
            "val": len(val),
        },
        "encoded": encoded.tally.to_json(),
        "bad_rows": found.bad.to_json(),
        "masked_rows": encoded.masked.to_json(),
        "rows_with_special_tokens": encoded.special.to_json(),
        "unused_fields": dict(found.unused),
        "sources": [
            {"source": source.text, "sha256": digest, "bytes": source.size}
            for source, digest in zip(located, spec.sha256, strict=False)
        ],
        "template": encoder.template.name,
        "tokenizer": tokenizer.digest,
        "spec": to_json(spec),
    }
    _log(job, encoded.tally, report)
    outputs.append(_report(work, report, encoded.tally))
    return outputs


def _reporter(job: Job) -> preparation.Report:
    def report(phase: str, done: int, total: int) -> None:
        if job.preempted.is_set():
            raise Preempted("preparing was interrupted; it starts again from the sources")
        job.progress(phase=phase, step=done, total=total, unit="rows")

    return report


def _probe(spool: arrow.Spool, rows: Sequence[int]) -> list[list[int]]:
    """The first rows that hold enough tokens, cut to the fixed tokens of golden logits."""
    candidates: list[list[int]] = []
    for row in rows:
        # Four times over: probe_sequences cuts long rows and passes over short ones.
        if sum(len(ids) for ids in candidates) >= 4 * TOKENS and len(candidates) >= TOKENS:
            break
        candidates.append(spool.ids(row))
    return probe_sequences(candidates)


def _split(work: _Work, name: str, rows: Sequence[int]) -> Output:
    job, encoder, spool = work.job, work.encoder, work.spool
    job.progress(phase="writing", total=len(rows), unit="rows")
    directory = job.output_dir(name)
    samples, counts = np.array(rows, dtype=np.int64), None
    if job.spec.packing:
        packed = packing.pack(spool.lengths[samples].astype(np.int64), encoder.cutoff_len)
        samples, counts = samples[packed.order], packed.counts
    written = arrow.write(directory / arrow.FILE_NAME, spool, samples, MASKED, counts=counts)
    encoder.template.write(directory)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "rows": written.rows,
        "samples": written.samples,
        "packing": counts is not None,
        "tokens": written.tokens,
        "trained_tokens": written.trained_tokens,
        "max_length": written.max_length,
        "cutoff_len": encoder.cutoff_len,
        "tokenizer": job.input("tokenizer").digest,
        "template": encoder.template.name,
        "bos_token_id": encoder.vocabulary.bos_id,
        "eos_token_id": encoder.vocabulary.eos_id,
        "pad_token_id": encoder.vocabulary.pad_id,
    }
    _write_json(directory / DATASET_FILE, facts)
    _write_json(directory / PROBE_FILE, {"sequences": work.probe})
    return Output(
        name=name,
        kind="dataset",
        path=directory,
        parents=work.parents,
        metrics={key: float(facts[key]) for key in ("rows", "samples", "tokens", "trained_tokens")},
        labels={"template": encoder.template.name, "split": name},
    )


def _report(work: _Work, report: dict[str, Any], tally: Tally) -> Output:
    directory = work.job.output_dir("report")
    _write_json(directory / REPORT_FILE, report)
    return Output(
        name="report",
        kind="report",
        path=directory,
        parents=work.parents,
        metrics={
            "rows": float(tally.rows),
            "tokens": float(tally.tokens),
            "trained_tokens": float(tally.trained_tokens),
            "truncated_share": tally.truncated_share,
            "bad_rows": float(report["bad_rows"]["count"]),
        },
        labels={"report": "dataset"},
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _log(job: Job, tally: Tally, report: dict[str, Any]) -> None:
    job.log.info(
        "%d rows, %d tokens, %d trained, longest %d, %.1f%% truncated at %d",
        tally.rows,
        tally.tokens,
        tally.trained_tokens,
        tally.longest,
        100 * tally.truncated_share,
        job.spec.cutoff_len,
    )
    if report["unused_fields"]:
        job.log.warning("fields that the format does not read: %s", report["unused_fields"])
    if tally.straddling:
        job.log.warning(
            "%d rows have a token that spans the end of the prompt: serving will tokenize "
            "these prompts differently",
            tally.straddling,
        )
    count = report["rows_with_special_tokens"]["count"]
    if count:
        job.log.warning("%d rows hold special tokens as text, which are read as such", count)


if __name__ == "__main__":
    main({"dataset": prepare, "transform": transform})
