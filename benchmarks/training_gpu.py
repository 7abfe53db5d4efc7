"""How fast a GPU trains, beside plain transformers and PEFT.

    make bench BENCH=training_gpu ARGS="--shape 7b 13b"
    make bench BENCH=training_gpu ARGS="--shape tiny --device cpu"    (a dry run: it works)

Models of Llama-2's shapes with random weights, bfloat16, LoRA r=8 on q_proj and v_proj
without dropout. Rows are full of samples of 40 to 280 tokens, packed to 2,048. The peer
takes the same rows as transformers does by itself: one sequence each, `sdpa`, AdamW,
loss over all tokens. Same card, same rows, same micro batch, turns in one process; each
side warms up for two steps that are left out.

Per shape: tokens/s (median step), MFU at 4N FLOPs a token (forward, and backward to
activations alone), peak memory and what the estimate before a training says of it, and
what an epoch of 49,759 rows of the samples' mean length would take.
`train_gpu_vs_peft_SHAPE` is the ratio, `mfu_SHAPE` Arriero's MFU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Hidden size, layers, heads, inner size, vocabulary.
SHAPES = {
    "7b": (4096, 32, 32, 11008, 32000),
    "13b": (5120, 40, 40, 13824, 32000),
    "tiny": (64, 2, 4, 176, 512),
}
EPOCH_ROWS, SHORTEST, LONGEST, WARM = 49_759, 40, 280, 2


def main() -> None:
    """Each shape in turn, both sides; the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["7b", "13b"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8, help="rows of 2,048 tokens a step")
    parser.add_argument("--micro", type=int, default=1, help="rows a forward pass")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    options = parser.parse_args()
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "no GPU that torch can use: this benchmark needs one (NVIDIA, 24 GB for 7b and "
            "48 GB for 13b); --shape tiny --device cpu tries the code without"
        )
    if options.device == "cpu" and set(options.shape) != {"tiny"}:
        sys.exit("on a CPU only --shape tiny: the others take hours there, and say nothing")
    if options.batch % options.micro:
        sys.exit(f"--micro {options.micro} does not divide --batch {options.batch}")
    found = {}
    with tempfile.TemporaryDirectory(prefix="arriero-bench-") as directory:
        for shape in options.shape:
            place = Path(directory) / shape
            mean = write_rows(place, options, SHAPES[shape][-1])
            sides = {
                side.__name__: measured(side, shape, place, options) for side in (peer, arriero)
            }
            found[shape] = {"mean_tokens": mean, **sides}
    show(found, options.device)


def write_rows(place: Path, options: argparse.Namespace, vocabulary: int) -> float:
    """Packed rows, as the dataset job lays them out; mean tokens of a sample."""
    import pyarrow as pa

    draw = np.random.default_rng(0)
    ids, sizes = [], []
    for _ in range(options.batch * (options.steps + WARM)):
        lengths: list[int] = []
        while (left := options.length - sum(lengths)) > 0:
            lengths.append(min(left, int(draw.integers(SHORTEST, LONGEST + 1))))
        sizes.append(lengths)
        ids.append(draw.integers(3, vocabulary, options.length).tolist())
    place.mkdir()
    kind = pa.list_(pa.int32())
    columns = [pa.array(ids, kind), pa.array(ids, kind), pa.array(sizes, kind)]
    batch = pa.record_batch(columns, names=["input_ids", "labels", "lengths"])
    with (
        pa.OSFile(str(place / "data.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, batch.schema) as writer,
    ):
        writer.write_batch(batch)
    return statistics.fmean(length for row in sizes for length in row)


def model_of(shape: str, device: str) -> Any:
    """A LLaMA with random weights, bfloat16, where it is to be."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    hidden, layers, heads, inner, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
        use_cache=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )


def measured(
    side: Callable[..., list[float]], shape: str, place: Path, options: argparse.Namespace
) -> dict[str, float | None]:
    """Tokens/s, MFU and peak memory of one side."""
    import torch

    from arriero.training.numerics import Numerics, peak_flops

    gpu = options.device == "cuda"
    how = Numerics(options.device, torch.bfloat16)
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    model = model_of(shape, options.device)
    parameters = sum(weight.numel() for weight in model.parameters())
    estimate = demand(model, options, parameters).need().total
    seconds = side(model, place, options, how)
    del model
    gc.collect()
    speed = options.batch * options.length / statistics.median(seconds[WARM:])
    peak = peak_flops(how)
    memory = torch.cuda.max_memory_allocated() if gpu else None
    if gpu:
        torch.cuda.empty_cache()
    return {
        "tokens_per_s": speed,
        "mfu": 4 * parameters * speed / peak if peak else None,
        "peak_bytes": memory,
        "estimate_bytes": estimate,
    }


def demand(model: Any, options: argparse.Namespace, parameters: int) -> Any:
    """What the training service would expect Arriero's side to take."""
    from arriero.training.memory import Demand

    config = model.config.to_dict()
    return Demand(
        config=config,
        parameters=parameters,
        linear=0,
        trained=2 * 2 * 8 * config["hidden_size"] * config["num_hidden_layers"],
        full=False,
        base_bytes=2,
        quantization="",
        double=False,
        optimizer="adamw_torch",
        rows=options.micro,
        length=options.length,
        gradient_checkpointing=options.gradient_checkpointing,
        host=options.device == "cpu",
    )


def arriero(model: Any, place: Path, options: argparse.Namespace, how: Any) -> list[float]:
    """The loop of the training job; seconds of each step."""
    from arriero.training import adapter
    from arriero.training.loop import Loop
    from arriero.training.plan import Lora, Plan
    from arriero.training.rows import Rows

    tuned = adapter.attach(model, Lora(dropout=0.0), base="bench", seed=0)
    if options.gradient_checkpointing:
        adapter.spare_activations(tuned)
    plan = Plan(
        rows=options.batch * (options.steps + WARM),
        num_epochs=1,
        batch_size=options.batch,
        micro_batch_size=options.micro,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    seconds, started = [], time.perf_counter()

    def report(_: object) -> None:
        nonlocal started
        settle(options.device)
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()

    Loop(tuned, Rows(place), None, plan, how).run(report=report, save=lambda: None)
    return seconds


def peer(model: Any, place: Path, options: argparse.Namespace, how: Any) -> list[float]:
    """transformers and PEFT as they come; seconds of each step."""
    import torch
    from peft import LoraConfig, get_peft_model

    from arriero.training.rows import Rows

    config = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]
    )
    tuned = get_peft_model(model, config)
    if options.gradient_checkpointing:
        tuned.gradient_checkpointing_enable({"use_reentrant": False})
        tuned.enable_input_require_grads()
    tuned.train()
    trained = [weight for weight in tuned.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4)
    rows, seconds = Rows(place), []
    parts = options.batch // options.micro
    for step in range(options.steps + WARM):
        started = time.perf_counter()
        for part in range(parts):
            first = step * options.batch + part * options.micro
            chosen = [rows.ids(row).astype(np.int64) for row in range(first, first + options.micro)]
            ids = torch.from_numpy(np.stack(chosen)).to(options.device)
            with how.autocast():
                loss = tuned(input_ids=ids, labels=ids).loss / parts
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        settle(options.device)
        seconds.append(time.perf_counter() - started)
    return seconds


def settle(device: str) -> None:
    """Wait for what was started."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def show(found: dict[str, dict[str, Any]], device: str) -> None:
    """The table and the JSON line."""
    import torch
    from rich.console import Console
    from rich.table import Table

    card = torch.cuda.get_device_name() if device == "cuda" else "a CPU: these say nothing"
    table = Table(
        "shape", "side", "tokens/s", "MFU", "peak memory", "estimate", "epoch", title=f"On {card}"
    )
    ratios, figures = {}, {}
    for shape, facts in found.items():
        for side in ("peer", "arriero"):
            of = facts[side]
            minutes = EPOCH_ROWS * facts["mean_tokens"] / of["tokens_per_s"] / 60
            table.add_row(
                shape,
                "transformers + PEFT" if side == "peer" else "Arriero",
                f"{of['tokens_per_s']:,.0f}",
                "" if of["mfu"] is None else f"{of['mfu']:.1%}",
                "" if of["peak_bytes"] is None else f"{of['peak_bytes'] / 1e9:.1f} GB",
                "" if side == "peer" else f"{of['estimate_bytes'] / 1e9:.1f} GB",
                f"{minutes:.1f} min",
            )
        speeds = [facts[side]["tokens_per_s"] for side in ("arriero", "peer")]
        ratios[f"train_gpu_vs_peft_{shape}"] = speeds[0] / speeds[1]
        if facts["arriero"]["mfu"] is not None:
            ratios[f"mfu_{shape}"] = facts["arriero"]["mfu"]
        figures[shape] = facts
    Console().print(table)
    result = {"bench": "training_gpu", "ratios": ratios, "figures": figures, "machine": card}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
