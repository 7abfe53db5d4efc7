"""Whether `evaluate` measures what llama.cpp's `llama-perplexity` measures.

    LLAMA_PERPLEXITY=build/bin/llama-perplexity BENCH_TEXT=wiki.txt BENCH_REFERENCE=F16.gguf \\
        make bench BENCH=perplexity ARGS="Q8_0.gguf Q4_K_M.gguf"

Runs both over the same windows of a text (`BENCH_CONTEXT`, default 512;
`BENCH_CHUNKS`, default 8): perplexity of the reference and of each file, and each
file's KL divergence and top-token agreement against the reference. Prints both
figures side by side, and the largest relative differences as `perplexity_diff` and
`kl_diff`. `llama-perplexity` is built from the sources of the very llama.cpp that
is linked (target `llama-perplexity`, the portable flags of docker/build_llama.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from arriero.llama import Model
from arriero.quantization import scoring, windows

CONTEXT = int(os.environ.get("BENCH_CONTEXT", "512"))
CHUNKS = int(os.environ.get("BENCH_CHUNKS", "8"))


def peer(tool: str, model: Path, logits: Path, text: Path, *more: str) -> str:
    """What llama-perplexity prints."""
    command = [tool, "-m", str(model), "-c", str(CONTEXT), "-b", str(CONTEXT), "-f", str(text)]
    command += ["--chunks", str(CHUNKS), "--kl-divergence-base", str(logits), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def number(pattern: str, text: str) -> float:
    """The first group of a pattern that must be there."""
    found = re.search(pattern, text)
    if found is None:
        sys.exit(f"llama-perplexity printed nothing like {pattern!r}:\n{text[-2000:]}")
    return float(found[1])


def main() -> None:
    """Measure both ways, print the table, print the JSON line."""
    tool = os.environ["LLAMA_PERPLEXITY"]
    text = Path(os.environ["BENCH_TEXT"])
    reference = Path(os.environ["BENCH_REFERENCE"])
    files = [Path(argument) for argument in sys.argv[1:]]
    with Model(reference, vocab_only=True) as model:
        ids = model.tokenize(text.read_text(encoding="utf-8"))
        bos = model.bos if model.adds_bos else None
        vocabulary = model.n_vocab
    cut = windows.of_text(ids, CONTEXT, bos=bos, limit=CHUNKS)
    rows = sum(window.scored for window in cut)
    table = Table("file", "figure", "llama-perplexity", "arriero", "difference")
    worst = {"perplexity": 0.0, "kl": 0.0}

    def compare(name: str, figure: str, theirs: float, ours: float) -> None:
        difference = abs(ours - theirs) / abs(theirs)
        if figure in worst:
            worst[figure] = max(worst[figure], difference)
        table.add_row(name, figure, f"{theirs:.6f}", f"{ours:.6f}", f"{difference:.3%}")

    with tempfile.TemporaryDirectory(prefix="arriero-bench-") as directory:
        logits = Path(directory) / "logits"
        said = peer(tool, reference, logits, text)
        kept = np.memmap(
            Path(directory) / "kept", dtype=np.float32, mode="w+", shape=(rows, vocabulary)
        )
        own = scoring.score(reference, cut, keep=kept)
        theirs = number(r"PPL = ([\d.]+)", said)
        compare(reference.stem, "perplexity", theirs, own.perplexity)
        for path in files:
            said = peer(tool, path, logits, text, "--kl-divergence")
            own = scoring.score(path, cut, against=kept)
            for figure, pattern, value in (
                ("perplexity", r"Mean PPL\(Q\)\s*:\s*([\d.]+)", own.perplexity),
                ("kl", r"Mean\s+KLD:\s*([\d.]+)", own.kl_divergence),
                ("kl_max", r"Maximum KLD:\s*([\d.]+)", own.kl_max),
                ("top-1", r"Same top p:\s*([\d.]+)", 100 * own.top1_agreement),
            ):
                compare(path.stem, figure, number(pattern, said), value)
    Console().print(table)
    print(
        json.dumps(
            {
                "bench": "perplexity",
                "ratios": {},
                "figures": {
                    "perplexity_diff": worst["perplexity"],
                    "kl_diff": worst["kl"],
                    "scored_tokens": rows,
                },
            }
        )
    )


if __name__ == "__main__":
    main()
