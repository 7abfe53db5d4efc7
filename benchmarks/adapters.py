"""Requests that choose among LoRA adapters, against llama-server with the same ones.

    make bench BENCH=adapters ARGS="--model FILE.gguf [--prompts alpaca.json]"

Eight clients, eight slots: everybody asks the base, everybody asks one adapter, or four
adapters take turns from prompt to prompt. Adapters are random, r=16 on every linear
layer. Servers take turns; figures are medians.

Keys: tokens/s ours by llama-server's with N adapters, `adapters_vs_llama_server_N`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from _servers import (
    LlamaServer,
    Ours,
    add_arguments,
    find_or_build,
    make_files,
    read_prompts,
)
from inference import Results, compare, console

from arriero.llama import read_header
from arriero.replica import AdapterSettings, ReplicaSettings
from arriero.store import ManifestDraft, Store
from arriero.v1 import inference_pb2

RANK = 16
CLIENTS = 8
LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


class Adapters:
    """Who asks which adapter: what both servers are told."""

    files: tuple[Path, ...] = ()
    of_prompt: dict[str, int] = {}  # noqa: RUF012


class OursWith(Ours):
    """A replica that starts with its adapters."""

    def command(self) -> tuple[list[str], dict[str, str]]:
        command, env = super().command()
        store = Store.open(str(self.store))
        adapters = []
        for number, file in enumerate(Adapters.files):
            place = store.staging("bench", f"{self.home.name}-{number}") / "out"
            place.mkdir(parents=True)
            (place / file.name).write_bytes(file.read_bytes())
            digest = store.publish(place, ManifestDraft(kind="adapter", name=file.stem)).digest
            adapters.append(AdapterSettings(str(number), digest))
        settings = ReplicaSettings(context=self.context, adapters=tuple(adapters))
        return command, settings.environment() | env

    def request(self, prompt: str) -> inference_pb2.GenerateRequest:
        request = super().request(prompt)
        if Adapters.files:
            request.adapter = str(Adapters.of_prompt[prompt])
        return request


class LlamaServerWith(LlamaServer):
    """llama-server with the same files."""

    def command(self) -> tuple[list[str], dict[str, str]]:
        command, env = super().command()
        if Adapters.files:
            command += ["--lora", ",".join(map(str, Adapters.files)), "--lora-init-without-apply"]
        return command, env

    def body(self, prompt: str) -> dict[str, Any]:
        body = super().body(prompt)
        if Adapters.files:
            body["lora"] = [{"id": Adapters.of_prompt[prompt], "scale": 1.0}]
        return body


def write_adapter(model: Path, path: Path, seed: int) -> None:
    """A random adapter of a model, in llama.cpp's format."""
    numbers = np.random.default_rng(seed)
    header = read_header(model)
    writer = gguf.GGUFWriter(path, str(header.metadata["general.architecture"]))
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    for tensor in header.tensors:
        if tensor.name.split(".")[-2] not in LINEAR:
            continue
        width, rows = tensor.shape  # as in the file: what lies together comes first
        for letter, shape in (("a", (RANK, width)), ("b", (rows, RANK))):
            values = 0.02 * numbers.standard_normal(shape, dtype=np.float32)
            writer.add_tensor(f"{tensor.name}.lora_{letter}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Measure, print the table, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct as Q8_0")
    add_arguments(parser)
    args = parser.parse_args()

    model = args.model or next(path for _, path in make_files(("Q8_0",)))
    prompts = read_prompts(args.prompts)
    binary = find_or_build(args.llama_server, build=args.build)
    if binary is None:
        raise SystemExit("no llama-server; give --llama-server or --build to compare with it")
    LlamaServer.binary = binary
    results = Results()
    with tempfile.TemporaryDirectory() as home:
        files = tuple(Path(home) / f"adapter-{number}.gguf" for number in range(4))
        for number, file in enumerate(files):
            write_adapter(model, file, number)
        for count in (0, 1, 4):
            Adapters.files = files[:count]
            Adapters.of_prompt = {p: i % max(count, 1) for i, p in enumerate(prompts)}
            found = compare(args, model, prompts, CLIENTS, [LlamaServerWith], ours=OursWith)
            results.add(f"{count} adapters", str(CLIENTS), found)
            results.ratio(model.stem, f"adapters_vs_llama_server_{count}", found, "rate")
    console.print(results.table)
    print(
        json.dumps(
            {
                "bench": "adapters",
                "ratios": {key: round(value, 3) for key, value in results.worst.items()},
                "figures": results.figures,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, {sys.platform}",
            }
        )
    )


if __name__ == "__main__":
    main()
