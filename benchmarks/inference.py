"""One replica against llama-server: the same file, prompts, threads, slots and machine.

    make bench BENCH=inference            (or python benchmarks/inference.py --help)

Clients stream 64 greedy tokens each, end-of-generation ignored, and ask again until
`--requests` answers have come. Servers are measured in turns, `--repeats` times;
figures are medians. llama-server runs with whichever of its two KV settings made more
tokens in the first turn. What is missing (llama-server, llama_cpp.server) is said and
left out; `--build` compiles llama-server from the sources of the very llama.cpp that
is linked.

Keys: `serve_vs_llama_server_N` and `serve_vs_llama_cpp_server_8` are our tokens/s by
theirs with N clients; `ttft_shared_prefix` and `itl_p99` our seconds by theirs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import httpx2
from rich.console import Console
from rich.table import Table

from arriero.rpc import connect
from arriero.rpc.channel import check_health
from arriero.store import ManifestDraft, Store
from arriero.v1 import inference_pb2, inference_pb2_grpc

TOKENS = 64
CONTEXT = 512
PREFIX_CONTEXT = 1024
console = Console()


@dataclass
class Timing:
    """What clients saw."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    text: dict[str, str] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def p99(self) -> float:
        ordered = sorted(self.gaps)
        return ordered[int(0.99 * (len(ordered) - 1))] if ordered else 0.0


class Server:
    """A server process; `stream` yields text as it comes."""

    name = ""

    def __init__(self, gguf: Path, *, slots: int, context: int, threads: int) -> None:
        self.gguf, self.slots, self.context, self.threads = gguf, slots, context, threads
        self.home = Path(tempfile.mkdtemp(prefix="arriero-bench-"))
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
        store = Store.open(str(self.home / "store"))
        place = store.staging("bench", "gguf") / "out"
        place.mkdir(parents=True)
        shutil.copy(self.gguf, place / "model.gguf")
        draft = ManifestDraft(kind="gguf", name="bench")
        self.address_file = self.home / "address"
        return [sys.executable, "-m", "arriero.inference"], {
            "ARRIERO_STORE": str(self.home / "store"),
            "ARRIERO_MODEL": store.publish(place, draft).digest,
            "ARRIERO_MODEL_NAME": "bench",
            "ARRIERO_CONTEXT": str(self.context),
            "ARRIERO_SLOTS": str(self.slots),
            "ARRIERO_THREADS": str(self.threads),
            "ARRIERO_LISTEN": "127.0.0.1:0",
            "ARRIERO_ADDRESS_FILE": str(self.address_file),
        }

    def ready(self) -> bool:
        return self.address_file.exists() and check_health(self.address_file.read_text().strip())

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        channel: grpc.aio.Channel = connect(self.address_file.read_text().strip())
        yield inference_pb2_grpc.InferenceServiceStub(channel)
        await channel.close()

    async def stream(self, client: Any, prompt: str) -> AsyncIterator[str]:
        sampling = inference_pb2.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        request = inference_pb2.GenerateRequest(prompt=prompt, sampling=sampling)
        async for message in client.Generate(request):
            if message.delta:
                yield message.delta


class LlamaServer(Server):
    """llama.cpp's own server, over HTTP."""

    name = "llama-server"
    binary = Path()
    unified = False

    def command(self) -> tuple[list[str], dict[str, str]]:
        self.port = _free_port()
        return [
            str(self.binary), "-m", str(self.gguf), "-t", str(self.threads),
            "-tb", str(self.threads), "-c", str(self.context * self.slots),
            "-np", str(self.slots), "--host", "127.0.0.1", "--port", str(self.port),
            "--kv-unified" if self.unified else "--no-kv-unified",
        ], {}  # fmt: skip

    def ready(self) -> bool:
        with contextlib.suppress(httpx2.HTTPError):
            return httpx2.get(f"http://127.0.0.1:{self.port}/health").status_code == 200
        return False

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        # Kept connections are closed by llama-server just when one asks again.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx2.AsyncClient(timeout=None, limits=limits) as client:
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


class LlamaCppServer(LlamaServer):
    """The binding's own server, one request at a time."""

    name = "llama_cpp.server"
    path = "/v1/completions"

    def command(self) -> tuple[list[str], dict[str, str]]:
        self.port = _free_port()
        return [
            sys.executable, "-m", "llama_cpp.server", "--model", str(self.gguf),
            "--n_ctx", str(self.context), "--n_threads", str(self.threads),
            "--port", str(self.port), "--interrupt_requests", "False",
        ], {}  # fmt: skip

    def ready(self) -> bool:
        with contextlib.suppress(httpx2.HTTPError):
            return httpx2.get(f"http://127.0.0.1:{self.port}/v1/models").status_code == 200
        return False

    def body(self, prompt: str) -> dict[str, Any]:
        # It cannot ignore ends: the bias of EOS comes nearest.
        return {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}

    def text(self, data: dict[str, Any]) -> str:
        return str(data["choices"][0]["text"])


async def load(server: Server, prompts: Sequence[str], clients: int, requests: int) -> Timing:
    """Clients that ask again and again until all requests are answered."""
    timing = Timing()
    left = iter(prompts[-1:])  # warms everything up

    async def one(client: Any) -> None:
        for prompt in left:
            begun = last = time.perf_counter()
            parts = []
            async for text in server.stream(client, prompt):
                now = time.perf_counter()
                (timing.gaps if parts else timing.first).append(now - (last if parts else begun))
                last = now
                parts.append(text)
            timing.text[prompt] = "".join(parts)
            timing.tokens += TOKENS

    async with server.client() as client:
        await one(client)
        begun = time.perf_counter()
        left = iter(prompts[i % len(prompts)] for i in range(requests))
        timing = Timing()
        await asyncio.gather(*(one(client) for _ in range(clients)))
        timing.seconds = time.perf_counter() - begun
    return timing


def measure(
    kind: type[Server],
    args: argparse.Namespace,
    gguf: Path,
    prompts: Sequence[str],
    clients: int,
    context: int = CONTEXT,
) -> Timing:
    """One turn of one server, started fresh."""
    requests = max(args.requests, 2 * clients)
    with kind(gguf, slots=clients, context=context, threads=args.threads) as server:
        return asyncio.run(load(server, prompts, clients, requests))


def compare(
    args: argparse.Namespace,
    gguf: Path,
    prompts: Sequence[str],
    clients: int,
    peers: Sequence[type[Server]],
    context: int = CONTEXT,
) -> dict[str, list[Timing]]:
    """All servers in turns."""
    found: dict[str, list[Timing]] = {}
    for _ in range(args.repeats):
        for kind in (Ours, *peers):
            timing = measure(kind, args, gguf, prompts, clients, context)
            found.setdefault(kind.name, []).append(timing)
    return found


def choose_kv(args: argparse.Namespace, gguf: Path, prompts: Sequence[str]) -> None:
    """Give llama-server the KV setting that suits it better with 8 clients."""
    rates = {}
    for unified in (False, True):
        LlamaServer.unified = unified
        rates[unified] = measure(LlamaServer, args, gguf, prompts, 8).rate
    LlamaServer.unified = max(rates, key=lambda key: rates[key])
    console.print(f"llama-server: {rates[False]:.0f} tok/s with a KV cache per stream, "
                  f"{rates[True]:.0f} unified")  # fmt: skip


def median(timings: Sequence[Timing], what: str) -> float:
    """The median over turns of a figure; of lists their own median first."""
    values = []
    for timing in timings:
        value = getattr(timing, what)
        values.append(statistics.median(value) if isinstance(value, list) else value)
    return statistics.median(values)


class Results:
    """The table and the keys."""

    def __init__(self) -> None:
        self.ratios: dict[str, float] = {}
        self.figures: dict[str, float] = {}
        self.table = Table(
            *("file", "clients", "server", "tokens/s", "first token ms", "p99 gap ms", "same text"),
            title=f"{TOKENS} tokens each",
        )

    def add(self, name: str, clients: str, found: dict[str, list[Timing]]) -> None:
        ours = found[Ours.name][0].text
        for server, timings in found.items():
            rate, first, p99 = (median(timings, what) for what in ("rate", "first", "p99"))
            theirs = timings[0].text
            same = statistics.mean(ours[p] == theirs[p] for p in ours.keys() & theirs.keys())
            self.figures[f"{name}_{server}_{clients.replace(' ', '_')}_tokens_s"] = round(rate, 1)
            self.table.add_row(
                *(name, clients, server, f"{rate:.1f}", f"{1000 * first:.0f}"),
                *(f"{1000 * p99:.0f}", f"{same:.0%}"),
            )

    def ratio(
        self,
        key: str,
        found: dict[str, list[Timing]],
        what: str,
        peer: type[Server] = LlamaServer,
    ) -> None:
        """Ours by theirs, where they were measured."""
        if peer.name in found:
            self.ratios[key] = median(found[Ours.name], what) / median(found[peer.name], what)


def find_or_build(args: argparse.Namespace) -> Path | None:
    """llama-server: named, in the path, or compiled from the binding's own sources."""
    named = args.llama_server or shutil.which("llama-server")
    if named or not args.build:
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
        build = place / "build"
        subprocess.run(["cmake", "-S", source, "-B", build, *flags, *more], check=True)
        subprocess.run(["cmake", "--build", build, "--target", "llama-server", "-j2"], check=True)
    return binary


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


def ready_files(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    for item in args.model:
        name, _, path = item.partition("=")
        yield name, Path(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    """Measure, print the tables, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True, metavar="TYPE=FILE.gguf")
    parser.add_argument("--prompts", type=Path, help="an Alpaca JSON file")
    parser.add_argument("--llama-server", help="its binary; default: in the PATH")
    parser.add_argument("--build", action="store_true", help="compile llama-server if need be")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32])
    args = parser.parse_args()

    prompts = read_prompts(args.prompts)
    binary = find_or_build(args)
    peers: list[type[Server]] = []
    if binary is None:
        console.print("no llama-server; give --llama-server or --build to compare with it")
    else:
        LlamaServer.binary = binary
        peers.append(LlamaServer)
    binding = all(importlib.util.find_spec(n) for n in ("fastapi", "sse_starlette"))
    if not binding:
        console.print("llama_cpp.server needs llama-cpp-python[server]; left out")

    results = Results()
    for name, gguf in ready_files(args):
        if peers:
            choose_kv(args, gguf, prompts)
        for clients in args.clients:
            others = [*peers, *([LlamaCppServer] if binding and clients == 8 else [])]
            found = compare(args, gguf, prompts, clients, others)
            results.add(name, str(clients), found)
            results.ratio(f"{name}_serve_vs_llama_server_{clients}", found, "rate")
            results.ratio(f"{name}_itl_p99_{clients}", found, "p99")
            results.ratio(f"{name}_serve_vs_llama_cpp_server_8", found, "rate", LlamaCppServer)
        # About 512 tokens that all share, then a question of each one's own.
        shared = " ".join(f"Fact {i}: llama {i} carries {i + 3} bags." for i in range(42))
        asked = [f"{shared}\n{prompt}" for prompt in prompts]
        found = compare(args, gguf, asked, 8, peers, PREFIX_CONTEXT)
        results.add(name, "8, shared beginning", found)
        results.ratio(f"{name}_ttft_shared_prefix", found, "first")
    console.print(results.table)
    ratios, figures = results.ratios, results.figures
    print(
        json.dumps(
            {
                "bench": "inference",
                "ratios": {key: round(value, 3) for key, value in ratios.items()},
                "figures": figures,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, {sys.platform}",
            }
        )
    )


if __name__ == "__main__":
    main()
