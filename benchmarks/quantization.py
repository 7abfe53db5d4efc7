"""Base and adapter into quantized GGUF files, against the chain that people use.

    make bench BENCH=quantization

Draws a random model of TinyLlama's shape (bfloat16, 2.2 GB) and a LoRA of rank 16
on all linear layers, and makes, interleaved:

- `onepass Q8_0`, `onepass Q4_K_M`: our job on base and adapter, from its start to
  outputs that are hashed and on the disk (gates apart), the child process that
  reads the metadata included;
- `chain Q8_0`: PEFT's `merge_and_unload` and `save_pretrained`, llama.cpp's
  `convert_hf_to_gguf.py --outtype f16`, `llama_model_quantize`, `sync`;
- `quantize step Q4_K_M`: `llama_model_quantize` alone, from a ready F16 file, `sync`;
- `onepass x4`: four types in one operation, and `onepass apart`: the same four, an
  operation each.

Each runs in a process of its own in which everything is imported already; the
inputs are in the page cache; all of them use every core. Q8_0 is repeated
`REPEATS` times (default 3), the rest runs once (minutes each). Private memory is
RssAnon of the process and its children together; bytes written are the kernel's
count of them (`/proc/self/io`). `reads` is how often each weight was asked for.

Ratios: `onepass_q8_vs_chain` is chain / ours (aim: at least 2.5),
`onepass_q4km_vs_quantize_step` is ours / the step alone (aim: at most 1.05),
`onepass_disk_ratio` is bytes written / bytes of the outputs (aim: at most 1.05),
`onepass_four_vs_apart` is four types in one operation / four operations (aim: below 1,
with `onepass_four_reads` of 1: the model is read once).
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
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FOUR = ("F16", "Q8_0", "Q5_0", "Q4_0")
Q8, CHAIN, Q4KM, STEP = "onepass-Q8_0", "chain", "onepass-Q4_K_M", "step"
X4, APART = "onepass-x4", "onepass-apart"
WAYS = (Q8, CHAIN, Q4KM, STEP, X4, APART)
Figures = dict[str, Any]


def main() -> None:
    """Make the inputs, run everything, print the table and the JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer: a smaller model")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="only some")
    parser.add_argument("--keep", type=Path, help="where inputs are kept for the next run")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(timed(arguments.way, arguments.place)))
        return
    with tempfile.TemporaryDirectory(prefix="arriero-bench-") as directory:
        place = arguments.keep or Path(directory)
        if not (place / "inputs.json").exists():
            make_inputs(place, arguments.layers)
        runs: dict[str, list[Figures]] = {}
        for turn in range(int(os.environ.get("REPEATS", "3"))):
            for way in arguments.ways:
                if turn == 0 or way in (Q8, CHAIN):
                    runs.setdefault(way, []).append(in_process(way, place))
    report(runs, arguments.layers)


def report(runs: dict[str, list[Figures]], layers: int) -> None:
    """A table for people and a line for machines."""
    seconds = {
        way: statistics.median(run["seconds"] for run in found) for way, found in runs.items()
    }
    table = Table(
        "way", "seconds", "parts", "private MB", "written MB", "outputs MB", "reads",
        title=f"Quantization, {layers} layers",
    )  # fmt: skip
    for way, found in runs.items():
        middle = min(found, key=lambda run: abs(run["seconds"] - seconds[way]))
        parts = ", ".join(f"{name} {value:.1f}" for name, value in middle["parts"].items())
        table.add_row(
            way, f"{seconds[way]:.2f}", parts, f"{middle['private_mb']:.0f}",
            f"{middle['written'] / 1e6:.0f}", f"{middle['outputs'] / 1e6:.0f}",
            f"{middle['reads']:.2f}" if "reads" in middle else "",
        )  # fmt: skip
    Console(width=130).print(table)
    ratios: dict[str, float] = {}
    if Q8 in runs and CHAIN in runs:
        ratios["onepass_q8_vs_chain"] = seconds[CHAIN] / seconds[Q8]
    if Q4KM in runs and STEP in runs:
        ratios["onepass_q4km_vs_quantize_step"] = seconds[Q4KM] / seconds[STEP]
    if X4 in runs and APART in runs:
        ratios["onepass_four_vs_apart"] = seconds[X4] / seconds[APART]
    ours = [run for way, found in runs.items() if way.startswith("onepass") for run in found]
    if ours:
        ratios["onepass_disk_ratio"] = max(run["written"] / run["outputs"] for run in ours)
    print(
        json.dumps(
            {
                "bench": "quantization",
                "ratios": ratios,
                "figures": {
                    "onepass_private_mb": max((run["private_mb"] for run in ours), default=0),
                    "onepass_reads": max(
                        (
                            run["reads"]
                            for way, found in runs.items()
                            for run in found
                            if "reads" in run and way != APART
                        ),
                        default=0,
                    ),
                    "onepass_four_reads": max(
                        (run["reads"] for run in runs.get(X4, [])), default=0
                    ),
                    "runs": runs,
                },
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, {sys.platform}",
            }
        )
    )


# --- inputs -----------------------------------------------------------------------------


def make_inputs(place: Path, layers: int) -> None:
    """`place/store` with model and adapter, and both as `place/base` and `place/adapter`."""
    import torch

    from arriero.store import ManifestDraft, Store
    from arriero.testing.adapters import tiny_adapter
    from arriero.testing.models import tiny_llama
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
    tiny_llama(base)  # for its tokenizer; the rest of the vocabulary is padding
    random = torch.Generator().manual_seed(0)
    plan = [TensorPlan(name, "BF16", shape) for name, shape in shapes.items()]
    with WeightsWriter(base, plan) as writer:
        for name, shape in shapes.items():
            drawn = torch.empty(shape, dtype=torch.bfloat16)
            if len(shape) == 1:
                drawn.fill_(1)
            else:
                drawn.normal_(0, shape[1] ** -0.5, generator=random)
            writer.write(name, drawn)
    config = json.loads((base / "config.json").read_text())
    config |= {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": HIDDEN // HEADS,
        "torch_dtype": "bfloat16",
    }
    (base / "config.json").write_text(json.dumps(config, indent=2))
    lora = store.staging("bench", "adapter") / "adapter"
    tiny_adapter(lora, Weights.open(base), r=RANK, alpha=32, targets=LINEAR, scale=0.02)
    model = store.publish(base, ManifestDraft(kind="model", name="base"))
    adapter = store.publish(lora, ManifestDraft(kind="adapter", name="lora"))
    for name, artifact in (("base", model), ("adapter", adapter)):
        (place / name).symlink_to(artifact.path)
    (place / "inputs.json").write_text(
        json.dumps({"model": model.digest, "adapter": adapter.digest})
    )


# --- one way, in a process of its own ------------------------------------------------------


def in_process(way: str, place: Path) -> Figures:
    """What one way takes."""
    if way == STEP and not (place / "F16.gguf").exists():
        in_process(CHAIN, place)
    command = [sys.executable, __file__, "--way", way, "--place", str(place)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    return found


def timed(way: str, place: Path) -> Figures:
    """Import what the way needs, then time it."""
    for path in place.rglob("*.safetensors"):  # into the page cache
        subprocess.run(["cat", str(path)], check=True, stdout=subprocess.DEVNULL)
    target = place / "out"
    shutil.rmtree(target, ignore_errors=True)
    work = chain if way == CHAIN else step if way == STEP else onepass
    run = work(place, target, way)
    os.sync()
    peak, stop = [0.0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], private_mb())

    watcher = threading.Thread(target=sample)
    watcher.start()
    before = written()
    start = time.perf_counter()
    figures = run()
    seconds = time.perf_counter() - start
    figures["written"] = written() - before
    stop.set()
    watcher.join()
    shutil.rmtree(target, ignore_errors=True)
    return {"seconds": seconds, "private_mb": peak[0], **figures}


def private_mb() -> float:
    """Anonymous memory of this process and its children, in MB (1e6 bytes)."""
    pids = [os.getpid()]
    for task in Path("/proc/self/task").iterdir():
        try:
            pids += [int(pid) for pid in (task / "children").read_text().split()]
        except OSError:
            continue
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/status", encoding="ascii") as file:
                total += next(int(ln.split()[1]) for ln in file if ln.startswith("RssAnon"))
        except (OSError, StopIteration):  # it ended meanwhile
            continue
    return total * 1024 / 1e6


def written() -> int:
    """Bytes that this process and the children that it waited for had written to the disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("write_bytes")).split()[1])


def synced(target: Path) -> None:
    """Have a directory's files on the disk."""
    subprocess.run(["sync", *(str(path) for path in target.iterdir())], check=True)


Run = Callable[[], Figures]


def onepass(place: Path, target: Path, way: str) -> Run:
    """The job, gates left out."""
    import torch  # noqa: F401

    from arriero.operations.delivery import describe
    from arriero.operations.kinds import ResolveContext
    from arriero.quantization import onepass as rows
    from arriero.quantization.quantize import run_quantize
    from arriero.quantization.quantize_spec import resolve_quantize
    from arriero.settings import SourceSettings
    from arriero.store import Store
    from arriero.testing.jobs import make_job
    from arriero.v1 import quantization_pb2, types_pb2
    from arriero.weights import MergedWeights

    groups = [FOUR] if way == X4 else [(way.removeprefix("onepass-"),)]
    if way == APART:
        groups = [(kind,) for kind in FOUR]
    store = Store.open(place / "store")
    found = json.loads((place / "inputs.json").read_text())
    inputs = {"model": [store.get(found["model"])], "adapters": [store.get(found["adapter"])]}
    jobs = []
    for types in groups:
        spec = quantization_pb2.QuantizeSpec(
            model=found["model"], adapters=[found["adapter"]], types=types
        )
        for gate in ("gguf.tokens", "gguf.template", "gguf.rope", "quant.kld"):
            spec.gates[gate] = types_pb2.GATE_MODE_SKIP
        resolved = resolve_quantize(spec, ResolveContext(store, inputs, SourceSettings())).spec
        place_of = target / "-".join(types)
        jobs.append(make_job("quantize", resolved, inputs, store, place_of))
    asked: list[int] = [0]
    parts: dict[str, float] = {}
    plain_rows, plain_fill = MergedWeights.rows, rows.fill

    def counted(self: Any, name: str, start: int, stop: int) -> Any:
        width = 1 if len(self[name].shape) == 1 else self[name].shape[1]
        asked.append((stop - start) * width)
        return plain_rows(self, name, start, stop)

    def lap(name: str) -> None:
        now = time.perf_counter()
        parts[name] = parts.get(name, 0.0) + now - began[0]
        began[0] = now

    def fill(*arguments: Any, **options: Any) -> Any:
        lap("metadata and types")
        digests = plain_fill(*arguments, **options)
        lap("merge, quantize, write")
        return digests

    MergedWeights.rows, rows.fill = counted, fill  # type: ignore[method-assign]
    began = [0.0]

    def run() -> Figures:
        sizes: list[int] = []
        for job in jobs:
            began[0] = time.perf_counter()
            outputs = run_quantize(job)
            describe(outputs, job)
            lap("describe")
            sizes += [path.stat().st_size for output in outputs for path in output.path.iterdir()]
        elements = MergedWeights.open(inputs["model"][0].path, [], []).elements
        return {"parts": parts, "outputs": sum(sizes), "reads": sum(asked) / elements}

    return run


def chain(place: Path, target: Path, way: str) -> Run:
    """Merge with PEFT, convert with llama.cpp's script, quantize with its library."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from arriero.llama import initialize, quantize, resolve_type
    from arriero.quantization import converter

    logging.disable_progress_bar()
    initialize()
    script = converter.locate() / "convert_hf_to_gguf.py"

    def run() -> Figures:
        parts: dict[str, float] = {}
        last = time.perf_counter()

        def lap(name: str) -> None:
            nonlocal last
            parts[name] = time.perf_counter() - last
            last = time.perf_counter()

        model = AutoModelForCausalLM.from_pretrained(str(place / "base"), dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(model, str(place / "adapter")).merge_and_unload()
        merged.save_pretrained(str(target / "merged"))
        AutoTokenizer.from_pretrained(str(place / "base")).save_pretrained(str(target / "merged"))
        shutil.copy(place / "base" / "tokenizer.model", target / "merged")
        del model, merged
        lap("merge")
        f16 = place / "F16.gguf"
        subprocess.run(
            [sys.executable, str(script), str(target / "merged"), "--outfile", str(f16)]
            + ["--outtype", "f16"],
            check=True,
            capture_output=True,
        )
        lap("convert")
        made = target / "Q8_0.gguf"
        quantize(f16, made, resolve_type("Q8_0"), n_threads=os.cpu_count() or 1)
        lap("quantize")
        subprocess.run(["sync", str(made)], check=True)
        lap("sync")
        return {"parts": parts, "outputs": made.stat().st_size}

    return run


def step(place: Path, target: Path, way: str) -> Run:
    """llama-quantize alone."""
    from arriero.llama import initialize, quantize, resolve_type

    initialize()
    f16 = place / "F16.gguf"
    subprocess.run(["cat", str(f16)], check=True, stdout=subprocess.DEVNULL)

    def run() -> Figures:
        target.mkdir(parents=True)
        made = target / "Q4_K_M.gguf"
        quantize(f16, made, resolve_type("Q4_K_M"), n_threads=os.cpu_count() or 1)
        synced(target)
        return {"parts": {}, "outputs": made.stat().st_size}

    return run


if __name__ == "__main__":
    main()
