"""The job of stage `transform`: rows and an endpoint in, answered rows out.

Responsibility: tie the asking to a job's spec, inputs, checkpoints and outputs.
Does not know HTTP or what makes an endpoint fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arriero.dataset import rows, sources
from arriero.dataset.report import Findings
from arriero.dataset.rows import Row
from arriero.dataset.sources import Source
from arriero.dataset.spec import check_digests
from arriero.dataset.transform.answers import Answers
from arriero.dataset.transform.asking import Asking, Task, read_fields
from arriero.dataset.transform.chat import Chat, Question
from arriero.dataset.transform.pace import Pace
from arriero.dataset.transform.spec import ROW, fields_of
from arriero.errors import FailedPrecondition, InvalidArgument, Preempted
from arriero.operations.handoff import canonical, to_json
from arriero.operations.job import Job, Output
from arriero.prompts import sandbox
from arriero.rpc import logs
from arriero.settings import SourceSettings, secret

__all__ = ["transform"]

ANSWERS_FILE, ROWS_FILE = "answers.jsonl", "rows.jsonl"
REPORT_FILE, FAILURES_FILE = "report.json", "failures.jsonl"
FORMAT = 1
_LEASE_SECONDS = 24 * 3600.0
_SAMPLES = 3
# How long what is asked already may take when the job is told to leave.
_GRACE_SECONDS = 8.0
_POLL_SECONDS = 0.2


def transform(job: Job) -> list[Output]:
    """Ask about every row: outputs `rows` and `report`.

    Raises:
        FailedPrecondition: more rows failed than `max_failed_share` allows; the
            answers stay for the retry.
        Unavailable: the endpoint is away; what is answered stays.
        Preempted: told to leave; what is answered stays.
    """
    stored = [text for text in job.spec.sources if sources.is_stored(text)]
    if not stored:
        return _transform(job)
    with job.store.lease("dataset", stored, ttl=_LEASE_SECONDS):
        return _transform(job)


def _transform(job: Job) -> list[Output]:
    spec = job.spec
    SourceSettings.from_env().check_url(spec.endpoint, field="endpoint", resolve=True)
    located = sources.fetch(
        sources.locate_all(spec.sources, job.inputs.get("rows", []), job.store, None),
        job.scratch / "sources",
        token=None,
    )
    check_digests(located[: len(spec.sources)], spec.sha256)
    questions = _Questions(located, spec)
    total = sum(1 for _ in questions.rows())
    if not total:
        raise InvalidArgument.field("sources", "hold no rows; expected at least one")
    # A retry of the work asks again what failed; an attempt after a kill does not.
    with Answers(job.checkpoints / ANSWERS_FILE, forgive=job.attempt == 1) as answers:
        if len(answers):
            job.log.info("%d answers are there already", len(answers))
        asking = asyncio.run(_ask(job, questions, answers, total))
        if job.preempted.is_set():
            raise Preempted(f"told to leave; {len(answers)} answers are kept")
        made = _write(job, questions, answers, asking)
    _judge(job, made, len(answers))
    parents = [*(artifact.digest for artifact in job.inputs.get("rows", []))]
    parents += [source.artifact for source in located if source.artifact]
    metrics = {
        "rows": float(made.written),
        "failed_rows": float(made.failed.count),
        "prompt_tokens": float(answers.prompt_tokens),
        "completion_tokens": float(answers.completion_tokens),
    }
    report = {
        "format": FORMAT,
        "kind": "transform",
        "rows": {"read": total, "written": made.written, "failed": made.failed.count},
        "failed_rows": made.failed.to_json(),
        "tokens": {"prompt": answers.prompt_tokens, "completion": answers.completion_tokens},
        "samples": made.samples,
        "spec": to_json(spec),
    }
    made.report.joinpath(REPORT_FILE).write_text(
        json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )
    parents = list(dict.fromkeys(parents))
    return [
        Output("rows", "dataset", made.rows, parents=parents, metrics=metrics),
        Output(
            "report",
            "report",
            made.report,
            parents=parents,
            metrics=metrics,
            labels={"report": "transform"},
        ),
    ]


@dataclass(frozen=True)
class _Questions:
    """The rows of a stage and what is asked about each."""

    sources: Sequence[Source]
    spec: Any

    def rows(self) -> Iterator[Row]:
        """Every row that is to be asked about, in order."""
        number = 0
        for source in self.sources:
            for file in source.files:
                for row in rows.read(file.path, file.name):
                    if self.spec.max_rows and number >= self.spec.max_rows:
                        return
                    number += 1
                    yield row

    def task(self, row: Row) -> Task | str:
        """What to ask; what is wrong with the row, where that is why it cannot be."""
        values = fields_of(row.value)
        if values is None:
            return f"is a {type(row.value).__name__}; expected an object with fields"
        try:
            prompt = sandbox.render(self.spec.prompt, {**values, ROW: values})
        except InvalidArgument as error:
            return f"the prompt cannot be made: {error.violations[0].description}"
        if not prompt.strip():
            return "the prompt is empty"
        messages = [{"role": "user", "content": prompt}]
        if self.spec.system:
            messages.insert(0, {"role": "system", "content": self.spec.system})
        asked = {"row": row.value, "model": self.spec.model, "messages": messages}
        return Task(hashlib.sha256(canonical(asked)).hexdigest(), Question(messages))

    def tasks(self) -> Iterator[Task]:
        """Every question."""
        for row in self.rows():
            task = self.task(row)
            if isinstance(task, Task):
                yield task


async def _ask(job: Job, questions: _Questions, answers: Answers, total: int) -> Asking:
    spec = job.spec
    key = ""
    if spec.HasField("api_key_secret"):
        key = secret(spec.api_key_secret, field="api_key_secret")
        logs.add_secret(key)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        tokens = answers.prompt_tokens + answers.completion_tokens
        job.progress(phase="asking", step=done, total=total, unit="rows", tokens=tokens)

    chat = Chat(
        endpoint=spec.endpoint,
        model=spec.model,
        parameters={
            "max_tokens": spec.max_tokens,
            "temperature": spec.temperature,
            "seed": spec.seed,
        },
        key=key,
        pace=Pace(spec.requests_per_minute, spec.tokens_per_minute),
        timeout=spec.timeout_seconds,
        retries=spec.max_retries,
        connections=spec.concurrency,
    )
    asking = Asking(
        asker=chat,
        answers=answers,
        fields=list(spec.fields),
        concurrency=spec.concurrency,
        # At temperature 0 the same question gets the same answer.
        again=spec.max_retries if spec.temperature > 0 else 0,
        advance=advance,
        stopping=job.preempted.is_set,
    )
    async with chat:
        work = asyncio.ensure_future(asking.run(questions.tasks()))
        left = _GRACE_SECONDS
        while not work.done():
            await asyncio.wait({work}, timeout=_POLL_SECONDS)
            left -= _POLL_SECONDS * job.preempted.is_set()
            if left < 0:
                work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
    if chat.retried:
        job.log.warning("%d requests were sent again", chat.retried)
    return asking


@dataclass
class _Made:
    """The files of both outputs, and what went into them."""

    rows: Path
    report: Path
    written: int = 0
    failed: Findings = field(default_factory=Findings)
    samples: list[dict[str, Any]] = field(default_factory=list)


def _write(job: Job, questions: _Questions, answers: Answers, asking: Asking) -> _Made:
    """Every row goes to one of two files: answered, or failed with its reason."""
    job.progress(phase="writing", force=True)
    made = _Made(job.output_dir("rows"), job.output_dir("report"))
    names = list(job.spec.fields)
    with (
        (made.rows / ROWS_FILE).open("w", encoding="utf-8") as good,
        (made.report / FAILURES_FILE).open("w", encoding="utf-8") as bad,
    ):
        for row in questions.rows():
            task = questions.task(row)
            answer = answers.read(task.key) if isinstance(task, Task) else None
            if answer is not None:
                written = {**(fields_of(row.value) or {}), **read_fields(answer, names)}
                good.write(json.dumps(written, ensure_ascii=False) + "\n")
                made.written += 1
                if len(made.samples) < _SAMPLES:
                    made.samples.append({"before": row.value, "after": written})
                continue
            why = asking.failures.get(task.key, "was not asked") if isinstance(task, Task) else task
            made.failed.add(row, why)
            entry = {"file": row.file, "row": row.number, "why": why, "value": row.value}
            bad.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return made


def _judge(job: Job, made: _Made, kept: int) -> None:
    failed, total = made.failed.count, made.failed.count + made.written
    allowed = job.spec.max_failed_share
    if failed:
        job.log.warning("%d of %d rows failed: %s", failed, total, made.failed)
    if failed > allowed * total or not made.written:
        raise FailedPrecondition(
            f"{failed} of {total} rows failed, allowed is a share of {allowed:g}: {made.failed}. "
            f"{kept} answers are kept: retry the run to ask again for the failed ones alone, or "
            "raise max_failed_share to go on without them",
            reason="ROWS_FAILED",
            metadata={"failed": str(failed), "rows": str(total)},
        )
