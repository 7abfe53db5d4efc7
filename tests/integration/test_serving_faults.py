"""What a replica makes of bad input, bad clients and bad luck: nothing is lost, nobody else
notices.
"""

import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from arriero.rpc import from_rpc_error
from arriero.store import Store
from arriero.testing.serving import Running, publish, start, wait_until
from arriero.v1 import inference_pb2 as pb
from arriero.v1.inference_pb2_grpc import InferenceServiceStub

LONG = 2048
# Does something else for each first message: what a file from anywhere may bring.
HOSTILE = """
{%- set word = messages[0].content %}
{%- if word == 'reach' %}{{ ''.__class__.__mro__[1].__subclasses__() }}
{%- elif word == 'globals' %}{{ cycler.__init__.__globals__.os.popen('id').read() }}
{%- elif word == 'import' %}{% import 'secrets' as x %}
{%- elif word == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}
{%- elif word == 'grow' %}{{ 'x' * 999999999 }}
{%- elif word == 'tools' %}{{ tools | tojson }}
{%- else %}{{ messages | map(attribute='content') | join(' ') }}{% endif %}
"""  # noqa: E501


@pytest.fixture(scope="module")
def hostile_gguf(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with that template."""
    sources = Path(
        os.environ.get("ARRIERO_LLAMA_CPP") or Path(sys.prefix) / "share/arriero/llama.cpp"
    )
    target = tmp_path_factory.mktemp("hostile") / "tiny.F16.gguf"
    subprocess.run(
        [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--force"]
        + ["--chat-template", HOSTILE, str(tiny_gguf), str(target)],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(sources / "gguf-py")},
    )
    return target


@pytest.fixture(scope="module")
def replica(hostile_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("replica")
    running = start(home, hostile_gguf, ARRIERO_CONTEXT=str(LONG), ARRIERO_QUEUE="16")
    yield running
    running.end()


def greedy(max_tokens: int = 12, **more: Any) -> pb.SamplingParams:
    return pb.SamplingParams(temperature=0, max_tokens=max_tokens, **more)


def endless(**more: Any) -> pb.SamplingParams:
    return greedy(LONG, ignore_eos=True, **more)


def deltas(replica: Running, sampling: pb.SamplingParams, prompt: str = "Say") -> list[str]:
    request = pb.GenerateRequest(prompt=prompt, sampling=sampling)
    return [message.delta for message in replica.stub.Generate(request)]


@asynccontextmanager
async def stub_of(replica: Running) -> AsyncIterator[InferenceServiceStub]:
    """A client with a connection of its own."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(replica.address, options=options) as channel:
        yield InferenceServiceStub(channel)


def refused(replica: Running, request: pb.GenerateRequest | pb.ChatRequest, **how: Any) -> Any:
    call = replica.stub.Chat if isinstance(request, pb.ChatRequest) else replica.stub.Generate
    with pytest.raises(grpc.RpcError) as caught:
        list(call(request, **how))  # type: ignore[arg-type]
    assert "Traceback" not in str(caught.value)
    return from_rpc_error(caught.value)


def is_idle(replica: Running) -> bool:
    """Whether no request runs or waits, and no KV cache is held for one."""
    load = replica.metrics()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return all(load[f"arriero_{name}"] == 0 for name in names)


# Bad input


@pytest.mark.parametrize(
    "name",
    [
        field.name
        for field in pb.SamplingParams.DESCRIPTOR.fields
        if field.type == field.TYPE_DOUBLE
    ],
)
def test_numbers_that_are_none_are_refused_by_name(replica: Running, name: str) -> None:
    for value in (math.nan, math.inf, -math.inf):
        request = pb.GenerateRequest(
            prompt="a", sampling=pb.SamplingParams(max_tokens=1, **{name: value})
        )
        error = refused(replica, request)
        assert error.code == "INVALID_ARGUMENT"
        assert error.violations[0].field == f"sampling.{name}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("temperature", -1.0),
        ("mirostat", 3),
        ("max_tokens", -1),
        ("logprobs", 21),
        ("grammar", "root ::= ("),
        ("grammar", "root ::= nowhere"),
        ("grammar", "nothing"),
        ("json_schema", "{"),
        ("json_schema", '{"type": "impossible"}'),
    ],
)
def test_values_out_of_range_are_refused_by_name(replica: Running, name: str, value: Any) -> None:
    sampling = pb.SamplingParams(**{name: value})
    error = refused(replica, pb.GenerateRequest(prompt="a", sampling=sampling))
    assert error.code == "INVALID_ARGUMENT"
    assert error.violations[0].field == f"sampling.{name}"


def test_a_grammar_with_a_dead_end_stops_its_own_stream_alone(replica: Running) -> None:
    engine = replica.engine().pid
    other = replica.stub.Generate(pb.GenerateRequest(prompt="Other", sampling=endless()))
    next(other)
    sampling = greedy(20, grammar='root ::= "llama" [^\\x00-\\UFFFFFFFF] "x"')
    error = refused(replica, pb.GenerateRequest(prompt="Say", sampling=sampling))
    assert error.code == "INVALID_ARGUMENT"
    assert error.violations[0].field == "sampling.grammar"
    *_, last = other
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert replica.engine().pid == engine


def test_a_prompt_longer_than_the_context_is_told_both_figures(replica: Running) -> None:
    error = refused(replica, pb.GenerateRequest(prompt="word " * 3000))
    assert error.code == "INVALID_ARGUMENT"
    assert f"holds {LONG}" in error.message


def test_no_tokens_and_more_tokens_than_there_are_numbers(replica: Running) -> None:
    assert deltas(replica, greedy(0)) == [""]
    *_, last = replica.stub.Generate(
        pb.GenerateRequest(prompt="Say", sampling=greedy(2**31 - 1, ignore_eos=True))
    )
    assert last.finish_reason == pb.FINISH_REASON_LENGTH
    assert last.usage.prompt_tokens + last.usage.completion_tokens == LONG


def test_characters_that_come_in_several_tokens_are_streamed_whole(replica: Running) -> None:
    text = "🦙 和羊驼 naïve 👩‍🌾!"
    asked = replica.stub.Tokenize(pb.TokenizeRequest(text=text))
    assert len(asked.tokens) > 1.5 * len(text)  # byte by byte
    parts = deltas(replica, greedy(200, grammar=f'root ::= "{text}"'))
    assert "".join(parts) == text
    assert len(parts) > 8
    assert "\ufffd" not in "".join(parts)


def test_bytes_that_are_no_text_are_shown_as_such(replica: Running) -> None:
    tokens = replica.stub.Tokenize(pb.TokenizeRequest(text="🦙")).tokens
    begun = tokens[-2]  # a continuation byte, and nothing that it continues
    parts = deltas(replica, greedy(5, logit_bias={begun: 1e6}, ignore_eos=True))
    assert "".join(parts) == "\ufffd" * 5


def test_a_stop_string_over_several_tokens_is_never_shown(replica: Running) -> None:
    text, stop = "llamas: xqzjwkvq and more", "qzjwkv"
    assert len(replica.stub.Tokenize(pb.TokenizeRequest(text=stop)).tokens) >= 3
    parts = deltas(replica, greedy(99, grammar=f'root ::= "{text}"', stop=[stop]))
    assert "".join(parts) == "llamas: x"
    # What only begins like it is shown.
    parts = deltas(replica, greedy(99, grammar='root ::= "a qzjw b"', stop=[stop]))
    assert "".join(parts) == "a qzjw b"


# Templates


@pytest.mark.parametrize("word", ["reach", "globals", "import", "grow", "loop"])
def test_a_hostile_template_reaches_nothing_and_stops_nobody(replica: Running, word: str) -> None:
    request = pb.ChatRequest(messages=[pb.Message(role="user", content=word)], sampling=greedy(3))
    stream = replica.stub.Chat(request)
    # Others are served meanwhile.
    assert deltas(replica, greedy(3))
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    error = from_rpc_error(caught.value)
    assert error.code == "INVALID_ARGUMENT"
    assert error.violations[0].field == "template"  # type: ignore[attr-defined]
    assert "uid=" not in error.message


def test_tools_reach_the_template_and_calls_come_back_apart_from_the_text(
    replica: Running,
) -> None:
    tool = {"type": "function", "function": {"name": "weather"}}
    said = '<tool_call>{\\"name\\": \\"weather\\", \\"arguments\\": {\\"city\\": \\"Lima\\"}}'
    request = pb.ChatRequest(
        messages=[pb.Message(role="user", content="tools")],
        tools=json.dumps([tool]),
        sampling=greedy(200, grammar=f'root ::= "Look: {said}</tool_call>"'),
    )
    messages = list(replica.stub.Chat(request))
    assert "".join(message.delta for message in messages) == "Look: "
    assert messages[-1].finish_reason == pb.FINISH_REASON_TOOL_CALLS
    (call,) = messages[-1].tool_calls
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Lima"})
    # The prompt was longer by the tools.
    request.sampling.max_tokens = 1
    with_tools = [*replica.stub.Chat(request)][-1].usage.prompt_tokens
    request.ClearField("tools")
    assert with_tools > [*replica.stub.Chat(request)][-1].usage.prompt_tokens + 20


# Clients


async def test_a_thousand_clients_at_once_are_served_or_told_to_come_again(
    replica: Running,
) -> None:
    engine = replica.engine().pid

    async def ask(number: int) -> int:
        async with stub_of(replica) as stub:
            request = pb.GenerateRequest(prompt=f"Client {number}", sampling=greedy(8))
            # However long a connection takes: this is about what a replica answers.
            call = stub.Generate(request, timeout=400, wait_for_ready=True)
            *_, last = [message async for message in call]
            return last.usage.completion_tokens

    outcomes = await asyncio.gather(*(ask(i) for i in range(1000)), return_exceptions=True)
    served = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert len(served) >= 16 + 4
    assert 0 not in served
    refusals = [outcome for outcome in outcomes if not isinstance(outcome, int)]
    assert refusals
    for error in refusals:
        assert isinstance(error, grpc.aio.AioRpcError)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "wait for a slot already" in (error.details() or "")
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        assert status is not None
        assert any(d.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for d in status.details)
    await asyncio.to_thread(wait_until, lambda: is_idle(replica))
    assert replica.engine().pid == engine


async def test_five_hundred_clients_that_vanish_leave_every_slot_and_cache_free(
    replica: Running,
) -> None:
    before = deltas(replica, greedy(20), "The same as before")

    async def vanish(number: int, room: asyncio.Semaphore) -> None:
        async with room, stub_of(replica) as stub:
            request = pb.GenerateRequest(prompt=f"Vanish {number}", sampling=endless())
            call = stub.Generate(request)
            if number % 5:  # the others leave while they wait for a slot, or on their way there
                await call.read()
            else:
                await asyncio.sleep(0)
            if number % 2:
                call.cancel()
            # Else the connection is closed under it.

    room = asyncio.Semaphore(12)
    await asyncio.gather(*(vanish(i, room) for i in range(500)))
    await asyncio.to_thread(wait_until, lambda: is_idle(replica))

    def ask() -> list[str]:
        return deltas(replica, greedy(20), "The same as before")

    asked = [asyncio.to_thread(ask) for _ in range(4)]
    for found in await asyncio.gather(*asked):
        assert "".join(found) == "".join(before)


async def test_a_reader_that_does_not_read_holds_nobody_up_and_loses_nothing(
    replica: Running,
) -> None:
    async with stub_of(replica) as slow, stub_of(replica) as other:
        # About a kilobyte a token: far more than connections buffer.
        request = pb.GenerateRequest(prompt="Slow", sampling=endless(logprobs=20))
        stream = slow.Generate(request)
        messages = aiter(stream)
        told = len((await anext(messages)).logprobs)
        size = 0
        for number in range(8):
            short = pb.GenerateRequest(prompt=f"Quick {number}", sampling=greedy(8))
            assert [message async for message in other.Generate(short, timeout=120)]
        await asyncio.to_thread(
            wait_until, lambda: replica.metrics()["arriero_num_requests_running"] == 0
        )
        async for message in messages:
            told += len(message.logprobs)
            size += message.ByteSize()
        assert told == message.usage.completion_tokens > LONG - 10
        assert size > 500_000


# Time


async def test_a_deadline_ends_a_request_that_waits_and_one_that_runs(
    hostile_gguf: Path, tmp_path: Path
) -> None:
    replica = start(tmp_path, hostile_gguf, ARRIERO_CONTEXT=str(8 * LONG), ARRIERO_SLOTS="1")
    try:
        async with stub_of(replica) as stub:
            forever = pb.SamplingParams(temperature=0, ignore_eos=True)
            runs = stub.Generate(pb.GenerateRequest(prompt="Runs", sampling=forever))
            await anext(aiter(runs))
            waits = stub.Generate(
                pb.GenerateRequest(prompt="Waits", sampling=greedy(3)), timeout=0.3
            )
            with pytest.raises(grpc.aio.AioRpcError) as late:
                [message async for message in waits]
            assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await asyncio.to_thread(
                wait_until, lambda: replica.metrics()["arriero_num_requests_waiting"] == 0
            )
            runs.cancel()
            await asyncio.to_thread(wait_until, lambda: is_idle(replica))

            told = 0
            for seconds in (1, 4, 16, 64):  # long enough for a token on any machine
                runs = stub.Generate(
                    pb.GenerateRequest(prompt="Runs", sampling=forever), timeout=seconds
                )
                messages = aiter(runs)
                with contextlib.suppress(grpc.aio.AioRpcError):
                    while await anext(messages):
                        told += 1
                assert await runs.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                await asyncio.to_thread(wait_until, lambda: is_idle(replica))
                if told:
                    break
            assert told
    finally:
        replica.end()


async def test_sigterm_under_load_cuts_nobody_off(hostile_gguf: Path, tmp_path: Path) -> None:
    replica = start(tmp_path, hostile_gguf, ARRIERO_CONTEXT=str(LONG))
    try:
        async with stub_of(replica) as stub:

            async def ask(number: int) -> pb.GenerateResponse:
                request = pb.GenerateRequest(
                    prompt=f"To the end {number}", sampling=greedy(300, ignore_eos=True)
                )
                *_, last = [message async for message in stub.Generate(request)]
                return last

            # More than there are slots: some of them still wait.
            asked = [asyncio.create_task(ask(number)) for number in range(12)]

            def all_came() -> bool:
                load = replica.metrics()
                left = load.get("arriero_e2e_request_latency_seconds_count", 0)
                here = load["arriero_num_requests_running"] + load["arriero_num_requests_waiting"]
                return here + left == 12

            await asyncio.to_thread(wait_until, all_came)
            replica.process.terminate()
            for last in await asyncio.gather(*asked):
                assert last.finish_reason == pb.FINISH_REASON_LENGTH
                assert last.usage.completion_tokens == 300
        assert await asyncio.to_thread(replica.process.wait, 120) == 0
    finally:
        replica.end()


# Files


@pytest.mark.parametrize("share", [0.3, 0.999])
def test_a_file_that_was_cut_off_ends_the_replica_with_one_line(
    tiny_gguf: Path, tmp_path: Path, share: float
) -> None:
    cut = tmp_path / "cut.gguf"
    data = tiny_gguf.read_bytes()
    cut.write_bytes(data[: int(share * len(data))])
    digest = publish(Store.open(tmp_path / "store"), cut)
    done = subprocess.run(
        [sys.executable, "-m", "arriero.inference"],
        env={**os.environ, "ARRIERO_STORE": str(tmp_path / "store"), "ARRIERO_MODEL": digest},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "tiny.F16.gguf" in done.stderr
