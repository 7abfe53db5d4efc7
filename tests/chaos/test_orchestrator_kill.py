"""The orchestrator's process is killed; its runs go on as if nothing had been."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from arriero.rpc import connect
from arriero.settings import ClientSettings
from arriero.store import Store
from arriero.testing.replicas import FakeSupervisor
from arriero.testing.rooms import FakeRooms
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import orchestrator_pb2_grpc, pipeline_pb2

BRANCHES = 6


def branches(count: int = BRANCHES) -> pipeline_pb2.Pipeline:
    """One base, then `count` independent trainings, each merged and quantized; one served."""
    stages: list[dict[str, Any]] = [
        {"name": "base", "import": {"source": "/m", "as": "model"}},
        {"name": "rows", "dataset": {"sources": ["/d"], "tokenizer": "base"}},
    ]
    for i in range(count):
        stages += [
            {"name": f"t{i}", "train": {"model": "base", "dataset": "rows", "seed": i}},
            {"name": f"m{i}", "merge": {"model": "base", "adapters": [f"t{i}"]}},
            {"name": f"q{i}", "quantize": {"model": f"m{i}", "types": ["Q8_0"]}},
        ]
    stages.append({"name": "live", "deploy": {"model": "q0", "endpoint": "e"}})
    data = {"name": "wide", "stages": stages, "tags": {"gguf/wide:prod": "q0"}}
    return json_format.ParseDict(data, pipeline_pb2.Pipeline())


class Process:
    """`python -m arriero.orchestrator` beside fake rooms."""

    def __init__(self, directory: Path, rooms: FakeRooms, database_url: str) -> None:
        self.address_file = directory / "address"
        self.env = {
            **os.environ,
            **rooms.environment(),
            "ARRIERO_HOME": str(directory),
            "ARRIERO_STORE": str(directory / "store"),
            "ARRIERO_DATABASE_URL": database_url,
            "ARRIERO_PLATFORM_DIR": str(directory / "platform"),
            "ARRIERO_ADDRESS_FILE": str(self.address_file),
            "ARRIERO_DRAIN_SECONDS": "1",
            "ARRIERO_METRICS_ADDRESS_FILE": str(directory / "metrics"),
        }
        self.process: asyncio.subprocess.Process | None = None
        self.channel: Any = None

    async def start(self) -> orchestrator_pb2_grpc.RunServiceStub:
        self.address_file.unlink(missing_ok=True)
        self.process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "arriero.orchestrator", env=self.env
        )
        async with asyncio.timeout(300):
            while not self.address_file.exists():
                assert self.process.returncode is None, "the orchestrator ended"
                await asyncio.sleep(0.05)
        self.channel = connect(
            self.address_file.read_text().strip(), ClientSettings(timeout_seconds=60)
        )
        return orchestrator_pb2_grpc.RunServiceStub(self.channel)

    async def kill(self) -> None:
        assert self.process is not None
        if self.channel is not None:
            await self.channel.close()
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def stop(self) -> int:
        assert self.process is not None
        await self.channel.close()
        self.process.terminate()
        return await asyncio.wait_for(self.process.wait(), 120)


@pytest.fixture
async def rooms(tmp_path: Path) -> AsyncIterator[FakeRooms]:
    async with (
        FakeRooms(Store.open(tmp_path / "store")) as made,
        FakeSupervisor(tmp_path / "platform"),
    ):
        yield made


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'orchestrator.db'}"
    return str(request.getfixturevalue("postgres").create())


@pytest.fixture
async def process(tmp_path: Path, rooms: FakeRooms, database_url: str) -> AsyncIterator[Process]:
    made = Process(tmp_path, rooms, database_url)
    yield made
    if made.process is not None and made.process.returncode is None:
        await made.kill()


async def ended(stub: Any, run_id: str) -> pb.Run:
    async with asyncio.timeout(400):
        while True:
            run = (await stub.GetRun(pb.GetRunRequest(id=run_id))).run
            if run.HasField("end_time"):
                return run
            await asyncio.sleep(0.1)


def page(directory: Path) -> str:
    """The Prometheus page of the process."""
    url = f"http://{(directory / 'metrics').read_text().strip()}/metrics"
    with urllib.request.urlopen(url, timeout=120) as answer:
        return answer.read().decode()


def check_whole(run: pb.Run, rooms: FakeRooms) -> None:
    """Each stage has its own result, and none was started twice."""
    assert run.state == pb.RUN_STATE_SUCCEEDED, run.error
    outputs = {s.name: {o.name: o.digest for o in s.outputs} for s in run.stages}
    starts = [o.request_id for o in rooms.operations.values()]
    assert len(starts) == len(set(starts)) == len(run.stages) - 1
    for status in run.stages:
        if status.kind == "deploy":
            continue
        (operation,) = rooms.of(status.name)
        assert operation.request_id == f"{run.id}/{status.name}/1"
        assert status.operation == operation.name
        assert list(status.outputs) == operation.outputs
        for output in status.outputs:
            assert rooms.store.get(output.digest).manifest.labels["stage"] == status.name
    for i in range(BRANCHES):
        (merge,) = rooms.of(f"m{i}")
        (quantize,) = rooms.of(f"q{i}")
        assert list(merge.spec.adapters) == [outputs[f"t{i}"]["adapter"]]
        assert quantize.spec.model == outputs[f"m{i}"]["model"]
    assert rooms.store.resolve("gguf/wide:prod") == outputs["q0"]["Q8_0"]


async def test_parallel_branches_get_their_own_results_back_after_a_kill(tmp_path, rooms, process):
    rooms.held = {f"t{i}" for i in range(BRANCHES)}
    stub = await process.start()
    request = pb.CreateRunRequest(pipeline=branches(), request_id="once")
    run = (await stub.CreateRun(request)).run
    for i in range(BRANCHES):
        await rooms.started(f"t{i}")
    await process.kill()
    # They end while nobody waits, and in another order than they began.
    for i in reversed(range(BRANCHES)):
        rooms.release(f"t{i}")
    stub = await process.start()
    assert (await stub.CreateRun(request)).run.id == run.id
    assert f'arriero_run_state{{run="{run.id}"' in await asyncio.to_thread(page, tmp_path)
    check_whole(await ended(stub, run.id), rooms)
    assert all(rooms.calls[f"{run.id}/t{i}/1"] == 2 for i in range(BRANCHES))
    assert await process.stop() == 0


async def test_any_number_of_kills_at_any_moment_changes_nothing(rooms, process):
    stub = await process.start()
    run = (await stub.CreateRun(pb.CreateRunRequest(pipeline=branches()))).run
    for pause in (0.05, 0.3, 0.15, 0.5):
        await asyncio.sleep(pause)
        await process.kill()
        stub = await process.start()
    check_whole(await ended(stub, run.id), rooms)


async def test_a_cancellation_survives_a_kill(rooms, process):
    rooms.held = {"rows"}
    stub = await process.start()
    run = (await stub.CreateRun(pb.CreateRunRequest(pipeline=branches()))).run
    operation = await rooms.started("rows")
    await rooms.stop("dataset")  # so that the wish is recorded, but not delivered
    await stub.CancelRun(pb.CancelRunRequest(id=run.id))
    await process.kill()
    stub = await process.start()
    run = await ended(stub, run.id)
    assert run.state == pb.RUN_STATE_CANCELLED
    await rooms.start("dataset")
    async with asyncio.timeout(300):
        await operation.ended.wait()
    assert rooms.cancelled == [operation.name]
