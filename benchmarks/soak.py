"""Many clients for minutes: does the memory of a replica grow?

    python benchmarks/soak.py --model FILE.gguf            (10 minutes, 32 clients)

Clients ask again and again, of everything that keeps state: prompts that are new and
prompts that begin alike, greedy and sampled, penalties, grammars, log-probabilities,
callers that leave in the middle, and refused requests. Resident memory of server and
engine is sampled each second. What they may grow by, from the mean of the first fifth
after the warm-up (a tenth of the time) to the mean of the last fifth, is `--bound`
(megabytes, of both together); beyond it this exits with 1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
from _servers import Ours
from rich.console import Console
from rich.table import Table

from arriero.v1 import inference_pb2 as pb

console = Console()
MEGABYTE = 1_000_000
SHARED = " ".join(f"Fact {i}: llama {i} carries {i + 3} bags." for i in range(12))


@dataclass
class Soak:
    """What happened."""

    end: float
    tokens: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    # Seconds, bytes of the server, bytes of the engine.
    samples: list[tuple[float, int, int]] = field(default_factory=list)


def request(random_: random.Random, number: int) -> pb.GenerateRequest:
    """One of everything that keeps state."""
    prompt = f"{number}: what of {random_.choice(['bread', 'snow', 'tea'])}?\nAnswer:"
    if number % 3 == 0:
        prompt = f"{SHARED}\n{prompt}"
    sampling = pb.SamplingParams(max_tokens=random_.randint(1, 96), seed=number)
    kind = number % 8
    if kind == 0:
        sampling.temperature = 0
    elif kind == 1:
        sampling.repeat_penalty, sampling.dry_multiplier = 1.1, 0.8
    elif kind == 2:
        sampling.json_schema = '{"type": "object", "properties": {"a": {"type": "integer"}}}'
    elif kind == 3:
        sampling.logprobs = 5
    elif kind == 4:
        sampling.mirostat = 2
    elif kind == 5:
        sampling.stop.extend([".", "\n"])
    elif kind == 6 and number % 5 == 0:
        sampling.top_p = 3  # refused
    return pb.GenerateRequest(prompt=prompt, sampling=sampling)


async def client(stub: Any, soak: Soak, seed: int) -> None:
    """Asks until the end; leaves every seventh answer in the middle."""
    random_ = random.Random(seed)
    number = seed * 1_000_000
    while time.monotonic() < soak.end:
        number += 1
        call = stub.Generate(request(random_, number))
        try:
            async for message in call:
                soak.tokens += bool(message.delta)
                if number % 7 == 0 and random_.random() < 0.2:
                    call.cancel()
            soak.outcomes["answered"] += 1
        except asyncio.CancelledError:
            soak.outcomes["left"] += 1
        except grpc.aio.AioRpcError as error:
            soak.outcomes[error.code().name.lower()] += 1


async def watch(server: Ours, soak: Soak, begun: float) -> None:
    """Sample memory once a second."""
    front, engine = server.processes()
    while time.monotonic() < soak.end:
        sizes = [process.memory_info().rss for process in (front, engine)]
        soak.samples.append((time.monotonic() - begun, *sizes))
        await asyncio.sleep(1)


async def run(server: Ours, args: argparse.Namespace) -> Soak:
    """All clients until the time is over."""
    begun = time.monotonic()
    soak = Soak(end=begun + 60 * args.minutes)
    async with server.client() as stub:
        tasks = [client(stub, soak, seed) for seed in range(1, args.clients + 1)]
        await asyncio.gather(watch(server, soak, begun), *tasks)
    return soak


def main() -> None:
    """Run, print the table and the JSON line, exit 1 when memory grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, metavar="FILE.gguf")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--bound", type=float, default=16, help="megabytes (default: 16)")
    args = parser.parse_args()

    with Ours(
        args.model, slots=args.slots, context=1024, threads=args.threads,
        settings={"ARRIERO_QUEUE": str(args.clients)},
    ) as server:  # fmt: skip
        assert isinstance(server, Ours)
        soak = asyncio.run(run(server, args))

    seconds = 60 * args.minutes
    table = Table("minute", "server MB", "engine MB", title=f"{args.clients} clients")
    for minute in range(round(args.minutes)):
        part = [s for s in soak.samples if minute <= s[0] / 60 < minute + 1]
        if part:
            table.add_row(
                str(minute + 1),
                *(f"{statistics.mean(s[i] for s in part) / MEGABYTE:.1f}" for i in (1, 2)),
            )
    console.print(table)
    warm = [s for s in soak.samples if s[0] >= seconds / 10]
    fifth = max(1, len(warm) // 5)

    def mean(part: list[tuple[float, int, int]], index: int) -> float:
        return statistics.mean(sample[index] for sample in part) / MEGABYTE

    grown = [mean(warm[-fifth:], index) - mean(warm[:fifth], index) for index in (1, 2)]
    print(
        json.dumps(
            {
                "bench": "soak",
                "figures": {
                    "minutes": args.minutes,
                    "clients": args.clients,
                    "tokens": soak.tokens,
                    **soak.outcomes,
                    "server_grown_mb": round(grown[0], 2),
                    "engine_grown_mb": round(grown[1], 2),
                    "bound_mb": args.bound,
                },
            }
        )
    )
    if sum(grown) > args.bound:
        raise SystemExit(f"memory grew by {sum(grown):.1f} MB; at most {args.bound:g} MB may be")


if __name__ == "__main__":
    main()
