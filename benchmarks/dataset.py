"""How fast rows become tokens, against the two ways that everyone uses, and in how much memory.

    make bench BENCH=dataset ARGS="--tokenizer DIR [--rows FILE.json] [--count 50000] [--memory]"

- `dataset_vs_map`: rows a second of a whole `dataset` job (read, render, encode,
  mask, shuffle, split, write) against one row at a time through `datasets.map`,
  as Alpaca-LoRA does it: the prompt and the whole row are tokenized, and labels
  are masked in Python. Same tokenizer, template text and knobs. Wants
  `pip install datasets`; left out without.
- `dataset_vs_encode_batch`: the same against the bare tokenizer's
  `encode_batch_fast` over texts that are rendered already, on all cores.
- `memory_ratio`: peak memory of the job and its workers, all added up (unique
  set size, mapped files of others apart), for a million rows against `--count`.

Rows are made distinct from an instruction file in Alpaca's format (`--rows`),
or from random words. Every figure is the median of `REPEATS` (default 3), taken
in turn, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

CUTOFF, VAL = 256, 2000
PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides "
    "further context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def write_rows(path: Path, count: int, origin: Path | None) -> None:
    """Distinct rows as JSON lines: a row's output goes on with sentences of others."""
    chance = random.Random(7)
    if origin is not None:
        base = json.loads(origin.read_text(encoding="utf-8"))
    else:
        letters = "abcdefghijklmnopqrstuvwxyz"
        words = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(20_000)]
        base = [
            {
                "instruction": " ".join(chance.choices(words, k=12)) + "?",
                "input": "",
                "output": ". ".join(" ".join(chance.choices(words, k=14)) for _ in range(8)) + ".",
            }
            for _ in range(1000)
        ]
    sentences = [s.strip() for row in base for s in row["output"].split(". ") if len(s) > 20]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = dict(base[number % len(base)])
            row["instruction"] = f"{row['instruction']} ({chance.choice(sentences)[:60]} {number})"
            keep = len(row["output"]) // 2
            row["output"] = f"{row['output'][:keep]} {'. '.join(chance.choices(sentences, k=2))}."
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def run_ours(rows: Path, tokenizer: Path, count: int) -> dict[str, Any]:
    """A whole job, in this process, over a store of its own."""
    from arriero.dataset.job import prepare
    from arriero.dataset.spec import resolve
    from arriero.operations.kinds import ResolveContext
    from arriero.settings import SourceSettings
    from arriero.store import ManifestDraft, Store
    from arriero.testing.jobs import make_job
    from arriero.v1 import dataset_pb2

    with tempfile.TemporaryDirectory(prefix="arriero-bench-") as directory:
        store = Store.open(Path(directory) / "store")
        staging = store.staging("bench", "tokenizer") / "files"
        staging.mkdir(parents=True)
        for file in tokenizer.iterdir():
            if file.suffix in (".json", ".jinja", ".model") and file.is_file():
                (staging / file.name).write_bytes(file.read_bytes())
        artifact = store.publish(staging, ManifestDraft(kind="tokenizer", name="bench"))
        spec = dataset_pb2.DatasetSpec(
            sources=[str(rows)],
            format="alpaca",
            tokenizer=artifact.digest,
            template="alpaca",
            cutoff_len=CUTOFF,
            val_set_size=VAL,
        )
        context = ResolveContext(store, {"tokenizer": [artifact]}, SourceSettings((rows.parent,)))
        resolved = resolve(spec, context).spec
        job = make_job("dataset", resolved, {"tokenizer": artifact}, store, Path(directory))
        with Peak() as peak:
            start = time.perf_counter()
            prepare(job)
            seconds = time.perf_counter() - start
    return {"rows_per_s": count / seconds, "peak_bytes": peak.bytes}


class Peak:
    """The most memory that this process and its children have together, sampled."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._ended.wait(0.5):
            total = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    total += process.memory_full_info().uss
                except psutil.Error:
                    continue
            self.bytes = max(self.bytes, total)


def run_map(rows: Path, tokenizer: Path, count: int) -> dict[str, Any]:
    """One row at a time, as Alpaca-LoRA's finetune script maps its rows."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    hf = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)

    def tokenize(text: str, end: bool) -> dict[str, list[int]]:
        found = hf(text, truncation=True, max_length=CUTOFF, padding=False, return_tensors=None)
        ids = list(found["input_ids"])
        if end and ids[-1] != hf.eos_token_id and len(ids) < CUTOFF:
            ids.append(hf.eos_token_id)
        return {"input_ids": ids, "labels": list(ids)}

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        prompt = (PROMPT_WITH_INPUT if row["input"] else PROMPT).format(**row)
        whole = tokenize(prompt + row["output"], True)
        begin = len(tokenize(prompt, False)["input_ids"])
        whole["labels"] = [-100] * begin + whole["labels"][begin:]
        return whole

    with tempfile.TemporaryDirectory(prefix="arriero-bench-") as directory:
        start = time.perf_counter()
        data = datasets.load_dataset(
            "json", data_files=str(rows), split="train", cache_dir=directory
        )
        parts = data.train_test_split(test_size=VAL, shuffle=True, seed=42)
        for name in ("train", "test"):
            parts[name].shuffle(seed=42).map(encode)
        seconds = time.perf_counter() - start
    return {"rows_per_s": count / seconds}


def run_bare(rows: Path, tokenizer: Path, count: int) -> dict[str, Any]:
    """The tokenizer alone, over texts that are there already."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    texts = []
    with rows.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            prompt = (PROMPT_WITH_INPUT if row["input"] else PROMPT).format(**row)
            texts.append(prompt + row["output"] + "<|im_end|>")
    start = time.perf_counter()
    for begin in range(0, len(texts), 1000):
        backend.encode_batch_fast(texts[begin : begin + 1000], add_special_tokens=False)
    return {"rows_per_s": count / (time.perf_counter() - start)}


WAYS = {"ours": run_ours, "map": run_map, "bare": run_bare}


def measure(way: str, rows: Path, tokenizer: Path, count: int) -> dict[str, Any]:
    """One measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--way", way, "--rows", str(rows)]
        + ["--tokenizer", str(tokenizer), "--count", str(count)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        sys.exit(f"{way} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, print the table, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="directory of an HF tokenizer"
    )
    parser.add_argument("--rows", type=Path, help="Alpaca rows to make distinct ones from")
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--memory", action="store_true", help="also a million rows")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(WAYS[given.way](given.rows, given.tokenizer, given.count)))
        return
    with tempfile.TemporaryDirectory(prefix="arriero-bench-") as directory:
        report(given, Path(directory))


def report(given: argparse.Namespace, directory: Path) -> None:
    """The whole benchmark over rows in a directory."""
    rows = directory / "rows.jsonl"
    write_rows(rows, given.count, given.rows)
    ways = list(WAYS)
    try:
        import datasets  # noqa: F401
    except ImportError:
        print("datasets is not installed: dataset_vs_map is left out (pip install datasets)")
        ways.remove("map")
    rates: dict[str, list[float]] = {way: [] for way in ways}
    peaks = []
    for _ in range(int(os.environ.get("REPEATS", "3"))):
        for way in ways:
            found = measure(way, rows, given.tokenizer, given.count)
            rates[way].append(found["rows_per_s"])
            if way == "ours":
                peaks.append(found["peak_bytes"])
    rate = {way: statistics.median(values) for way, values in rates.items()}
    figures: dict[str, float] = {f"{way}_rows_per_s": round(rate[way]) for way in ways}
    figures["peak_mb"] = round(statistics.median(peaks) / 1e6)
    ratios = {"dataset_vs_encode_batch": round(rate["ours"] / rate["bare"], 3)}
    if "map" in rate:
        ratios["dataset_vs_map"] = round(rate["ours"] / rate["map"], 2)
    if given.memory:
        many = 1_000_000
        write_rows(rows, many, given.rows)
        found = measure("ours", rows, given.tokenizer, many)
        figures["peak_mb_million"] = round(found["peak_bytes"] / 1e6)
        figures["million_rows_per_s"] = round(found["rows_per_s"])
        figures["memory_ratio"] = round(found["peak_bytes"] / statistics.median(peaks), 3)
    table = Table("what", "figure", title=f"{given.count} rows, cutoff {CUTOFF}")
    for name, value in {**figures, **ratios}.items():
        table.add_row(name, f"{value:,}")
    Console().print(table)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {sys.platform}"
    line = {"bench": "dataset", "ratios": ratios, "figures": figures, "machine": machine}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
