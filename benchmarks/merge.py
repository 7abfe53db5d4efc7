"""Merging a 1.1B LLaMA with an all-linear adapter, against the ways that people use.

    make bench BENCH=merge

Draws a random model of TinyLlama's shape (bfloat16, 2.2 GB, five shards) and a LoRA
of rank 16 on all linear layers, and merges them, interleaved, `REPEATS` times
(default 3):

- `cp`: plain `cp -r` of the base, and `sync` of its files;
- `arriero`: the merge job, with its outputs described (hashed) and durable;
- `peft`: `merge_and_unload` and `save_pretrained`, and `sync`;
- `shardwise`: one base shard in memory at a time, deltas added in place, saved, and
  `sync`: the low-memory script that came with Chinese-LLaMA works so.

Each runs in a process of its own in which everything is imported already; the base
is in the page cache. The peak is of private memory (RssAnon; mapped files apart),
the interpreter and the libraries included. Gates run apart, once.

Each runs once unmeasured, and at once again. A virtual machine that gives free memory
back to its host pays, in the kernel, for every page that it takes again, so what ran
before decides about seconds: that has to be the same for all. `--rest SECONDS` waits in
between, and all pay.

Ratios: `merge_vs_cp` is ours / cp (aim: at most 1.5), `merge_vs_peft` and
`merge_vs_shardwise` are peer / ours (above 1: ours is faster).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HIDDEN, INNER, LAYERS, HEADS, GROUPS, VOCABULARY = 2048, 5632, 22, 32, 4, 32000
RANK = 16
WAYS = ("cp", "arriero", "shardwise", "peft")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    """Make the inputs, run everything, print the table and the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer: a smaller model")
    parser.add_argument("--rest", type=float, default=0.0, help="seconds to wait before each")
    parser.add_argument("--way", choices=[*WAYS, "gates"], help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(timed(arguments.way, arguments.place, arguments.rest)))
        return
    with tempfile.TemporaryDirectory(prefix="arriero-bench-") as directory:
        place = Path(directory)
        make_inputs(place, arguments.layers)
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(int(os.environ.get("REPEATS", "3"))):
            for way in WAYS:
                runs[way].append(in_process(way, place, arguments.rest))
        gates = in_process("gates", place, arguments.rest)
    report(runs, gates, arguments.layers)


def report(runs: dict[str, list[dict[str, float]]], gates: dict[str, Any], layers: int) -> None:
    """A table for people and a line for machines."""
    seconds = {way: statistics.median(run["seconds"] for run in runs[way]) for way in WAYS}
    peak = {way: max(run["private_mb"] for run in runs[way]) for way in WAYS}
    table = Table("way", "seconds", "of cp", "private memory, MB", title=f"Merge, {layers} layers")
    for way in WAYS:
        table.add_row(
            way, f"{seconds[way]:.2f}", f"{seconds[way] / seconds['cp']:.2f}", f"{peak[way]:.0f}"
        )
    table.add_row("gates", f"{gates['seconds']:.2f}", "", f"{gates['private_mb']:.0f}")
    Console().print(table)
    print(
        json.dumps(
            {
                "bench": "merge",
                "ratios": {
                    "merge_vs_cp": seconds["arriero"] / seconds["cp"],
                    "merge_vs_peft": seconds["peft"] / seconds["arriero"],
                    "merge_vs_shardwise": seconds["shardwise"] / seconds["arriero"],
                },
                "figures": {
                    "merge_private_mb": peak["arriero"],
                    "seconds": {way: [run["seconds"] for run in runs[way]] for way in WAYS},
                    "private_mb": peak,
                    "gates": gates,
                },
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, {sys.platform}",
            }
        )
    )


# --- inputs -----------------------------------------------------------------------------


def make_inputs(place: Path, layers: int) -> None:
    """`place/base` and `place/adapter`, and both in `place/store`."""
    import torch

    from arriero.store import ManifestDraft, Store
    from arriero.testing.adapters import tiny_adapter
    from arriero.weights import TensorPlan, Weights, WeightsWriter

    keys = HIDDEN // HEADS * GROUPS
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (HIDDEN,),
            prefix + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            prefix + "self_attn.k_proj.weight": (keys, HIDDEN),
            prefix + "self_attn.v_proj.weight": (keys, HIDDEN),
            prefix + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            prefix + "post_attention_layernorm.weight": (HIDDEN,),
            prefix + "mlp.gate_proj.weight": (INNER, HIDDEN),
            prefix + "mlp.up_proj.weight": (INNER, HIDDEN),
            prefix + "mlp.down_proj.weight": (HIDDEN, INNER),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    store = Store.open(place / "store")
    base = store.staging("bench", "base") / "model"
    base.mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    plan = [TensorPlan(name, "BF16", shape) for name, shape in shapes.items()]
    with WeightsWriter(base, plan, max_shard_size=500_000_000) as writer:
        for name, shape in shapes.items():
            drawn = torch.empty(shape, dtype=torch.bfloat16)
            if len(shape) == 1:
                drawn.fill_(1)
            else:
                drawn.normal_(0, shape[1] ** -0.5, generator=random)
            writer.write(name, drawn)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (base / "config.json").write_text(json.dumps(config, indent=2))
    lora = store.staging("bench", "adapter") / "adapter"
    tiny_adapter(lora, Weights.open(base), r=RANK, alpha=32, targets=LINEAR, scale=0.02)
    model = store.publish(base, ManifestDraft(kind="model", name="base"))
    adapter = store.publish(lora, ManifestDraft(kind="adapter", name="lora"))
    (place / "inputs.json").write_text(
        json.dumps({"model": model.digest, "adapter": adapter.digest})
    )
    for name, artifact in (("base", model), ("adapter", adapter)):
        (place / name).symlink_to(artifact.path)


# --- one way, in a process of its own ------------------------------------------------------


def in_process(way: str, place: Path, rest: float) -> dict[str, Any]:
    """Seconds and peak private memory of one way."""
    command = [sys.executable, __file__, "--way", way, "--place", str(place), "--rest", str(rest)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def timed(way: str, place: Path, rest: float) -> dict[str, Any]:
    """Import what the way needs, then time it."""
    target = place / "out"
    shutil.rmtree(target, ignore_errors=True)
    work = {"cp": cp, "arriero": arriero, "peft": peft, "shardwise": shardwise, "gates": gates}[way]
    work(place, target)()
    shutil.rmtree(target)
    run = work(place, target)
    os.sync()
    time.sleep(rest)
    for path in (place / "base").iterdir():  # have it in the page cache
        subprocess.run(["cat", str(path)], check=True, stdout=subprocess.DEVNULL)
    peak, stop = [0.0], threading.Event()

    def sample() -> None:
        # Seldom: the interpreter's lock that this takes is the merge's.
        while not stop.wait(0.05):
            peak[0] = max(peak[0], private_mb())

    watcher = threading.Thread(target=sample)
    watcher.start()
    start = time.perf_counter()
    figures = run() or {}
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    shutil.rmtree(target, ignore_errors=True)
    return {"seconds": seconds, "private_mb": peak[0], **figures}


def private_mb() -> float:
    """Anonymous memory of this process, in MB (1e6 bytes)."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024 / 1e6


def synced(target: Path) -> None:
    """Have a directory's files on the disk."""
    subprocess.run(["sync", *(str(path) for path in target.iterdir())], check=True)


Run = Callable[[], dict[str, Any] | None]


def cp(place: Path, target: Path) -> Run:
    """The base, copied."""

    def run() -> None:
        subprocess.run(["cp", "-rL", str(place / "base"), str(target)], check=True)
        synced(target)

    return run


def arriero(place: Path, target: Path) -> Run:
    """The merge job, gates left out."""
    return _job(place, target, skip=True)


def gates(place: Path, target: Path) -> Run:
    """The merge job with its gates; `seconds` and `private_mb` are those of the gates."""
    return _job(place, target, skip=False)


def _job(place: Path, target: Path, *, skip: bool) -> Run:
    import torch  # noqa: F401

    from arriero.merging.merge import merge
    from arriero.merging.specs import resolve_merge
    from arriero.operations.delivery import describe
    from arriero.operations.kinds import ResolveContext
    from arriero.settings import SourceSettings
    from arriero.store import Store
    from arriero.testing.jobs import make_job
    from arriero.v1 import merging_pb2, types_pb2

    store = Store.open(place / "store")
    found = json.loads((place / "inputs.json").read_text())
    inputs = {"model": [store.get(found["model"])], "adapters": [store.get(found["adapter"])]}
    spec = merging_pb2.MergeSpec(model=found["model"], adapters=[found["adapter"]])
    for gate in GATES if skip else ():
        spec.gates[gate] = types_pb2.GATE_MODE_SKIP
    resolved = resolve_merge(spec, ResolveContext(store, inputs, SourceSettings())).spec
    job = make_job("merge", resolved, inputs, store, target)

    def run() -> dict[str, Any]:
        outcome = describe(merge(job), job)
        results = {result.gate: result for result in outcome.gates}
        if skip:
            return {}
        return {
            "seconds": sum(result.seconds for result in results.values()),
            "verdicts": {gate: result.verdict.value for gate, result in results.items()},
            "each": {gate: round(result.seconds, 2) for gate, result in results.items()},
        }

    return run


GATES = ("adapter.health", "merge.delta", "merge.logits", "merge.vocab", "tokenizer.match")


def peft(place: Path, target: Path) -> Run:
    """PEFT's own merge, and transformers' saving."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    def run() -> None:
        model = AutoModelForCausalLM.from_pretrained(str(place / "base"), dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(model, str(place / "adapter")).merge_and_unload()
        merged.save_pretrained(str(target))
        synced(target)

    return run


def shardwise(place: Path, target: Path) -> Run:
    """One base shard in memory at a time."""
    import torch  # noqa: F401
    from safetensors.torch import load_file, save_file

    def run() -> None:
        target.mkdir(parents=True)
        lora = load_file(str(place / "adapter" / "adapter_model.safetensors"))
        config = json.loads((place / "adapter" / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / config["r"]
        for path in sorted((place / "base").iterdir()):
            if path.suffix != ".safetensors":
                shutil.copy(path, target)
                continue
            tensors = load_file(str(path))
            for name, tensor in tensors.items():
                stem = "base_model.model." + name.removesuffix(".weight")
                if f"{stem}.lora_A.weight" in lora:
                    a, b = lora[f"{stem}.lora_A.weight"], lora[f"{stem}.lora_B.weight"]
                    tensor += (b @ a) * scale
            save_file(tensors, str(target / path.name), metadata={"format": "pt"})
        synced(target)

    return run


if __name__ == "__main__":
    main()
