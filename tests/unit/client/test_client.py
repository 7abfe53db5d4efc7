"""The client against a fake platform over real gRPC, asyncio and blocking."""

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from arriero import errors
from arriero.client import AsyncClient, Client, orchestrator_address, parse_pipeline
from arriero.client import aio as client_aio
from arriero.client import replicas as client_replicas
from arriero.rpc import Server, channel, parent
from arriero.settings import ClientSettings, ServerSettings
from arriero.testing.replica import FakeInference
from arriero.testing.servicers import FakePlatform
from arriero.v1 import inference_pb2_grpc, pipeline_pb2
from arriero.v1 import orchestrator_pb2 as pb

TEXT = "A driver of pack llamas."


@contextlib.asynccontextmanager
async def running(settings=None):
    platform = FakePlatform(settings)
    await platform.start()
    try:
        yield platform
    finally:
        await platform.stop()


@contextlib.asynccontextmanager
async def replica(**attributes):
    """One more replica, on a port of its own."""
    fake = FakeInference()
    for name, value in attributes.items():
        setattr(fake, name, value)
    server = Server(ServerSettings(), name="replica")
    server.add(
        fake,
        inference_pb2_grpc.add_InferenceServiceServicer_to_server,
        "arriero.v1.InferenceService",
    )
    fake.address = await server.start()
    fake.server = server
    await server.set_ready(True)
    try:
        yield fake
    finally:
        if fake.hold is not None:
            fake.hold.set()
        await server.stop(0)


def serve_at(platform, *addresses):
    platform.endpoints.addresses = list(addresses)
    spec = platform.endpoints.endpoints["faq"].spec
    spec.replicas = len(addresses)
    platform.endpoints.serve(spec)


# runs


async def test_a_request_id_is_made_so_that_each_call_is_a_run_of_its_own(pipeline_text):
    async with running() as platform, AsyncClient(platform.address) as client:
        file = parse_pipeline(pipeline_text)
        first, second = await client.create_run(file), await client.create_run(file)
        assert first.id != second.id
        again = [await client.create_run(file.pipeline, request_id="x") for _ in range(2)]
        assert again[0].id == again[1].id
        assert [run.id for run in await client.list_runs(2)] == [again[0].id, second.id]


async def test_a_refusal_by_the_server_has_line_and_column(pipeline_text):
    async with running() as platform, AsyncClient(platform.address) as client:
        file = parse_pipeline(pipeline_text.replace("r: 8", "r: 0"), source="faq.yaml")
        with pytest.raises(errors.InvalidArgument, match=r"faq\.yaml:9:15: 0 is below 1"):
            await client.create_run(file)
        with pytest.raises(errors.InvalidArgument, match=r"stages\[2\].train.lora.r"):
            await client.create_run(file.pipeline)


async def test_lists_go_on_over_pages(pipeline_text):
    async with running() as platform, AsyncClient(platform.address) as client:
        file = parse_pipeline(pipeline_text)
        ids = [(await client.create_run(file)).id for _ in range(120)]
        assert [run.id for run in await client.list_runs(limit=115)] == ids[::-1][:115]
        assert len(await client.list_runs(limit=1000)) == 120


async def test_a_watch_goes_on_after_the_platform_was_away(pipeline_text):
    async with running() as platform, AsyncClient(platform.address) as client:
        run = await client.create_run(parse_pipeline(pipeline_text))
        platform.runs.breaks = 2
        states = [update.state async for update in client.watch_run(run.id)]
        assert states == [pb.RUN_STATE_RUNNING, pb.RUN_STATE_SUCCEEDED]
        assert platform.runs.breaks == 0


async def test_a_watch_outlives_a_restart_of_the_server(pipeline_text):
    async with running() as platform, AsyncClient(platform.address) as client:
        run = await client.create_run(parse_pipeline(pipeline_text))
        platform.runs.hold = asyncio.Event()
        watch = client.watch_run(run.id)
        assert (await anext(watch)).state == pb.RUN_STATE_RUNNING
        host = platform.address
        await platform.stop()
        ended = asyncio.create_task(anext(watch))
        platform._settings = ServerSettings(listen=host)
        await platform.start()
        platform.runs.hold.set()
        assert (await asyncio.wait_for(ended, 120)).state == pb.RUN_STATE_SUCCEEDED
        await watch.aclose()


async def test_a_watch_gives_up_in_the_end(pipeline_text, monkeypatch):
    monkeypatch.setattr(client_aio, "PATIENCE_SECONDS", 0.5)
    async with running() as platform, AsyncClient(platform.address) as client:
        run = await client.create_run(parse_pipeline(pipeline_text))
        platform.runs.hold = asyncio.Event()
        watch = client.watch_run(run.id)
        await anext(watch)
        await platform.stop()
        with pytest.raises(errors.Unavailable):
            await asyncio.wait_for(anext(watch), 120)


async def test_wait_ends_with_the_run_or_with_its_deadline(pipeline_text):
    async with running() as platform, AsyncClient(platform.address) as client:
        run = await client.create_run(parse_pipeline(pipeline_text))
        platform.runs.hold = asyncio.Event()
        with pytest.raises(errors.DeadlineExceeded, match="it goes on"):
            await client.wait(run.id, timeout=0.2)
        assert (await client.cancel_run(run.id)).state == pb.RUN_STATE_CANCELLED
        platform.runs.hold.set()
        assert (await client.wait(run.id)).state == pb.RUN_STATE_CANCELLED
        assert (await client.retry_run(run.id)).state == pb.RUN_STATE_RUNNING
        with pytest.raises(errors.FailedPrecondition, match="active"):
            await client.retry_run(run.id)


async def test_what_does_not_exist_is_not_found():
    async with running() as platform, AsyncClient(platform.address) as client:
        with pytest.raises(errors.NotFound):
            await client.get_run("none")
        with pytest.raises(errors.NotFound):
            await client.wait("none")
        with pytest.raises(errors.NotFound):
            await client.artifacts.get("gguf/none:v1")
        with pytest.raises(errors.NotFound, match="known: faq"):
            await client.endpoint("none").tokenize("x")


async def test_an_absent_platform_is_unavailable_within_seconds():
    client = AsyncClient("127.0.0.1:1", ClientSettings())
    with pytest.raises(errors.Unavailable):
        await asyncio.wait_for(anext(client.watch_run("r")), 120)
    await client.close()


async def test_a_token_is_sent_everywhere(tmp_path, pipeline_text):
    (tmp_path / "tokens").write_text("aaaa1111 ana\n")
    async with running(ServerSettings(token_file=tmp_path / "tokens")) as platform:
        async with AsyncClient(platform.address, ClientSettings(token="aaaa1111")) as client:
            assert (await client.create_run(parse_pipeline(pipeline_text))).owner == "ana"
            assert await client.endpoint("faq").generate("x").text() == TEXT
        async with AsyncClient(platform.address, ClientSettings()) as client:
            with pytest.raises(errors.Unauthenticated):
                await client.list_runs()


# artifacts


async def test_files_come_back_as_they_went(tmp_path):
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / ".git").mkdir()
    (source / ".git" / "config").write_text("x")
    (source / "empty").write_bytes(b"")
    (source / "deep" / "big.bin").write_bytes(os.urandom(2_500_000))
    seen = []
    async with running() as platform, AsyncClient(platform.address) as client:
        pushed = await client.artifacts.push(
            source, kind="model", name="m", tag="model/m:v1", on_bytes=lambda *n: seen.append(n)
        )
        assert [file.path for file in pushed.files] == ["deep/big.bin", "empty"]
        assert seen[-1] == (2_500_000, 2_500_000)
        await client.artifacts.pull("model/m:v1", tmp_path / "a" / "copy")
        one = await client.artifacts.push(source / "empty", kind="gguf", name="one")
        assert [file.path for file in one.files] == ["empty"]
    copy = tmp_path / "a" / "copy"
    assert (copy / "deep" / "big.bin").read_bytes() == (source / "deep" / "big.bin").read_bytes()
    assert (copy / "empty").read_bytes() == b""


async def test_a_pull_is_all_or_nothing(tmp_path):
    async with running() as platform, AsyncClient(platform.address) as client:
        goal = tmp_path / "goal"
        platform.artifacts.corrupt = True
        with pytest.raises(errors.DataLoss, match="sha256"):
            await client.artifacts.pull("gguf/faq:prod", goal)
        assert list(tmp_path.iterdir()) == []
        platform.artifacts.corrupt = False
        await client.artifacts.pull("gguf/faq:prod", goal)
        with pytest.raises(errors.FailedPrecondition, match="has something in it"):
            await client.artifacts.pull("gguf/faq:prod", goal)


async def test_a_directory_that_is_there_stays_the_same_one(tmp_path):
    async with running() as platform, AsyncClient(platform.address) as client:
        goal, link = tmp_path / "goal", tmp_path / "link"
        goal.mkdir()
        link.symlink_to(goal)
        before = goal.stat().st_ino  # a mount, or where somebody's shell is
        await client.artifacts.pull("gguf/faq:prod", link)
        assert goal.stat().st_ino == before
        assert [path.suffix for path in goal.iterdir()] == [".gguf"]


@pytest.mark.parametrize("there", [False, True])
async def test_leftovers_of_a_killed_pull_are_removed_but_not_those_of_one_that_runs(
    tmp_path, there
):
    goal = tmp_path / "goal"
    if there:
        goal.mkdir()
    # The kernel lets go of a dead process's lock.
    left = (goal if there else tmp_path) / ".goal.0badf00d.pull"
    left.mkdir()
    (left / "half").write_bytes(b"x")
    async with running() as platform, AsyncClient(platform.address) as client:
        lock = os.open(left, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(errors.FailedPrecondition, match="another pull is filling"):
            await client.artifacts.pull("gguf/faq:prod", goal)
        os.close(lock)
        await client.artifacts.pull("gguf/faq:prod", goal)
        assert not left.exists()
        assert [path.suffix for path in goal.iterdir()] == [".gguf"]


async def test_what_this_machine_refuses_is_said_in_words(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    async with running() as platform, AsyncClient(platform.address) as client:
        with pytest.raises(errors.FailedPrecondition, match="is a file"):
            await client.artifacts.pull("gguf/faq:prod", tmp_path / "file")
        with pytest.raises(errors.FailedPrecondition, match="can't be filled"):
            await client.artifacts.pull("gguf/faq:prod", tmp_path / "file" / "goal")
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1))
        with pytest.raises(errors.DiskFull, match=r"bytes are needed in .*, 1 are free"):
            await client.artifacts.pull("gguf/faq:prod", tmp_path / "goal")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


async def test_verifying_tells_what_differs():
    seen: list[tuple[int, int]] = []
    async with running() as platform, AsyncClient(platform.address) as client:
        platform.artifacts.put("model", "m", {"a": b"abc"}, tag="model/m:v1")
        on_bytes = lambda *n: seen.append(n)  # noqa: E731
        assert await client.artifacts.verify("model/m:v1", on_bytes=on_bytes) == []
        assert seen == [(0, 3), (3, 3)]
        platform.artifacts.corrupt = True
        assert await client.artifacts.verify("model/m:v1") == ["a has another sha256"]


async def test_a_server_cannot_write_outside_of_the_directory(tmp_path):
    async with running() as platform, AsyncClient(platform.address) as client:
        for bad in ("../evil", "/tmp/evil", "a/../../evil"):
            platform.artifacts.put("model", "bad", {bad: b"x"}, tag="model/bad:v1")
            with pytest.raises(errors.DataLoss, match="none of the artifact's"):
                await client.artifacts.pull("model/bad:v1", tmp_path / "goal")
        assert list(tmp_path.iterdir()) == []


async def test_a_push_of_nothing_or_of_the_wrong_kind_is_refused(tmp_path):
    async with running() as platform, AsyncClient(platform.address) as client:
        with pytest.raises(errors.NotFound):
            await client.artifacts.push(tmp_path / "none", kind="model", name="m")
        with pytest.raises(errors.InvalidArgument, match="no files"):
            await client.artifacts.push(tmp_path, kind="model", name="m")
        (tmp_path / "x").write_text("x")
        with pytest.raises(errors.InvalidArgument, match="cannot be pushed"):
            await client.artifacts.push(tmp_path, kind="checkpoint", name="m")


async def test_tags_lineage_and_garbage():
    async with running() as platform, AsyncClient(platform.address) as client:
        base = platform.artifacts.put("model", "base", {"a": b"1"})
        child = platform.artifacts.put("model", "child", {"a": b"2"}, parents=[base])
        lineage = await client.artifacts.lineage(child)
        assert [artifact.name for artifact in lineage] == ["child", "base"]
        assert await client.artifacts.tag(child, "model/c:v1", expected="none") == child
        with pytest.raises(errors.Aborted):
            await client.artifacts.tag(base, "model/c:v1", expected="none")
        assert [tag.tag for tag in await client.artifacts.tags("model")] == ["model/c:v1"]
        assert [a.name for a in await client.artifacts.list("model")] == ["child", "base"]
        before = await client.artifacts.gc(dry_run=True)
        assert before.freed_bytes == 3
        assert await client.artifacts.gc() == before
        assert [a.name for a in await client.artifacts.list("model")] == ["child"]


# endpoints and text


async def test_endpoints_are_made_changed_and_deleted():
    async with running() as platform, AsyncClient(platform.address) as client:
        made = await client.endpoints.create("new", "gguf/faq:prod", context=64)
        assert (made.name, made.spec.context, made.ready_replicas) == ("new", 64, 1)
        long = await client.endpoints.create("long", "gguf/faq:prod", rope="ntk")
        same = await client.endpoints.create("same", "gguf/faq:prod", rope={"type": "ntk"})
        assert long.spec.rope == same.spec.rope == pipeline_pb2.RopeSpec(type="ntk")
        with pytest.raises(errors.AlreadyExists):
            await client.endpoints.create("new", "gguf/faq:prod")
        assert (await client.endpoints.update("new", "x", replicas=2)).desired_replicas == 2
        scored = await client.endpoints.get("new", score=True)
        assert scored.replicas[0].kl_divergence == 0.01
        await client.endpoints.delete("new")
        with pytest.raises(errors.NotFound):
            await client.endpoints.delete("new")
        await client.endpoints.delete("new", allow_missing=True)


async def test_text_streams_with_its_end():
    async with running() as platform, AsyncClient(platform.address) as client:
        faq = client.endpoint("faq")
        answer = faq.chat("Who?", temperature=0, max_tokens=9, stop=["x"], seed=0)
        assert [delta async for delta in answer] == platform.inference.words
        assert (answer.finish_reason, answer.usage.completion_tokens) == ("stop", 5)
        assert answer.replica == platform.address
        request = platform.inference.requests[-1]
        assert [(m.role, m.content) for m in request.messages] == [("user", "Who?")]
        assert request.sampling.HasField("temperature")
        assert request.sampling.HasField("seed")
        assert not request.sampling.HasField("top_k")
        assert list(request.sampling.stop) == ["x"]
        assert (await faq.score()).tokens == 256
        assert platform.inference.requests[-1].golden.startswith("sha256:")
        assert (await faq.model()).quant_type == "Q8_0"


async def test_wrong_messages_and_parameters_are_named_before_anything_is_sent():
    async with running() as platform, AsyncClient(platform.address) as client:
        faq = client.endpoint("faq")
        with pytest.raises(errors.InvalidArgument, match=r"messages\[1\]"):
            faq.chat([{"role": "user", "content": "a"}, {"role": "user"}])
        for wrong in ({"heat": 1}, {"top_k": "many"}, {"seed": -1}):
            with pytest.raises(errors.InvalidArgument, match="sampling"):
                faq.generate("x", **wrong)
        assert platform.inference.requests == []


async def test_closing_a_stream_frees_the_replica():
    async with running() as platform, AsyncClient(platform.address) as client:
        platform.inference.hold = asyncio.Event()
        stream = client.endpoint("faq").generate("x")
        assert await anext(stream) == "A "
        await stream.aclose()
        async with asyncio.timeout(300):
            while not platform.inference.cancelled:
                await asyncio.sleep(0.01)


async def test_requests_go_to_the_replica_with_fewest_in_flight():
    async with (
        running() as platform,
        replica(hold=asyncio.Event()) as a,
        replica(hold=asyncio.Event()) as b,
        AsyncClient(platform.address) as client,
    ):
        serve_at(platform, a.address, b.address)
        faq = client.endpoint("faq")
        streams = [faq.generate("x") for _ in range(4)]
        for stream in streams:
            await anext(stream)
        assert (len(a.requests), len(b.requests)) == (2, 2)
        at_a = [stream for stream in streams if stream.replica == a.address]
        for stream in at_a:
            await stream.aclose()
        more = [faq.generate("x") for _ in range(2)]
        for stream in more:
            await anext(stream)
        assert {stream.replica for stream in more} == {a.address}
        for stream in [*streams, *more]:
            await stream.aclose()


async def test_a_request_moves_on_before_the_first_token():
    async with (
        running() as platform,
        replica(away=True) as a,
        replica() as b,
        AsyncClient(platform.address) as client,
    ):
        serve_at(platform, "127.0.0.1:1", a.address, b.address)
        faq = client.endpoint("faq")
        for _ in range(3):
            stream = faq.generate("x")
            assert await stream.text() == TEXT
            assert stream.replica == b.address
        assert await faq.tokenize("two words") == [1, 3, 5]
        assert await faq.detokenize([3, 5]) == "lll lllll"
        # Those that did not answer are asked last from then on.
        assert len(a.requests) <= 1


@contextlib.asynccontextmanager
async def road_to(address):
    """A way to an address that can be closed without a word: `(address, close)`."""
    closed = False
    host, port = address.rsplit(":", 1)

    async def pump(reader, writer):
        while data := await reader.read(65536):
            if closed:
                await asyncio.Event().wait()
            writer.write(data)

    async def connect(reader, writer):
        onwards = await asyncio.open_connection(host, port)
        tasks = [asyncio.create_task(pump(reader, onwards[1])),
                 asyncio.create_task(pump(onwards[0], writer))]  # fmt: skip
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            onwards[1].close()
            writer.close()

    def close():
        nonlocal closed
        closed = True

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", close
    finally:
        server.close()


async def test_a_replica_that_hangs_is_given_up_for_another_one(monkeypatch):
    soon = {
        "grpc.keepalive_time_ms": 1000,
        "grpc.keepalive_timeout_ms": 2000,
        "grpc.http2.ping_timeout_ms": 2000,
    }
    options = [(name, soon.get(name, value)) for name, value in channel._OPTIONS]
    monkeypatch.setattr(channel, "_OPTIONS", options)
    async with (
        running() as platform,
        replica() as a,
        road_to(a.address) as (address, close),
        AsyncClient(platform.address) as client,
    ):
        serve_at(platform, address)
        faq = client.endpoint("faq")
        assert await faq.generate("x").text() == TEXT
        close()
        async with replica() as b:
            stream = faq.generate("x", timeout=40)
            answer = asyncio.create_task(stream.text())
            await asyncio.sleep(0)  # it is on its way to the first one
            serve_at(platform, address, b.address)
            assert await answer == TEXT
            assert stream.replica == b.address


async def test_text_that_is_none_is_refused_by_name():
    async with AsyncClient("127.0.0.1:1") as client:
        faq = client.endpoint("faq")
        with pytest.raises(errors.InvalidArgument, match="surrogates"):
            faq.generate("\udcff")
        with pytest.raises(errors.InvalidArgument, match=r"messages\[0\]"):
            faq.chat([{"role": "user", "content": "\udcff"}])
        with pytest.raises(errors.InvalidArgument, match="surrogates"):
            await faq.tokenize("\udcff")


async def test_a_full_replica_is_passed_over_and_told_of_when_all_are_full():
    async with (
        running() as platform,
        replica(full=True) as a,
        replica() as b,
        AsyncClient(platform.address) as client,
    ):
        serve_at(platform, a.address, b.address)
        faq = client.endpoint("faq")
        for _ in range(3):
            assert await faq.generate("x").text() == TEXT
        b.full = True
        with pytest.raises(errors.ResourceExhausted, match="is full"):
            await faq.generate("x").text()


async def test_a_replica_that_says_it_is_not_well_is_asked_last():
    async with (
        running() as platform,
        replica() as a,
        replica() as b,
        AsyncClient(platform.address) as client,
    ):
        serve_at(platform, a.address, b.address)
        faq = client.endpoint("faq")
        assert await faq.generate("x").text() == TEXT
        known = faq._replicas._replicas

        async def says(well):
            await a.server.set_ready(well)
            async with asyncio.timeout(300):
                while known[a.address].well is not well:
                    await asyncio.sleep(0.01)

        await says(False)
        asked = len(a.requests)
        for _ in range(3):
            assert await faq.generate("x").text() == TEXT
        assert len(a.requests) == asked
        await says(True)
        assert {(await _answered(faq)).replica for _ in range(2)} == {a.address, b.address}


async def _answered(endpoint):
    stream = endpoint.generate("x")
    await stream.text()
    return stream


async def test_half_an_answer_is_not_taken_back():
    async with (
        running() as platform,
        replica(breaks_after=2) as a,
        AsyncClient(platform.address) as client,
    ):
        serve_at(platform, a.address)
        seen = []
        stream = client.endpoint("faq").generate("x")
        with pytest.raises(errors.Unavailable, match="went away"):
            await _collect(stream, seen)
        assert seen == ["A ", "driver "]
        assert len(a.requests) == 1


async def _collect(stream, seen):
    async for delta in stream:
        seen.append(delta)


async def test_without_a_ready_replica_the_figures_are_told():
    async with running() as platform, AsyncClient(platform.address) as client:
        serve_at(platform)
        platform.endpoints.endpoints["faq"].desired_replicas = 2
        with pytest.raises(errors.Unavailable, match="0 of 2 are ready") as caught:
            await client.endpoint("faq").generate("x").text()
        assert caught.value.reason == "NO_READY_REPLICA"


async def test_replicas_are_looked_up_again_and_old_ones_forgotten(monkeypatch):
    monkeypatch.setattr(client_replicas, "REFRESH_SECONDS", 0.0)
    async with (
        running() as platform,
        replica() as a,
        replica() as b,
        AsyncClient(platform.address) as client,
    ):
        serve_at(platform, a.address)
        faq = client.endpoint("faq")
        assert await faq.generate("x").text() == TEXT
        serve_at(platform, b.address)
        await faq._replicas.refresh()
        assert await faq.generate("x").text() == TEXT
        assert (len(a.requests), len(b.requests)) == (1, 1)


async def test_known_replicas_serve_while_the_orchestrator_is_away(monkeypatch):
    monkeypatch.setattr(client_replicas, "REFRESH_SECONDS", 0.0)
    async with (
        running() as platform,
        replica() as a,
        AsyncClient(platform.address) as client,
    ):
        serve_at(platform, a.address)
        faq = client.endpoint("faq")
        assert await faq.generate("x").text() == TEXT
        platform.endpoints.away = True
        await faq._replicas.refresh()
        assert await faq.generate("x").text() == TEXT
        platform.endpoints.away = False
        platform.endpoints.endpoints.clear()
        await faq._replicas.refresh()
        with pytest.raises(errors.NotFound):
            await faq.generate("x").text()


# the blocking face


def test_the_blocking_client_may_be_shared_between_threads(platform):
    with Client() as client:
        faq = client.endpoint("faq")
        texts: list[str] = []
        threads = [
            threading.Thread(target=lambda: texts.append(faq.generate("x").text()))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert texts == [TEXT] * 8


def test_leaving_a_blocking_stream_or_watch_early_ends_it(platform, pipeline_text):
    platform.inference.hold = platform.runs.hold = asyncio.Event()
    with Client() as client:
        with client.endpoint("faq").chat("x") as stream:
            assert next(stream) == "A "
        run = client.create_run(parse_pipeline(pipeline_text))
        for update in client.watch_run(run.id):
            assert update.state == pb.RUN_STATE_RUNNING
            break


@pytest.fixture
def interruptible():
    """Shells start background jobs with SIGINT ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_ends_a_blocked_call_and_the_client_goes_on(
    platform, pipeline_text, interruptible
):
    platform.runs.hold = asyncio.Event()
    with Client() as client:
        run = client.create_run(parse_pipeline(pipeline_text))
        timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])

        def blocked():
            timer.start()  # in here: it may come early where little runs
            client.wait(run.id)

        with pytest.raises(KeyboardInterrupt):
            blocked()
        timer.join()
        assert client.get_run(run.id).state == pb.RUN_STATE_RUNNING


def test_a_closed_client_says_so(platform):
    client = Client()
    client.list_runs()
    client.close()
    client.close()
    with pytest.raises(errors.FailedPrecondition, match="closed"):
        client.list_runs()


def test_closing_a_client_ends_what_other_threads_wait_for(platform, pipeline_text):
    platform.runs.hold = asyncio.Event()
    client = Client()
    run = client.create_run(parse_pipeline(pipeline_text))
    first, seen = threading.Event(), []

    def watch():
        try:
            for _ in client.watch_run(run.id):
                first.set()
        except errors.ArrieroError as error:
            seen.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    assert first.wait(120)
    client.close()
    thread.join(120)
    assert not thread.is_alive()
    assert isinstance(seen[0], errors.Cancelled)


async def test_an_asyncio_client_stays_in_its_loop(platform):
    client = AsyncClient()
    await client.list_runs()
    with pytest.raises(errors.FailedPrecondition, match="event loop"):
        await asyncio.to_thread(lambda: asyncio.run(client.list_runs()))
    await client.close()


# where the platform is


def test_the_address_comes_from_the_environment_or_from_what_runs_here(tmp_path):
    env = {"ARRIERO_HOME": str(tmp_path)}
    with pytest.raises(errors.FailedPrecondition, match="arriero up"):
        orchestrator_address(env)
    state = {"address": "127.0.0.1:7000", "pid": os.getpid()}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert orchestrator_address(env) == "127.0.0.1:7000"
    state["start"] = parent.process_start(os.getpid())
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert orchestrator_address(env) == "127.0.0.1:7000"
    assert orchestrator_address({**env, "ARRIERO_ADDRESS": "x:1"}) == "x:1"


def test_what_a_dead_platform_left_behind_is_not_taken(tmp_path):
    env = {"ARRIERO_HOME": str(tmp_path)}
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for text in (
        json.dumps({"address": "127.0.0.1:7000", "pid": dead.pid}),
        json.dumps({"address": "127.0.0.1:7000", "pid": os.getpid(), "start": "1"}),
        "{",
        "[]",
        "{}",
    ):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(errors.FailedPrecondition, match="arriero up"):
            orchestrator_address(env)
