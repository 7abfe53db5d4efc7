"""What survives the orchestrator: documents of runs and endpoints."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from arriero.errors import AlreadyExists, FailedPrecondition, GateFailed, Unavailable
from arriero.orchestrator.records import EndpointRecord, Records, RunRecord
from arriero.rpc import to_status
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import pipeline_pb2


def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'sub' / 'o.db'}"


def record(run_id: str, request_id: str = "") -> RunRecord:
    stage = pb.StageStatus(name="a", kind="train", error=to_status(GateFailed("no")))
    pipeline = pipeline_pb2.Pipeline(name="p", tags={"gguf/x:y": "a"})
    run = pb.Run(id=run_id, pipeline=pipeline, stages=[stage], state=pb.RUN_STATE_RUNNING)
    return RunRecord(run, request_id, "digest", {"model/m:x": "sha256:1"}, [request_id])


def test_a_run_comes_back_as_it_was(tmp_path):
    made = record("p-1", "r")
    made.owed = [("a", "operations/1")]
    first = Records(url(tmp_path))
    first.create_run(made)
    first.close()
    again = Records(url(tmp_path))
    assert again.run("p-1") == made
    assert again.run_by_request("r") == made
    assert again.run("p-2") is None


def test_a_request_id_makes_one_run_but_none_makes_many(tmp_path):
    records = Records(url(tmp_path))
    records.create_run(record("p-1", "r"))
    with pytest.raises(AlreadyExists):
        records.create_run(record("p-2", "r"))
    records.create_run(record("p-3"))
    records.create_run(record("p-4"))


def test_only_active_runs_are_taken_up_again(tmp_path):
    records = Records(url(tmp_path))
    ended, owing = record("p-1"), record("p-2")
    for made in (ended, owing, record("p-3")):
        records.create_run(made)
    ended.run.state = owing.run.state = pb.RUN_STATE_CANCELLED
    owing.owed = [("a", "operations/1")]
    records.save_run(ended)
    records.save_run(owing)
    assert [r.run.id for r in records.active_runs()] == ["p-2", "p-3"]


def test_runs_are_listed_newest_first(tmp_path):
    records = Records(url(tmp_path))
    for i in range(5):
        records.create_run(record(f"p-{i}"))
    page, following = records.list_runs(3, None)
    assert [r.run.id for r in page] == ["p-4", "p-3", "p-2"]
    page, following = records.list_runs(3, following)
    assert [r.run.id for r in page] == ["p-1", "p-0"]
    assert following is None


def test_the_etag_changes_with_every_change(tmp_path):
    made = record("p-1")
    before = made.seen().etag
    made.run.stages[0].metadata.progress.step = 1
    assert made.seen().etag != before
    assert made.run.etag == ""


def test_endpoints_come_back_as_they_were(tmp_path):
    records = Records(url(tmp_path))
    made = EndpointRecord(
        pb.Endpoint(name="e", desired_replicas=2), 3, "r", False, pb.Endpoint(name="e"), True, "no"
    )
    records.save_endpoint(made)
    made.generation = 4
    records.save_endpoint(made)
    assert records.endpoints() == [made]
    records.delete_endpoint("e")
    assert records.endpoints() == []


def test_newer_databases_and_documents_are_refused(tmp_path):
    Records(url(tmp_path)).close()
    file = tmp_path / "sub" / "o-records.db"
    with sqlite3.connect(file) as db:
        db.execute("UPDATE arriero_meta SET value = '99'")
    with pytest.raises(FailedPrecondition, match="format 99"):
        Records(url(tmp_path))
    text = json.dumps({**json.loads(record("p-1").to_json()), "format": 99})
    with pytest.raises(FailedPrecondition, match="format 99"):
        RunRecord.from_json(text)


def test_a_database_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(Unavailable, match="ARRIERO_DATABASE_URL"):
        Records("sqlite:////proc/none/o.db")
