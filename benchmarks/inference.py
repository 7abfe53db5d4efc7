"""One replica against llama-server: the same file, prompts, threads, slots and machine.

    make bench BENCH=inference ARGS="--model Q8_0=FILE.gguf [--prompts alpaca.json]"

Clients stream 64 greedy tokens each, end-of-generation ignored, and ask again until
`--requests` answers have come. Servers are measured in turns, `--repeats` times;
figures are medians. llama-server runs with whichever of its two KV settings makes more
tokens under the same load. llama_cpp.server cannot ignore ends of generation: a bias of
-100 keeps it from them, so that it makes as many tokens as the others. What is missing
of the two is said and left out; `--build` compiles llama-server from the sources of the
very llama.cpp that is linked, and installs what llama_cpp.server needs beside it.

Keys, ours by theirs: tokens/s `serve_vs_llama_server_N` with N clients and
`serve_vs_llama_cpp_server_8`; seconds `ttft_shared_prefix` (median, 8 clients, whose
prompts begin with 512 tokens that all eight share and nobody had before),
`ttft_repeated_prefix` (the same 512 for everybody from first to last) and `itl_p99_N`
(`itl_p99`: the worst of them); tokens/s `grpc_vs_engine_8` and `gateway_vs_engine_8` by
the engine's without any server around it. Each is also told by file; without a file's
name it is the worst file's.

Memory of added replicas is what each adds to the proportional set size (PSS) of all,
server and engine together, after it has answered once.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _servers import (
    TOKENS,
    Bare,
    Gateway,
    LlamaCppServer,
    LlamaServer,
    Ours,
    Server,
    add_arguments,
    find_or_build,
    find_or_install,
    make_files,
    read_prompts,
)
from rich.console import Console
from rich.table import Table

CONTEXT = 512
PREFIX_CONTEXT = 2048
REPLICAS = 3
console = Console(width=110, markup=False)


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
    ours: type[Ours] = Ours,
) -> dict[str, list[Timing]]:
    """All servers in turns."""
    if any(issubclass(kind, LlamaServer) for kind in peers if kind is not LlamaCppServer):
        choose_kv(args, gguf, prompts, clients, context)
    found: dict[str, list[Timing]] = {}
    for _ in range(args.repeats):
        for kind in (ours, *peers):
            timing = measure(kind, args, gguf, prompts, clients, context)
            found.setdefault(kind.name, []).append(timing)
    return found


def choose_kv(
    args: argparse.Namespace, gguf: Path, prompts: Sequence[str], clients: int, context: int
) -> None:
    """Give llama-server the KV setting that suits it better with this load."""
    rates = {}
    for unified in (False, True):
        LlamaServer.unified = unified
        rates[unified] = measure(LlamaServer, args, gguf, prompts, clients, context).rate
    LlamaServer.unified = max(rates, key=lambda key: rates[key])
    console.print(f"llama-server, {clients} clients: {rates[False]:.0f} tok/s with a KV cache per "
                  f"stream, {rates[True]:.0f} unified")  # fmt: skip


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
        # Over all files: the worst.
        self.worst: dict[str, float] = {}
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
            key = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{name} {server} {clients} tokens_s")
            self.figures[key] = round(rate, 1)
            self.table.add_row(
                *(name, clients, server, f"{rate:.1f}", f"{1000 * first:.0f}"),
                *(f"{1000 * p99:.0f}", f"{same:.0%}"),
            )

    def ratio(
        self,
        name: str,
        key: str,
        found: dict[str, list[Timing]],
        what: str,
        *,
        peer: type[Server] = LlamaServer,
        ours: type[Server] = Ours,
        over: str = "",
    ) -> None:
        """Ours by theirs, where both were measured; `over`: the worst of several keys."""
        if peer.name not in found or ours.name not in found:
            return
        value = median(found[ours.name], what) / median(found[peer.name], what)
        self.ratios[f"{name}_{key}"] = value
        worse = min if what == "rate" else max
        for total in {key, over} - {""}:
            self.worst[total] = worse(value, self.worst.get(total, value))


def memory(args: argparse.Namespace, gguf: Path, prompts: Sequence[str]) -> dict[bool, float]:
    """Megabytes that each added replica takes, with and without repacked weights."""
    found = {}
    for repack in (True, False):
        settings = {"ARRIERO_REPACK": "true" if repack else "false"}
        with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as stack:
            sizes, servers = [], []
            for _ in range(REPLICAS):
                server = Ours(
                    gguf, slots=4, context=CONTEXT, threads=args.threads,
                    settings=settings, store=Path(home) / "store",
                )  # fmt: skip
                stack.enter_context(server)
                servers.append(server)
                asyncio.run(load(server, prompts, 1, 1))
                # Pages that several map count for each of them by its share.
                every = [p for s in servers for p in s.processes()]
                sizes.append(sum(p.memory_full_info().pss for p in every))
        found[repack] = (sizes[-1] - sizes[0]) / (REPLICAS - 1) / 1e6
    return found


def main() -> None:
    """Measure, print the tables, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", action="append", default=[], metavar="TYPE=FILE.gguf",
        help="may be given several times; default: SmolLM2-135M-Instruct as Q8_0 and Q4_0",
    )  # fmt: skip
    add_arguments(parser)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument(
        "--only", choices=["peers", "prefix", "overhead", "memory"], help="one part"
    )
    parser.add_argument("--gpu-layers", type=int, default=0, help="of all servers; -1: all layers")
    args = parser.parse_args()

    Server.gpu_layers = args.gpu_layers
    prompts = read_prompts(args.prompts)
    results = Results()
    for name, gguf in files(args):
        if args.only in (None, "peers", "prefix"):
            against_peers(args, name, gguf, prompts, results)
        if args.only in (None, "overhead"):
            overhead(args, name, gguf, prompts, results)
        if args.only in (None, "memory"):
            for repack, size in memory(args, gguf, prompts).items():
                how = "repacked" if repack else "shared"
                results.figures[f"{name}_added_replica_mb_{how}"] = round(size, 1)
                console.print(f"{name}: each added replica takes {size:.0f} MB, weights {how}")
    console.print(results.table)
    ratios = {**results.worst, **results.ratios}
    print(
        json.dumps(
            {
                "bench": "inference",
                "ratios": {key: round(value, 3) for key, value in ratios.items()},
                "figures": results.figures,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, {sys.platform}",
            }
        )
    )


def files(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Name and path of each file to serve."""
    for item in args.model:
        name, _, path = item.partition("=")
        yield name, Path(path)
    if not args.model:
        yield from make_files(("Q8_0", "Q4_0"))


def against_peers(
    args: argparse.Namespace, name: str, gguf: Path, prompts: Sequence[str], results: Results
) -> None:
    """Tokens/s, first tokens and gaps beside llama-server and llama_cpp.server."""
    binary = find_or_build(args.llama_server, build=args.build)
    binding = find_or_install(build=args.build)
    peers: list[type[Server]] = []
    if binary is None:
        console.print("no llama-server; give --llama-server or --build to compare with it")
    else:
        LlamaServer.binary = binary
        peers.append(LlamaServer)
    if binding is None:
        console.print("llama_cpp.server needs llama-cpp-python[server], or --build; left out")
    else:
        LlamaCppServer.packages = binding
    for clients in args.clients if args.only != "prefix" else ():
        others = [*peers, *([LlamaCppServer] if binding is not None and clients == 8 else [])]
        found = compare(args, gguf, prompts, clients, others)
        results.add(name, str(clients), found)
        results.ratio(name, f"serve_vs_llama_server_{clients}", found, "rate")
        results.ratio(name, f"itl_p99_{clients}", found, "p99", over="itl_p99")
        results.ratio(name, "serve_vs_llama_cpp_server_8", found, "rate", peer=LlamaCppServer)
    # About 512 tokens that eight share, then a question of each one's own: a beginning
    # that nobody asked with before for every eight, or the same one for all.
    kinds = (("new", "shared", len(prompts)), ("same", "repeated", 1))
    for what, key, trips in kinds if args.only != "peers" else ():
        asked = [f"{beginning(i // 8 % trips)}\n{prompt}" for i, prompt in enumerate(prompts)]
        found = compare(args, gguf, asked, 8, peers, PREFIX_CONTEXT)
        results.add(name, f"8, {what} beginning", found)
        results.ratio(name, f"ttft_{key}_prefix", found, "first")


def beginning(trip: int) -> str:
    """About 512 tokens."""
    facts = (f"Fact {i}: llama {i} carries {i + 3} bags." for i in range(42))
    return " ".join((f"Trip {trip}.", *facts))


def overhead(
    args: argparse.Namespace, name: str, gguf: Path, prompts: Sequence[str], results: Results
) -> None:
    """The engine's loop alone, behind gRPC, and behind gRPC and the gateway."""
    found = compare(args, gguf, prompts, 8, [Bare, Gateway])
    results.add(name, "8, layers", found)
    for key, server in (("grpc", Ours), ("gateway", Gateway)):
        results.ratio(name, f"{key}_vs_engine_8", found, "rate", peer=Bare, ours=server)
        added = median(found[server.name], "first") - median(found[Bare.name], "first")
        results.figures[f"{name}_{key}_added_first_token_ms"] = round(1000 * added, 1)


if __name__ == "__main__":
    main()
