"""The gateway's process, spoken to by OpenAI's own client; platform and replica are fakes
behind real gRPC.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from arriero.testing.replica import WORDS
from arriero.testing.servicers import FakePlatform, running_platform
from arriero.v1.inference_pb2 import ToolCall

ANSWER = "".join(WORDS)
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@contextlib.contextmanager
def gateway(directory: Path, platform: FakePlatform, **env: str) -> Iterator[str]:
    """A gateway in front of a platform; its address."""
    file = directory / "address"
    process = subprocess.Popen(
        [sys.executable, "-m", "arriero.gateway"],
        env={
            **os.environ,
            "ARRIERO_HOME": str(directory),
            "ARRIERO_ADDRESS": platform.address,
            "ARRIERO_LISTEN": "127.0.0.1:0",
            "ARRIERO_ADDRESS_FILE": str(file),
            **env,
        },
    )
    try:
        wait_for(lambda: file.exists() or process.poll() is not None)
        yield file.read_text().strip()
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def platform() -> Iterator[FakePlatform]:
    with running_platform() as running:
        yield running


@pytest.fixture
def address(tmp_path: Path, platform: FakePlatform) -> Iterator[str]:
    with gateway(tmp_path, platform) as found:
        yield found


@pytest.fixture
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_openais_client_lists_chats_completes_and_streams(
    client: openai.OpenAI, platform: FakePlatform
) -> None:
    assert [model.id for model in client.models.list()] == ["faq"]
    assert client.models.retrieve("faq").owned_by == "arriero"

    whole = client.chat.completions.create(model="faq", messages=HELLO, temperature=0, seed=1)
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, len(WORDS))
    sent = platform.inference.requests[-1]
    assert sent.sampling.temperature == 0
    assert sent.messages[0].content == "Hello"

    chunks = list(
        client.chat.completions.create(
            model="faq", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(WORDS)

    two = client.completions.create(model="faq", prompt=["Once", "Twice"])
    assert [choice.text for choice in two.choices] == [ANSWER, ANSWER]
    assert {r.prompt for r in platform.inference.requests[-2:]} == {"Once", "Twice"}
    parts = list(client.completions.create(model="faq", prompt=["Once", "Twice"], stream=True))
    for index in (0, 1):
        mine = [p.choices[0] for p in parts if p.choices[0].index == index]
        assert "".join(choice.text for choice in mine) == ANSWER
        assert mine[-1].finish_reason == "stop"


def test_mistakes_are_the_callers_with_the_field_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no endpoint 'other'"):
        client.chat.completions.create(model="other", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="faq", messages=HELLO, n=300)
    assert refused.value.param == "n"
    with pytest.raises(openai.NotFoundError, match="not part of this API"):
        client.images.generate(prompt="a llama")


def test_several_choices_of_one_prompt(client: openai.OpenAI, platform: FakePlatform) -> None:
    whole = client.chat.completions.create(model="faq", messages=HELLO, n=3, seed=7)
    assert [choice.message.content for choice in whole.choices] == [ANSWER] * 3
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert sorted(r.sampling.seed for r in platform.inference.requests) == [7, 8, 9]
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 3 * len(WORDS))
    parts = list(client.chat.completions.create(model="faq", messages=HELLO, n=2, stream=True))
    for index in (0, 1):
        mine = [p.choices[0] for p in parts if p.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == ANSWER
    four = client.completions.create(model="faq", prompt=["Once", "Twice"], n=2)
    assert len(four.choices) == 4
    assert four.usage is not None
    assert four.usage.prompt_tokens == 2 * 3


def test_tools_go_to_the_model_and_its_calls_come_back(
    client: openai.OpenAI, platform: FakePlatform
) -> None:
    platform.inference.words = []
    platform.inference.calls = [ToolCall(id="c1", name="weather", arguments='{"city": "Lima"}')]
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    whole = client.chat.completions.create(model="faq", messages=HELLO, tools=tools)
    message = whole.choices[0].message
    assert whole.choices[0].finish_reason == "tool_calls"
    assert message.content is None
    assert message.tool_calls is not None
    assert json.loads(platform.inference.requests[-1].tools) == tools
    platform.inference.calls.append(ToolCall(id="c2", name="weather", arguments="{}"))
    ask: Any = {"model": "faq", "messages": HELLO, "tools": tools, "parallel_tool_calls": False}
    one = client.chat.completions.create(**ask)
    assert [call.id for call in one.choices[0].message.tool_calls or ()] == ["c1"]
    streamed = [c.choices[0].delta for c in client.chat.completions.create(**ask, stream=True)]
    assert [call.id for delta in streamed for call in delta.tool_calls or ()] == ["c1"]
    platform.inference.calls.pop()
    # The conversation goes on with what the client made of that answer.
    more: Any = [
        *HELLO,
        message.model_dump(exclude_none=True),
        {"role": "tool", "content": "17 degrees", "tool_call_id": message.tool_calls[0].id},
    ]
    parts = list(
        client.chat.completions.create(model="faq", messages=more, tools=tools, stream=True)
    )
    sent = platform.inference.requests[-1].messages
    assert json.loads(sent[1].tool_calls)[0]["function"]["name"] == "weather"
    assert (sent[2].role, sent[2].tool_call_id) == ("tool", "c1")
    called = [p.choices[0].delta.tool_calls for p in parts if p.choices[0].delta.tool_calls]
    assert called[0][0].function is not None
    assert json.loads(called[0][0].function.arguments or "") == {"city": "Lima"}
    assert parts[-1].choices[0].finish_reason == "tool_calls"


def test_embeddings_as_numbers_and_packed(client: openai.OpenAI, platform: FakePlatform) -> None:
    for packed in ({}, {"encoding_format": "float"}):  # the client asks for base64 by itself
        found = client.embeddings.create(model="faq", input=["one", "three"], **packed)  # type: ignore[arg-type]
        assert [item.embedding for item in found.data] == [[3.0, 1.0], [5.0, 1.0]]
        assert [item.index for item in found.data] == [0, 1]
    assert client.embeddings.create(model="faq:poems", input="x").data[0].embedding[0] == 1
    assert platform.inference.requests[-1].adapter == "poems"
    wrong: dict[str, Any]
    for wrong in ({"input": [1, 2]}, {"input": []}, {"input": "x", "dimensions": 5}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.embeddings.create(model="faq", **wrong)
        assert refused.value.param == ("dimensions" if "dimensions" in wrong else "input")


def test_adapters_are_models_of_their_own(client: openai.OpenAI, platform: FakePlatform) -> None:
    adapters = platform.endpoints.endpoints["faq"].spec.adapters
    adapters.add(name="poems", adapter="sha256:1")
    assert [model.id for model in client.models.list()] == ["faq", "faq:poems"]
    assert client.models.retrieve("faq:poems").id == "faq:poems"
    with pytest.raises(openai.NotFoundError, match="faq:poems"):
        client.models.retrieve("faq:prose")
    chat = client.chat.completions.create(model="faq:poems", messages=HELLO)
    assert chat.model == "faq:poems"
    client.completions.create(model="faq:poems", prompt="Once")
    client.completions.create(model="faq", prompt="Once")
    assert [r.adapter for r in platform.inference.requests] == ["poems", "poems", ""]


def test_a_full_replica_is_said_with_when_to_come_again(
    client: openai.OpenAI, platform: FakePlatform
) -> None:
    platform.inference.full = True
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError, match="is full") as full:
            client.chat.completions.create(model="faq", messages=HELLO, stream=stream)
        assert int(full.value.response.headers["retry-after"]) >= 1


def test_a_replica_that_is_away_is_said_before_and_in_the_middle_of_a_stream(
    client: openai.OpenAI, platform: FakePlatform
) -> None:
    platform.inference.away = True
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as away:
            client.chat.completions.create(model="faq", messages=HELLO, stream=stream)
        assert away.value.status_code == 503
    platform.inference.away = False
    platform.inference.breaks_after = 2
    seen: list[Any] = []
    with pytest.raises(openai.APIError, match=r"broke off.*went away.*ask again"):
        seen.extend(client.chat.completions.create(model="faq", messages=HELLO, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in seen) == "".join(WORDS[:2])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(
    address: str, platform: FakePlatform, stream: bool
) -> None:
    platform.inference.hold = asyncio.Event()
    data = json.dumps({"model": "faq", "messages": HELLO, "stream": stream}).encode()
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: "
            + str(len(data)).encode() + b"\r\n\r\n" + data
        )  # fmt: skip
        wait_for(lambda: len(platform.inference.requests) == 1)
    wait_for(lambda: platform.inference.cancelled == 1)


def test_only_known_tokens_get_in_and_probes_need_none(
    tmp_path: Path, platform: FakePlatform
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("secret-token alice\n")
    with gateway(tmp_path, platform, ARRIERO_SERVER_TOKEN_FILE=str(tokens)) as address:
        url = f"http://{address}/v1"
        for key in ("wrong", "secret-token2"):
            with (
                openai.OpenAI(base_url=url, api_key=key, max_retries=0) as stranger,
                pytest.raises(openai.AuthenticationError, match="Authorization: Bearer"),
            ):
                stranger.models.list()
        with openai.OpenAI(base_url=url, api_key="secret-token") as alice:
            assert [model.id for model in alice.models.list()] == ["faq"]
        assert httpx2.get(f"http://{address}/healthz", timeout=120).text == "ok\n"


def test_a_body_that_is_too_large_is_refused_while_it_comes(
    tmp_path: Path, platform: FakePlatform
) -> None:
    with gateway(tmp_path, platform, ARRIERO_GATEWAY_MAX_BODY_BYTES="1000") as address:
        for body in (b"x" * 1001, (b"x" * 500 for _ in range(3))):
            answer = httpx2.post(f"http://{address}/v1/chat/completions", content=body, timeout=120)
            assert answer.status_code == 413
            assert "1000 bytes" in answer.json()["error"]["message"]
        with socket.create_connection(address.rsplit(":", 1), timeout=120) as connection:  # type: ignore[arg-type]
            # Nothing of it is waited for once its length is told.
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n"
            )
            assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_what_is_no_text_and_no_route_is_the_callers_mistake(address: str) -> None:
    chat = f"http://{address}/v1/chat/completions"
    half = b'{"model": "faq", "messages": [{"role": "user", "content": "\\ud83e"}]}'
    refused = httpx2.post(chat, content=half)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_argument")
    assert httpx2.get(chat).headers["allow"] == "POST"


def test_what_was_answered_is_counted(address: str, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="faq", messages=HELLO)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="faq", messages=[])
    page = httpx2.get(f"http://{address}/metrics", timeout=120).text
    route = 'route="/v1/chat/completions"'
    assert f'arriero_gateway_request_seconds_count{{{route},status="200"}} 1.0' in page
    assert f'arriero_gateway_request_seconds_count{{{route},status="400"}} 1.0' in page
    assert 'arriero_gateway_prompt_tokens_total{model_name="faq"} 3.0' in page
    assert f'arriero_gateway_generation_tokens_total{{model_name="faq"}} {len(WORDS)}.0' in page


def test_sigterm_lets_a_stream_end(tmp_path: Path, platform: FakePlatform) -> None:
    platform.inference.hold = asyncio.Event()
    with gateway(tmp_path, platform) as address:
        stopping = False
        with openai.OpenAI(base_url=f"http://{address}/v1", api_key="none") as client:
            stream = client.chat.completions.create(model="faq", messages=HELLO, stream=True)
            text = ""
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if text and not stopping:
                    stopping = True
                    pid = _pid_listening(address)
                    os.kill(pid, signal.SIGTERM)
                    hold = platform.inference.hold
                    hold._loop.call_soon_threadsafe(hold.set)  # type: ignore[attr-defined]
        assert text == ANSWER


def _pid_listening(address: str) -> int:
    import psutil

    port = int(address.rpartition(":")[2])
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any(
                c.laddr and c.laddr.port == port and c.status == psutil.CONN_LISTEN
                for c in child.net_connections()
            ):
                return child.pid
    raise AssertionError(f"nobody listens on {address}")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")
def test_a_renewed_certificate_is_shown_without_a_restart(
    tmp_path: Path, platform: FakePlatform
) -> None:
    cert, key = tmp_path / "tls.crt", tmp_path / "tls.key"

    def renew() -> str:
        kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        where = ["-keyout", "new.key", "-out", "new.crt", "-subj", "/CN=localhost"]
        command = ["openssl", "req", "-x509", *kind, *where]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        (tmp_path / "new.key").replace(key)
        (tmp_path / "new.crt").replace(cert)
        return cert.read_text()

    first = renew()
    files = {"ARRIERO_SERVER_TLS_CERT": str(cert), "ARRIERO_SERVER_TLS_KEY": str(key)}
    with gateway(tmp_path, platform, **files) as address:
        host, _, port = address.rpartition(":")

        def shown() -> str:
            return ssl.get_server_certificate((host, int(port)), timeout=120)

        assert shown() == first
        second = renew()
        wait_for(lambda: shown() == second)


def test_plain_text_beyond_this_machine_is_refused(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "arriero.gateway"],
        env={**os.environ, "ARRIERO_LISTEN": "0.0.0.0:0", "ARRIERO_ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 1
    assert "ARRIERO_SERVER_INSECURE" in ended.stderr
    assert "Traceback" not in ended.stderr
