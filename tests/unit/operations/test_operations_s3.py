"""Work over a store in S3: what service and job hand each other, what survives machines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toyroom_support import asked, eventually, metadata_of, order, result_of, trace_of

from arriero.errors import Unavailable
from arriero.operations import Engine, attempts, logs, staging
from arriero.operations.records import ExecutionRecord, Records
from arriero.operations.runner import Launch, LocalProcess
from arriero.settings import SourceSettings
from arriero.store import Store


class Elsewhere(LocalProcess):
    """Jobs on machines of their own: each attempt has a disk that nobody else sees."""

    detached = True

    def __init__(self, disks: Path) -> None:
        self.disks = disks

    async def start(self, launch: Launch) -> Any:
        disk = str(self.disks / str(launch.attempt))
        assert str(launch.assignment).startswith("s3://")
        return await super().start(replace(launch, environment={"ARRIERO_STORE_CACHE": disk}))


@pytest.fixture
def store(s3_url: str) -> Store:
    return Store.open(s3_url)


@pytest.fixture
async def engines(toy_path: None) -> AsyncIterator[Callable[..., Engine]]:
    """Makes engines over a store; all are closed at the end."""
    from toyroom_service import KINDS

    made: list[Engine] = []

    def make(store: Store, **settings: Any) -> Engine:
        engine = Engine(
            service="merging",
            store=store,
            sources=SourceSettings(),
            kinds=KINDS,
            backoff=lambda attempt: 0.0,
            **settings,
        )
        made.append(engine)
        return engine

    yield make
    for engine in made:
        await engine.close()


async def test_a_job_that_shares_no_disk_with_its_service_goes_on_after_a_kill(
    store: Store, engines: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = engines(store, runner=Elsewhere(tmp_path / "disks"))
    await engine.recover()
    trace = tmp_path / "trace"
    go = tmp_path / "go"
    more = {"hold": 13, "go": str(go), "kill_at": 14, "trace": str(trace), "text": "apart"}
    started = await engine.start("import", order(steps=20, save=True, **more), asked("a"))

    def kept() -> bool:
        return any("/checkpoints/" in found.key for found in store.objects.find("staging/"))

    await asyncio.to_thread(eventually, kept, "a checkpoint is kept")
    go.touch()
    done = await engine.wait(started.name, 300)
    outputs = {output.name: output.digest for output in result_of(done).outputs}
    assert metadata_of(done).attempt == 2
    steps = [(attempt, step) for _, attempt, step in trace_of(trace)]
    again = min(step for attempt, step in steps if attempt == 2)
    assert 1 < again <= 14  # from what was kept, on a disk that had nothing
    assert store.get(outputs["main"]).file("data.txt").read_text() == "apart"
    for digest in outputs.values():
        store.verify(digest)
    # What led there goes beside the answer.
    staging = store.root / "staging" / "merging"

    def gone() -> bool:
        return not any(staging.iterdir()) and not list(store.objects.find("staging/"))

    await asyncio.to_thread(eventually, gone, "nothing stays")

    # Its inputs come from the store, its refusals are heard.
    from arriero.v1 import merging_pb2

    merge = merging_pb2.MergeSpec(model=outputs["main"])
    joined = await engine.wait((await engine.start("merge", merge, asked("b"))).name, 120)
    found = {output.name: output.digest for output in result_of(joined).outputs}
    assert store.get(found["main"]).file("data.txt").read_text() == "apartapart"
    failing = await engine.start("import", order(fail="InvalidArgument"), asked("c"))
    failed = await engine.wait(failing.name, 300)
    assert "as ordered" in failed.error.message


async def test_records_and_logs_are_there_on_the_service_s_next_machine(
    store: Store,
    engines: Callable[..., Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engines(store)
    await engine.recover()
    name = (await engine.start("import", order(steps=2), asked("a"))).name
    await engine.wait(name, 300)
    await engine.close()
    monkeypatch.setenv("ARRIERO_STORE_CACHE", str(tmp_path / "next"))
    moved = engines(Store.open(store.url))
    await moved.recover()
    assert metadata_of(moved.get(name)).run == "run-1"
    path = await moved.log_path(name)
    assert path is not None
    lines = [line.message for line in logs.LogReader(path).read(ended=True)]
    assert "a raw line" in lines
    again = await moved.start("import", order(steps=2), asked("b"))
    assert metadata_of(again).cached


async def test_a_store_that_does_not_answer_holds_up_nobody_else(
    store: Store, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(store)
    await engine.recover()
    write, hangs, back = store.objects.write, asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def hang(key: str, data: bytes, *, durable: bool = True) -> None:
        if b'"RUNNING"' in data or b'"SUCCEEDED"' in data:
            loop.call_soon_threadsafe(hangs.set)
            if not back.wait(120):
                raise Unavailable("this loop was held up")
        write(key, data, durable=durable)

    monkeypatch.setattr(store.objects, "write", hang)
    name = (await engine.start("import", order(steps=2), asked("a"))).name
    await asyncio.wait_for(hangs.wait(), 120)
    assert not engine.get(name).done  # others are answered meanwhile
    assert not back.is_set()
    back.set()
    assert len(result_of(await engine.wait(name, 300)).outputs) == 2


class Line:
    """What goes to a store's bucket: held while it is cut, and none of it by the test's loop."""

    def __init__(self, store: Store) -> None:
        self.loop = threading.get_ident()
        self.by_the_loop: list[str] = []
        self.held = 0
        self.there = threading.Event()
        self.there.set()
        events = store._backend._bucket.client.meta.events  # type: ignore[attr-defined]
        events.register("before-send.s3", self.send)

    def send(self, request: Any, **_: Any) -> None:
        if threading.get_ident() == self.loop:
            self.by_the_loop.append(f"{request.method} {request.url}")
        if not self.there.is_set():
            self.held += 1
            assert self.there.wait(120)

    async def hold(self, requests: int) -> None:
        while self.held < requests:
            await asyncio.sleep(0.01)


async def test_starts_pauses_and_logs_wait_for_a_store_beside_all_else(
    store: Store,
    engines: Callable[..., Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = engines(store)
    await before.recover()
    ended = (await before.start("import", order(steps=1), asked("a"))).name
    await before.wait(ended, 300)
    await before.close()

    monkeypatch.setenv("ARRIERO_STORE_CACHE", str(tmp_path / "next"))
    store = Store.open(store.url)
    engine = engines(store)
    await engine.recover()
    line = Line(store)
    spec = order(steps=10_000, seconds=0.05)
    running = (await engine.start("import", spec, asked("b"))).name
    line.there.clear()
    calls = [
        asyncio.create_task(engine.start("import", spec, asked("c"))),
        asyncio.create_task(engine.start("import", order(steps=2), asked("d"))),
        asyncio.create_task(engine.start("import", order(steps=1), asked("e"))),
        asyncio.create_task(engine.pause(running, paused=True)),
        asyncio.create_task(engine.log_path(ended)),
    ]
    await asyncio.wait_for(line.hold(5), 120)
    assert not engine.get(running).done  # others are answered meanwhile
    assert not any(call.done() for call in calls)
    line.there.set()
    joined, fresh, cached, _, path = await asyncio.gather(*calls)
    assert metadata_of(cached).cached
    assert metadata_of(engine.get(running)).paused
    assert "a raw line" in path.read_text()
    # What was answered is in the store.
    kept = await asyncio.to_thread(lambda: Records(store, "merging").operations())
    found = {record.name: record for record in kept}
    assert found[running].paused
    assert found[joined.name].execution == found[running].execution
    assert found[cached.name].state == "SUCCEEDED"
    assert (await engine.wait(fresh.name, 300)).done
    await engine.cancel(running)
    await engine.cancel(joined.name)
    assert (await engine.wait(joined.name, 300)).done
    assert not line.by_the_loop


async def test_a_start_that_nobody_waits_for_any_more_is_whole(
    store: Store, engines: Callable[..., Engine]
) -> None:
    engine = engines(store)
    await engine.recover()
    line = Line(store)
    line.there.clear()
    starts = [
        asyncio.create_task(engine.start("import", order(steps=1), asked(name)))
        for name in ("a", "a", "b")
    ]
    await asyncio.wait_for(line.hold(2), 120)
    for start in starts[1:]:
        start.cancel()
    line.there.set()
    first = await starts[0]
    again = [await engine.start("import", order(steps=1), asked(name)) for name in ("a", "b")]
    assert again[0].name == first.name
    assert len(Records(store, "merging").executions()) == 1  # one work for both
    for operation in again:
        assert result_of(await engine.wait(operation.name, 300)).outputs


async def test_a_start_that_could_not_be_recorded_leaves_nothing_behind(
    store: Store, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = engines(store)
    await engine.recover()
    trace = tmp_path / "trace"
    spec = order(steps=10_000, seconds=0.05, trace=str(trace))
    write, leaving, go_on = store.objects.write, asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def refuse(key: str, data: bytes, *, durable: bool = True) -> None:
        if b'"cancel_requested":true' in data and not go_on.is_set():
            loop.call_soon_threadsafe(leaving.set)
            assert go_on.wait(120)
        if b'"request_id":"refused"' in data:
            raise Unavailable("the store does not answer")
        write(key, data, durable=durable)

    monkeypatch.setattr(store.objects, "write", refuse)
    with pytest.raises(Unavailable):
        await engine.start("import", spec, asked("refused"))
    assert engine.list() == ([], "")
    first = await engine.start("import", spec, asked("a"))
    await asyncio.to_thread(eventually, lambda: trace_of(trace), "the job runs")

    # Another joins while the first leaves; then it can't be written down.
    cancelling = asyncio.create_task(engine.cancel(first.name))
    await leaving.wait()
    joining = asyncio.create_task(engine.start("import", spec, asked("refused")))
    while len(engine.list()[0]) < 2:
        await asyncio.sleep(0.01)
    go_on.set()
    await cancelling
    with pytest.raises(Unavailable):
        await joining
    assert [operation.name for operation in engine.list()[0]] == [first.name]
    (execution,) = engine._executions.values()
    assert execution.task is not None
    await asyncio.wait_for(execution.task, 120)
    assert execution.record.state == "CANCELLED"


async def test_what_led_to_an_end_stays_until_the_end_is_recorded(
    store: Store, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "_STORE_SECONDS", 0.05)
    engine = engines(store)
    await engine.recover()
    write, away, cleaned = store.objects.write, threading.Event(), threading.Event()
    away.set()

    def refuse(key: str, data: bytes, *, durable: bool = True) -> None:
        if b'"SUCCEEDED"' in data and away.is_set():
            raise Unavailable("the store does not answer")
        write(key, data, durable=durable)

    def clean(_: object, record: ExecutionRecord) -> None:
        assert [found.state for found in Records(store, "merging").executions()] == [record.state]
        cleaned.set()

    monkeypatch.setattr(store.objects, "write", refuse)
    monkeypatch.setattr(staging.Staging, "clean", clean)
    name = (await engine.start("import", order(steps=2), asked("a"))).name
    assert (await engine.wait(name, 300)).done
    assert not await asyncio.to_thread(cleaned.wait, 0.3)
    away.clear()
    assert await asyncio.to_thread(cleaned.wait, 120)


async def test_an_older_record_never_replaces_a_newer_one(store: Store) -> None:
    records = Records(store, "merging")
    record = ExecutionRecord(id="e1", kind="import", result_key="k", spec={}, inputs={})
    records.save(record)
    write, first = store.objects.write, threading.Event()

    def slow(key: str, data: bytes, *, durable: bool = True) -> None:
        first.set()
        write(key, data, durable=durable)

    store.objects.write = slow  # type: ignore[method-assign]
    with records._writing:
        record.attempt = 1
        older = asyncio.create_task(records.keep(record))
        await asyncio.sleep(0)
        record.attempt = 2
        newer = asyncio.create_task(records.keep(record))
        await asyncio.sleep(0)
    await asyncio.gather(older, newer)
    assert [found.attempt for found in records.executions()] == [2]


async def test_work_waits_for_a_store_that_is_away(
    store: Store, engines: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts, "_STORE_SECONDS", 0.05)
    engine = engines(store)
    await engine.recover()
    write, refused = store.objects.write, []

    def away(key: str, data: bytes, *, durable: bool = True) -> None:
        if b'"RUNNING"' in data and len(refused) < 3:
            refused.append(key)
            raise Unavailable("the store does not answer")
        write(key, data, durable=durable)

    monkeypatch.setattr(store.objects, "write", away)
    name = (await engine.start("import", order(steps=2), asked("a"))).name
    done = await engine.wait(name, 300)
    assert len(refused) == 3
    assert len(result_of(done).outputs) == 2
    path = await engine.log_path(name)
    assert path is not None
    assert "goes on when the store does: the store does not answer" in path.read_text()
