"""Rows through a real HTTP endpoint that misbehaves as real ones do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from arriero.dataset.transform import chat
from arriero.dataset.transform.job import transform
from arriero.dataset.transform.spec import check, resolve
from arriero.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Preempted,
    Unavailable,
)
from arriero.operations.job import Job, Output
from arriero.operations.kinds import ResolveContext
from arriero.settings import SourceSettings
from arriero.testing.jobs import run_job
from arriero.v1 import dataset_pb2


class Endpoint:
    """A running server, its rules, and what it was asked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = (directory / "address").read_text()

    def rules(self, *rules: dict[str, Any]) -> None:
        (self.directory / "rules.json").write_text(json.dumps(rules))

    @property
    def requests(self) -> list[dict[str, Any]]:
        path = self.directory / "requests.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    @property
    def asked(self) -> Counter[str]:
        return Counter(request["prompt"] for request in self.requests)


@pytest.fixture
def endpoint(tmp_path: Path, wait_until) -> Iterator[Endpoint]:
    directory = tmp_path / "endpoint"
    directory.mkdir()
    process = subprocess.Popen([sys.executable, "-m", "arriero.testing.chat_server", directory])
    try:
        wait_until((directory / "address").exists, what="the server starts")
        yield Endpoint(directory)
    finally:
        process.kill()
        process.wait()


class Done:
    def __init__(self, outputs: list[Output]) -> None:
        self.outputs = {output.name: output for output in outputs}
        self.rows = self._lines("rows", "rows.jsonl")
        self.failures = self._lines("report", "failures.jsonl")
        self.report = json.loads((self.outputs["report"].path / "report.json").read_text())

    def _lines(self, name: str, file: str) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in (self.outputs[name].path / file).read_text().splitlines()
        ]


Run = Callable[..., Done]


@pytest.fixture
def run(store, data: Path, allowed, tmp_path: Path, endpoint: Endpoint, monkeypatch) -> Run:
    """Resolves and runs a transform stage over rows."""
    monkeypatch.setattr(chat, "FIRST_BACKOFF", 0.001)

    def run(rows: list[Any], attempt: int = 1, seen=None, **fields) -> Done:
        (data / "rows.json").write_text(json.dumps(rows))
        fields.setdefault("sources", [str(data / "rows.json")])
        fields.setdefault("endpoint", endpoint.url)
        fields.setdefault("model", "tiny")
        fields.setdefault("prompt", "{{ q }}")
        spec = dataset_pb2.TransformSpec(**fields)
        context = ResolveContext(store=store, inputs={}, sources=allowed)
        resolved = resolve(spec, context).spec
        outputs = run_job(
            transform, "transform", resolved, {}, store, tmp_path, attempt=attempt, prepare=seen
        )
        return Done(outputs)

    return run


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"q": f"question {i}", "kept": i} for i in range(count)]


def test_every_row_gets_its_answer_and_keeps_its_place(run: Run, endpoint: Endpoint) -> None:
    done = run(rows_of(20), concurrency=5, system="Be brief.", temperature=0.5, max_tokens=7)
    assert done.rows == [
        {"q": f"question {i}", "kept": i, "output": f"answer to question {i}"} for i in range(20)
    ]
    body = endpoint.requests[0]["body"]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("tiny", 0.5, 7)
    assert done.report["rows"] == {"read": 20, "written": 20, "failed": 0}
    assert done.report["tokens"] == {"prompt": 40, "completion": 80}
    assert done.report["samples"][0]["after"]["output"] == "answer to question 0"


def test_equal_rows_are_asked_once(run: Run, endpoint: Endpoint) -> None:
    done = run([{"q": "same"}] * 30, concurrency=6)
    assert len(done.rows) == 30
    assert endpoint.asked == {"same": 1}


def test_several_fields_and_the_whole_row_in_the_prompt(run: Run, endpoint: Endpoint) -> None:
    endpoint.rules({"match": '{"q": "x"}', "answer": '{"instruction": "i", "output": "o"}'})
    done = run([{"q": "x"}], prompt="{{ row | tojson }}", fields=["instruction", "output"])
    assert done.rows == [{"q": "x", "instruction": "i", "output": "o"}]


def test_refusals_that_pass_are_tried_again(run: Run, endpoint: Endpoint) -> None:
    endpoint.rules(
        {"match": "question 0", "times": 2, "status": 429, "headers": {"Retry-After": "0"}},
        {"match": "question 1", "times": 2, "status": 500},
        {"match": "question 2", "times": 1, "drop": True},
        {"match": "question 3", "times": 1, "raw": {"unexpected": 1}},
    )
    done = run(rows_of(5))
    assert len(done.rows) == 5
    assert endpoint.asked == {
        "question 0": 3,
        "question 1": 3,
        "question 2": 2,
        "question 3": 2,
        "question 4": 1,
    }


def test_a_hanging_answer_is_given_up_and_asked_for_again(run: Run, endpoint: Endpoint) -> None:
    endpoint.rules({"match": "question 1", "times": 1, "hang": True})
    assert len(run(rows_of(3), timeout_seconds=4).rows) == 3
    assert endpoint.asked["question 1"] == 2


def test_rows_that_fail_are_listed_and_refuse_the_work(run: Run, endpoint: Endpoint) -> None:
    endpoint.rules(
        {"match": "question 1", "status": 400, "message": "context too long"},
        {"match": "question 3", "finish": "length"},
    )
    rows = [*rows_of(5), 7]
    with pytest.raises(FailedPrecondition) as caught:
        run(rows)
    for said in ("3 of 6 rows failed", "context too long", "max_tokens; raise it", "row 6"):
        assert said in caught.value.message
    assert caught.value.reason == "ROWS_FAILED"
    # Again, allowing for them: what was answered is not asked again.
    done = run(rows, max_failed_share=0.5)
    assert len(done.rows) == 3
    assert [entry["row"] for entry in done.failures] == [2, 4, 6]
    assert done.failures[0]["value"] == rows[1]
    assert done.report["rows"] == {"read": 6, "written": 3, "failed": 3}
    assert done.outputs["rows"].metrics["failed_rows"] == 3
    assert endpoint.asked == {
        "question 0": 1,
        "question 1": 2,
        "question 2": 1,
        "question 3": 2,
        "question 4": 1,
    }


def test_a_retry_asks_again_for_what_failed_alone(run: Run, endpoint: Endpoint) -> None:
    endpoint.rules({"match": "question 2", "times": 1, "status": 422})
    with pytest.raises(FailedPrecondition):
        run(rows_of(4))
    assert len(run(rows_of(4)).rows) == 4
    assert endpoint.asked["question 2"] == 2
    assert endpoint.asked["question 1"] == 1


def test_an_attempt_after_a_kill_does_not_ask_again_for_what_failed_for_good(
    run: Run, endpoint: Endpoint
) -> None:
    endpoint.rules({"match": "question 2", "status": 422})
    with pytest.raises(FailedPrecondition):
        run(rows_of(4))
    with pytest.raises(FailedPrecondition):
        run(rows_of(4), attempt=2)
    assert endpoint.asked["question 2"] == 1


def test_an_unusable_answer_is_asked_for_again_only_where_chance_may_help(
    run: Run, endpoint: Endpoint
) -> None:
    endpoint.rules(
        {"match": "", "times": 1, "answer": "not an object"},
        {"match": "", "answer": '{"a": "1", "b": "2"}'},
    )
    done = run([{"q": "x"}], fields=["a", "b"], temperature=0.7)
    assert done.rows == [{"q": "x", "a": "1", "b": "2"}]
    endpoint.rules({"match": "", "answer": "not an object"})
    with pytest.raises(FailedPrecondition, match="no JSON object with a, b"):
        run([{"q": "y"}], fields=["a", "b"])
    assert endpoint.asked["y"] == 1


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (401, PermissionDenied, "set api_key_secret"),
        (404, NotFound, "a model that it has"),
        (302, FailedPrecondition, "answers no chat completions"),
    ],
)
def test_an_endpoint_that_refuses_everybody_ends_the_work_at_once(
    run: Run, endpoint: Endpoint, status: int, error: type[Exception], said: str
) -> None:
    endpoint.rules({"match": "", "status": status})
    with pytest.raises(error, match=said):
        run(rows_of(50), concurrency=2)
    assert len(endpoint.requests) <= 2


def test_an_endpoint_that_goes_away_ends_the_work_and_what_is_answered_stays(
    run: Run, endpoint: Endpoint
) -> None:
    endpoint.rules(
        {"match": "", "times": 10}, {"match": "", "status": 503, "message": "overloaded"}
    )
    with pytest.raises(Unavailable, match=r"HTTP 503: overloaded.*10 answers are kept"):
        run(rows_of(200), concurrency=2, max_retries=1)
    endpoint.rules()
    assert len(run(rows_of(200)).rows) == 200
    again = [prompt for prompt, times in endpoint.asked.items() if times > 1]
    assert not set(again) & {f"question {i}" for i in range(9)}


def test_an_endpoint_that_nobody_listens_on_is_away(run: Run) -> None:
    with pytest.raises(Unavailable, match="rows in a row were not answered"):
        run(rows_of(40), endpoint="http://127.0.0.1:9/v1", max_retries=0)


def test_leaving_keeps_what_is_answered(run: Run, endpoint: Endpoint) -> None:
    jobs: list[Job] = []

    def leave_after_three(job: Job) -> None:
        jobs.append(job)
        original = job.progress

        def progress(**fields: Any) -> None:
            original(**fields)
            if fields["phase"] == "asking" and fields["step"] == 3:
                job.preempted.set()

        job.progress = progress  # type: ignore[method-assign]

    with pytest.raises(Preempted, match="answers are kept"):
        run(rows_of(10), concurrency=1, seen=leave_after_three)
    run(rows_of(10), attempt=2)
    assert set(endpoint.asked.values()) == {1}


def test_the_key_is_sent_and_comes_by_its_name(
    run: Run, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FailedPrecondition, match="ARRIERO_SECRET_MY_KEY set"):
        run(rows_of(1), api_key_secret="my-key")
    monkeypatch.setenv("ARRIERO_SECRET_MY_KEY", "value")
    done = run(rows_of(1), api_key_secret="my-key")
    assert endpoint.requests[-1]["authorization"] == "Bearer value"
    assert "value" not in json.dumps(done.report["spec"])


def test_only_the_first_rows_are_asked_about_when_asked(run: Run, endpoint: Endpoint) -> None:
    assert len(run(rows_of(9), max_rows=2).rows) == 2
    assert len(endpoint.requests) == 2


def test_rows_of_another_stage_follow_the_sources(
    store, publish, tmp_path: Path, allowed, endpoint: Endpoint
) -> None:
    first = publish({"rows.jsonl": '{"q": "a"}\n{"q": "b"}\n'}, "dataset", "first")
    spec = dataset_pb2.TransformSpec(
        rows=[first.digest], endpoint=endpoint.url, model="m", prompt="{{ q }}"
    )
    context = ResolveContext(store=store, inputs={"rows": [first]}, sources=allowed)
    resolved = resolve(spec, context).spec
    outputs = run_job(transform, "transform", resolved, {"rows": [first]}, store, tmp_path)
    assert [row["output"] for row in Done(outputs).rows] == ["answer to a", "answer to b"]
    assert list(outputs[0].parents) == [first.digest]


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"prompt": "{{ quest }}"}, "prompt", "names quest"),
        ({"prompt": "{{ q "}, "prompt", "Jinja does not accept it"),
        ({"prompt": ""}, "prompt", "is not set"),
        ({"endpoint": "localhost:1"}, "endpoint", "is not a URL"),
        ({"endpoint": "http://169.254.169.254/v1"}, "endpoint", "link-local"),
        ({"model": ""}, "model", "is not set"),
        ({"fields": ["a", "a"]}, "fields", "each once"),
        ({"api_key_secret": "sk-1234567890"}, "api_key_secret", "not the name of a secret"),
        ({"concurrency": 0}, "concurrency", "expected 1 to 1024"),
        ({"max_failed_share": 1.5}, "max_failed_share", "expected 0 to 1"),
        ({"sources": []}, "sources", "empty"),
        ({"gates": {"nonsense": 1}}, "gates['nonsense']", "unknown gate"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_asked(
    store, data: Path, allowed: SourceSettings, fields: dict[str, Any], field: str, said: str
) -> None:
    (data / "rows.json").write_text('[{"q": "a"}]')
    good: dict[str, Any] = {
        "sources": [str(data / "rows.json")],
        "endpoint": "http://localhost:1/v1",
        "model": "m",
        "prompt": "{{ q }}",
    }
    context = ResolveContext(store=store, inputs={}, sources=allowed)
    check(dataset_pb2.TransformSpec(**good), context)
    with pytest.raises(InvalidArgument) as caught:
        check(dataset_pb2.TransformSpec(**(good | fields)), context)
    assert caught.value.violations[0].field == field
    assert said in caught.value.violations[0].description


def test_how_it_is_asked_does_not_change_the_key(store, data: Path, allowed) -> None:
    (data / "rows.json").write_text('[{"q": "a"}]')
    spec = dataset_pb2.TransformSpec(
        sources=[str(data / "rows.json")], endpoint="http://h/v1", model="m", prompt="{{ q }}"
    )
    unkeyed = resolve(spec, ResolveContext(store=store, inputs={}, sources=allowed)).unkeyed
    assert "max_failed_share" in unkeyed
    assert not {"endpoint", "model", "prompt", "fields", "sha256", "rows"} & set(unkeyed)
