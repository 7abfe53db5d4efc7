"""The dataset room's job: sources and a tokenizer in, prepared splits out.

Responsibility: tie the preparation to a job's spec, inputs and outputs. Does
not know how rows are encoded or judged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arriero.cores import threads
from arriero.dataset import arrow, packing, preparation, proofs, selection, sources
from arriero.dataset.batches import NONE, Batches, Settings
from arriero.dataset.crew import Crew
from arriero.dataset.dedup import Duplicates
from arriero.dataset.encoding import FAIL, MASKED, own_template, template_of
from arriero.dataset.extension.job import extend_tokenizer
from arriero.dataset.formats import TEXT, RowFormat
from arriero.dataset.report import FORMAT
from arriero.dataset.spec import SKIP, check_digests, check_template_digest, hub_token
from arriero.dataset.transform.job import transform
from arriero.dataset.vocabulary import TOKENIZER_FILE, Vocabulary
from arriero.errors import FailedPrecondition, Preempted
from arriero.gates.golden import TOKENS, probe_sequences
from arriero.operations.handoff import to_json
from arriero.operations.job import Job, Output, main
from arriero.prompts import Template

DATASET_FILE = "dataset.json"
PROBE_FILE = "probe.json"
REPORT_FILE = "report.json"
_LEASE_SECONDS = 24 * 3600.0
# Bytes of sources that are worth a further process: it takes half a second to start.
_BYTES_A_PROCESS = 1 << 20


@dataclass(frozen=True)
class _Work:
    """What the outputs are written from.

    `template` travels with the rows; plain text takes the tokenizer's own, if any.
    """

    job: Job
    vocabulary: Vocabulary
    template: Template | None
    formats: Sequence[str]
    spool: arrow.Spool
    probe: list[list[int]]
    parents: Sequence[str]


def prepare(job: Job) -> list[Output]:
    """Prepare a dataset: outputs `train`, `val` if rows are held out, `report`."""
    # Sources in the store are no inputs of the stage: gc knows of them by this alone.
    stored = [text for text in job.spec.sources if sources.is_stored(text)]
    if not stored:
        return _prepare(job)
    with job.store.lease("dataset", stored, ttl=_LEASE_SECONDS):
        return _prepare(job)


def _prepare(job: Job) -> list[Output]:
    spec = job.spec
    tokenizer = job.input("tokenizer")
    located = sources.fetch(
        sources.locate_all(spec.sources, job.inputs.get("rows", ()), job.store, None),
        job.scratch / "sources",
        token=hub_token(spec),
        report=_fetching(job),
    )
    digests = check_digests(located[: len(spec.sources)], spec.sha256)
    forms = preparation.formats_of(located, spec.format, dict(spec.columns))
    skip = spec.on_bad_row == SKIP
    report = _reporter(job)

    job.progress(phase="loading tokenizer", force=True)
    vocabulary = Vocabulary.load(tokenizer.path)
    declared = None
    if not _all_text(forms):
        if spec.template_sha256:
            check_template_digest(spec.template, spec.template_sha256)
        declared = template_of(spec.template, tokenizer.path)
    batches = Batches(
        Settings(
            tokenizer=str(_tokenizer_files(job, vocabulary)),
            template=_bound(declared, vocabulary).to_json() if declared else "",
            cutoff_len=spec.cutoff_len,
            train_on_inputs=spec.train_on_inputs,
            add_eos_token=spec.add_eos_token,
            over_length=spec.over_length,
            drop_masked=skip,
        ),
        vocabulary,
    )
    encoder = batches.encoder(TEXT if declared is None else "")
    with (
        arrow.Spool(job.scratch / "tokens.bin") as spool,
        Crew(batches, _processes(spec.num_proc, located)) as crew,
    ):
        found = _survey(job, located, forms, crew, report)
        chosen = preparation.choose(
            found,
            seed=spec.seed,
            max_rows=spec.max_rows,
            val_set_size=spec.val_set_size,
            weights=spec.source_weights,
        )
        encoded = preparation.encode(located, forms, found, chosen, crew, spool, report=report)
        _refuse_long(spec, encoded)
        with job.gates.timed():
            proofs.judge_schema(job.gates, found, encoded, skip=skip)
            proofs.judge_truncation(job.gates, encoded, spec.cutoff_len, spec.max_truncated_share)
            proofs.judge_labels(job.gates, encoded, encoder, skip=skip)
            proofs.judge_bos(job.gates, encoded, encoder, declared)
            proofs.judge_tokenizer(job.gates, vocabulary, tokenizer.path)

        kept = chosen[encoded.counts[chosen] > 0]
        if not len(kept):
            raise FailedPrecondition(_nothing_left(encoded, spec.cutoff_len))
        train, val = selection.split(kept, spec.val_set_size)
        splits = {"train": encoded.samples_of(train), "val": encoded.samples_of(val)}
        work = _Work(
            job=job,
            vocabulary=vocabulary,
            template=encoder.template if declared else _own(tokenizer.path, vocabulary),
            formats=sorted({form.name for form in forms}),
            spool=spool,
            # Training rows follow where the held-out ones are too few.
            probe=_probe(spool, [*splits["val"][: 4 * TOKENS], *splits["train"][: 4 * TOKENS]]),
            parents=[
                tokenizer.digest,
                *dict.fromkeys(source.artifact for source in located if source.artifact),
            ],
        )
        outputs = [
            _split(work, name, samples)
            for name, samples in splits.items()
            if len(samples) or name == "train"
        ]
    facts = {
        "rows": {
            "read": found.total,
            "usable": int(found.usable.sum()),
            "chosen": len(chosen),
            "train": len(train),
            "val": len(val),
        },
        "encoded": encoded.tally.to_json()
        | {
            "truncated_rows": encoded.truncated,
            "truncated_share": encoded.truncated_share,
            "dropped_rows": encoded.dropped,
            "longest_row": encoded.longest,
            "straddling_rows": encoded.straddling,
        },
        "duplicates": {"equal": found.equal, "near": found.near},
        "bad_rows": found.bad.to_json(),
        "unrenderable_rows": encoded.unusable.to_json(),
        "long_rows": encoded.long.to_json(),
        "masked_rows": encoded.masked.to_json(),
        "rows_with_special_tokens": encoded.special.to_json(),
        "unused_fields": dict(found.unused),
        "sources": [
            {
                "source": source.text,
                "format": form.name,
                "sha256": digest,
                "bytes": source.size,
                "rows": end - start,
            }
            for source, form, digest, start, end in zip(
                located,
                forms,
                [*digests, *(sources.digest(source) for source in located[len(digests) :])],
                [0, *found.ends],
                found.ends,
                strict=False,
            )
        ],
        "template": work.template.name if work.template else "",
    }
    _log(job, facts)
    outputs.append(_report(work, facts))
    return outputs


def _survey(
    job: Job,
    located: Sequence[sources.Source],
    forms: Sequence[RowFormat],
    crew: Crew,
    report: preparation.Report,
) -> preparation.Survey:
    how = (job.spec.dedup, job.spec.dedup_threshold)
    if job.spec.dedup == NONE:
        return preparation.survey(located, forms, report)
    with Duplicates(*how, job.scratch / "dedup") as duplicates:
        return preparation.survey(
            located, forms, report, crew=crew, duplicates=duplicates, dedup=how
        )


def _all_text(forms: Sequence[RowFormat]) -> bool:
    return all(form.name == TEXT for form in forms)


def _tokenizer_files(job: Job, vocabulary: Vocabulary) -> Path:
    """A directory from which every process loads the same tokenizer, soon."""
    given = job.input("tokenizer").path
    if (given / TOKENIZER_FILE).is_file():
        return given
    return vocabulary.save(job.scratch / "tokenizer", given)


def _processes(asked: int, located: Sequence[sources.Source]) -> int:
    size = sum(source.size for source in located)
    return min(threads(asked), 1 + size // _BYTES_A_PROCESS)


def _bound(template: Template, vocabulary: Vocabulary) -> Template:
    return template.bind(bos_token=vocabulary.bos, eos_token=vocabulary.eos)


def _own(directory: Path, vocabulary: Vocabulary) -> Template | None:
    template = own_template(directory)
    return _bound(template, vocabulary) if template else None


def _refuse_long(spec: Any, encoded: preparation.Encoded) -> None:
    if spec.over_length == FAIL and encoded.long.count:
        raise FailedPrecondition(
            f"{encoded.long.count} rows are longer than cutoff_len {spec.cutoff_len}: "
            f"{encoded.long}. Expected none, since over_length is fail: raise cutoff_len "
            f"({encoded.longest} would do), or set over_length to truncate or drop",
            reason="ROWS_TOO_LONG",
        )


def _nothing_left(encoded: preparation.Encoded, cutoff_len: int) -> str:
    if encoded.unusable.count:
        return f"no row is left: the template refuses {encoded.unusable}"
    return (
        f"no row is left: {encoded.masked.count} have prompts longer than cutoff_len "
        f"{cutoff_len}, {encoded.dropped} were dropped as longer; raise it"
    )


def _reporter(job: Job) -> preparation.Report:
    def report(phase: str, done: int, total: int) -> None:
        if job.preempted.is_set():
            raise Preempted("preparing was interrupted; it starts again from the sources")
        job.progress(phase=phase, step=done, total=total, unit="rows")

    return report


def _fetching(job: Job) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        if job.preempted.is_set():
            raise Preempted("fetching was interrupted; it starts again")
        job.progress(phase="fetching", step=done, total=total, unit="bytes")

    return report


def _probe(spool: arrow.Spool, samples: Sequence[int]) -> list[list[int]]:
    """The first samples that hold enough tokens, cut to the fixed tokens of golden logits."""
    candidates: list[list[int]] = []
    for sample in samples:
        # Four times over: probe_sequences cuts long rows and passes over short ones.
        if sum(len(ids) for ids in candidates) >= 4 * TOKENS and len(candidates) >= TOKENS:
            break
        candidates.append(spool.ids(sample))
    return probe_sequences(candidates)


def _split(work: _Work, name: str, samples: selection.Rows) -> Output:
    job, vocabulary, spool = work.job, work.vocabulary, work.spool
    job.progress(phase="writing", total=len(samples), unit="rows")
    directory = job.output_dir(name)
    counts = None
    if job.spec.packing:
        packed = packing.pack(spool.lengths[samples].astype(np.int64), job.spec.cutoff_len)
        samples, counts = samples[packed.order], packed.counts
    written = arrow.write(directory / arrow.FILE_NAME, spool, samples, MASKED, counts=counts)
    if work.template:
        work.template.write(directory)
    template = work.template.name if work.template else ""
    facts: dict[str, Any] = {
        "format": FORMAT,
        "rows": written.rows,
        "samples": written.samples,
        "packing": counts is not None,
        "tokens": written.tokens,
        "trained_tokens": written.trained_tokens,
        "max_length": written.max_length,
        "cutoff_len": job.spec.cutoff_len,
        "tokenizer": job.input("tokenizer").digest,
        "template": template,
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": vocabulary.eos_id,
        "pad_token_id": vocabulary.pad_id,
    }
    _write_json(directory / DATASET_FILE, facts)
    _write_json(directory / PROBE_FILE, {"sequences": work.probe})
    return Output(
        name=name,
        kind="dataset",
        path=directory,
        parents=work.parents,
        metrics={key: float(facts[key]) for key in ("rows", "samples", "tokens", "trained_tokens")},
        labels={"template": template, "split": name, "formats": ",".join(work.formats)},
    )


def _report(work: _Work, facts: dict[str, Any]) -> Output:
    job = work.job
    directory = job.output_dir("report")
    report = {"format": FORMAT, "kind": "dataset", **facts}
    report |= {"tokenizer": job.input("tokenizer").digest, "spec": to_json(job.spec)}
    _write_json(directory / REPORT_FILE, report)
    encoded = facts["encoded"]
    return Output(
        name="report",
        kind="report",
        path=directory,
        parents=work.parents,
        metrics={
            **{
                key: float(encoded[key])
                for key in ("rows", "tokens", "trained_tokens", "truncated_share", "dropped_rows")
            },
            "bad_rows": float(facts["bad_rows"]["count"] + facts["unrenderable_rows"]["count"]),
            "duplicate_rows": float(sum(facts["duplicates"].values())),
        },
        labels={"report": "dataset"},
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _log(job: Job, facts: dict[str, Any]) -> None:
    encoded = facts["encoded"]
    job.log.info(
        "%d samples, %d tokens, %d trained, longest %d, %.1f%% truncated at %d",
        encoded["rows"],
        encoded["tokens"],
        encoded["trained_tokens"],
        encoded["max_length"],
        100 * encoded["truncated_share"],
        job.spec.cutoff_len,
    )
    if facts["unused_fields"]:
        job.log.warning("fields that the format does not read: %s", facts["unused_fields"])
    if encoded["straddling_rows"]:
        job.log.warning(
            "%d rows have a token that spans the end of a prompt: serving will tokenize "
            "these prompts differently",
            encoded["straddling_rows"],
        )
    count = facts["rows_with_special_tokens"]["count"]
    if count:
        job.log.warning("%d rows hold special tokens as text, which are read as such", count)


if __name__ == "__main__":
    main({"dataset": prepare, "extend_tokenizer": extend_tokenizer, "transform": transform})
