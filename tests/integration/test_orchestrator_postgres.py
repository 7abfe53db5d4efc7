"""The orchestrator on a real PostgreSQL: what is wrong is said, what is away is awaited."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from arriero.errors import Unavailable
from arriero.orchestrator.records import Records
from arriero.rpc import connect, translated
from arriero.settings import ClientSettings
from arriero.store import Store
from arriero.testing.rooms import FakeRooms
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import orchestrator_pb2_grpc, pipeline_pb2


def environment(directory: Path, url: str) -> dict[str, str]:
    return {
        **os.environ,
        "ARRIERO_HOME": str(directory),
        "ARRIERO_STORE": str(directory / "store"),
        "ARRIERO_ADDRESS_FILE": str(directory / "address"),
        "ARRIERO_DRAIN_SECONDS": "1",
        "ARRIERO_DATABASE_URL": url,
    }


def refused(directory: Path, url: str) -> str:
    """What the orchestrator says before it ends."""
    done = subprocess.run(
        [sys.executable, "-m", "arriero.orchestrator"],
        env=environment(directory, url),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "secret" not in done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    (error,) = [line["message"] for line in lines if line["level"] == "ERROR"]
    return str(error)


def test_a_wrong_url_is_refused(tmp_path: Path) -> None:
    expected = "expected sqlite:////absolute/path.db or postgresql://user@host:5432/database"
    for url in ("secret", "mysql://u:secret@h/d", "postgresql://u:secret@h:x/d"):
        said = refused(tmp_path, url)
        assert said.startswith("ARRIERO_DATABASE_URL:")
        assert expected in said
    assert "names no database" in refused(tmp_path, "postgresql://u:secret@127.0.0.1")


def test_what_the_server_refuses_is_said_with_what_to_do(postgres: Any, tmp_path: Path) -> None:
    said = refused(tmp_path, postgres.url("runs", password="secret"))
    assert f"@127.0.0.1:{postgres.port}/runs cannot be used" in said
    assert 'password authentication failed for user "arriero"' in said
    assert said.endswith("check user and password in ARRIERO_DATABASE_URL")
    said = refused(tmp_path, postgres.url("nowhere"))
    assert 'database "nowhere" does not exist' in said
    assert "createdb" in said
    said = refused(tmp_path, "postgresql://u:secret@127.0.0.1:9/runs")
    assert "Connection refused" in said
    assert said.endswith("check that it runs, and what ARRIERO_DATABASE_URL says")


def test_documents_come_back_after_a_restart_of_the_database(postgres: Any) -> None:
    records = Records(postgres.create())
    assert records.list_runs(5, None) == ([], None)
    postgres.stop()
    try:
        with pytest.raises(Unavailable, match=r"arriero:\*\*\*@.*Connection refused"):
            records.list_runs(5, None)
    finally:
        postgres.start()
    assert records.list_runs(5, None) == ([], None)
    records.close()


async def test_a_run_waits_for_a_database_that_is_away(postgres: Any, tmp_path: Path) -> None:
    stages: list[dict[str, Any]] = [
        {"name": "base", "import": {"source": "/m", "as": "model"}},
        {"name": "rows", "dataset": {"sources": ["/d"], "tokenizer": "base"}},
    ]
    pipeline = json_format.ParseDict({"name": "away", "stages": stages}, pipeline_pb2.Pipeline())
    env = environment(tmp_path, postgres.create())
    async with FakeRooms(Store.open(tmp_path / "store")) as rooms:
        rooms.held = {"base"}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "arriero.orchestrator", env={**env, **rooms.environment()}
        )
        async with asyncio.timeout(400):
            while not (tmp_path / "address").exists():
                assert process.returncode is None
                await asyncio.sleep(0.05)
            channel = connect(
                (tmp_path / "address").read_text().strip(), ClientSettings(timeout_seconds=60)
            )
            stub = orchestrator_pb2_grpc.RunServiceStub(channel)
            run = (await stub.CreateRun(pb.CreateRunRequest(pipeline=pipeline))).run
            await rooms.started("base")
            await asyncio.to_thread(postgres.stop)
            try:
                # The stage ends, and can be written nowhere.
                rooms.release("base")
                await rooms.operations[rooms.of("base")[0].name].ended.wait()
                with pytest.raises(Unavailable, match="run database"), translated():
                    await stub.ListRuns(pb.ListRunsRequest(), timeout=120)
            finally:
                await asyncio.to_thread(postgres.start)
            while run.state == pb.RUN_STATE_RUNNING:
                await asyncio.sleep(0.1)
                run = (await stub.GetRun(pb.GetRunRequest(id=run.id))).run
        assert run.state == pb.RUN_STATE_SUCCEEDED, run
        assert [o.stage for o in rooms.operations.values()] == ["base", "rows"]
        await channel.close()
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 120) == 0
