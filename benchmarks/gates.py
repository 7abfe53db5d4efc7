"""The scoreboard: fifteen known failures of such pipelines, and healthy runs beside them.

    make bench BENCH=gates

Seeds each failure into real work (the rooms' own job functions, over a real store)
for every tokenizer family and weight type, and counts those that are detected in
every case: `gates_detected` of 15. A failure is detected where the work is refused
with a reason, or a gate fails; a gate that only warns counts where that is its
default mode. Then at least 200 healthy runs: `gates_false_alarms` counts those that
any gate refuses, or that fail.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

# Before any library is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

from _gate_failures import FAILURES, Case
from _gate_rooms import DTYPES, FAMILIES, Outcome, Rooms, alpaca_rows
from rich.console import Console
from rich.table import Table


def main() -> None:
    """Seed, run, print both tables and the JSON line."""
    warnings.simplefilter("ignore")
    only = sys.argv[1:]
    console = Console(width=140)
    table = Table("failure", "seeded", "detected", "by", "seconds", title="Known failures")
    detected = 0
    names = []
    for failure in FAILURES:
        if only and failure.name not in only:
            continue
        started = time.monotonic()
        found = [judge(failure.seed, case) for case in cases(failure.families, failure.dtypes)]
        flat = [how for several in found for how in several]
        good = all(flat) and bool(flat)
        print(f"{failure.name}: {sum(map(bool, flat))} of {len(flat)}", file=sys.stderr, flush=True)
        detected += good
        names += [] if good else [failure.name]
        by = ", ".join(dict.fromkeys(how for how in flat if how))
        table.add_row(
            failure.name, str(len(flat)), str(sum(map(bool, flat))), by,
            f"{time.monotonic() - started:.0f}",
        )  # fmt: skip
    console.print(table)
    alarms: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    if not only or "healthy" in only:
        for kind, problem in healthy():
            if problem:
                print(f"healthy {kind}: {problem}", file=sys.stderr, flush=True)
            counts[kind] = counts.get(kind, 0) + 1
            if problem:
                alarms.setdefault(kind, []).append(problem)
        table = Table("healthy runs", "runs", "false alarms", "what was said")
        for kind, count in counts.items():
            said = alarms.get(kind, [])
            table.add_row(kind, str(count), str(len(said)), "; ".join(said[:2]))
        console.print(table)
    print(
        json.dumps(
            {
                "bench": "gates",
                "ratios": {},
                "figures": {
                    "gates_detected": detected,
                    "gates_failures": len(FAILURES),
                    "gates_undetected": names,
                    "gates_healthy": sum(counts.values()),
                    "gates_false_alarms": sum(len(said) for said in alarms.values()),
                },
            }
        )
    )


def cases(families: tuple[str, ...], dtypes: tuple[str, ...]) -> Iterator[Case]:
    """One home for each variant, gone afterwards."""
    for family, dtype in itertools.product(families, dtypes):
        with tempfile.TemporaryDirectory(prefix="arriero-gates-") as directory:
            yield Case(Rooms(Path(directory)), family, dtype)


def judge(seed: Callable[[Case], list[str]], case: Case) -> list[str]:
    """What detected each seeded failure; an empty word where nothing did."""
    try:
        return seed(case)
    except Exception:  # a defect of the product or of the seed: not detected
        traceback.print_exc(limit=-2)
        return [""]


# -- healthy runs ----------------------------------------------------------------


def healthy() -> Iterator[tuple[str, str]]:
    """Kind of each healthy run, and what was wrong with it (nothing, one hopes)."""
    for family, dtype in itertools.product(FAMILIES, DTYPES):
        with tempfile.TemporaryDirectory(prefix="arriero-gates-") as directory:
            yield from _of_model(Rooms(Path(directory)), family, dtype)


def _of_model(rooms: Rooms, family: str, dtype: str) -> Iterator[tuple[str, str]]:
    """About 36 runs over one model: as many ways as people use it."""
    model = rooms.model(family, dtype)
    yield "import", _problem(_imported(rooms, family, dtype))
    for template, knobs in itertools.product(
        ("alpaca", "vicuna", *(("chatml", "model") if family != "sentencepiece" else ("llama-2",))),
        (
            {},
            {"train_on_inputs": True},
            {"packing": True, "cutoff_len": 1024},
            {"val_set_size": 4},
        ),
    ):
        rows = alpaca_rows(seed=len(template))
        yield "dataset", _problem(rooms.rows(model, rows, template=template, **knobs))
    text = [{"text": row["output"] + ". " + row["instruction"]} for row in alpaca_rows(24)]
    plain = rooms.rows(model, text, format="text", cutoff_len=64)
    yield "dataset", _problem(plain)
    template = "alpaca" if family == "sentencepiece" else "chatml"
    rows = rooms.rows(model, template=template, val_set_size=4)
    yield "dataset", _problem(rows)

    options: tuple[dict[str, object], ...] = (
        {},
        {"r": 8, "alpha": 4.0, "seed": 1},
        {"use_rslora": True, "seed": 2},
        {"targets": ("down_proj", "o_proj"), "dtype": "float16"},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 16}},
    )
    imported = []
    for option in options:
        outcome = rooms.adapter(model, **option)
        yield "import", _problem(outcome)
        imported.append(outcome.first())
    for adapter in imported:
        yield "merge", _problem(rooms.merge(model, adapter))
    yield "merge", _problem(rooms.merge(model, *imported[:2], weights=[0.5, 0.7]))
    yield "merge", _problem(rooms.merge(model, imported[0], dtype="bfloat16"))

    trained = []
    for lora, fields in (
        ({}, {"dtype": dtype}),
        ({"use_dora": True}, {}),
        ({"use_rslora": True, "target_modules": ["q_proj", "v_proj"]}, {}),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
    ):
        outcome = rooms.train(model, rows.first(), lora=lora, **fields)
        yield "train", _problem(outcome)
        trained.append(outcome.first())
    merged = []
    for adapter in trained:
        outcome = rooms.merge(model, adapter)
        yield "merge", _problem(outcome)
        merged.append(outcome.first())
    made = rooms.quantize(merged[0], "F16", "Q8_0", "Q4_0")
    yield "quantize", _problem(made)
    yield "evaluate", _problem(rooms.evaluate(*made.artifacts.values()))
    yield "quantize", _problem(rooms.quantize(merged[3], "Q8_0"))


def _imported(rooms: Rooms, family: str, dtype: str) -> Outcome:
    from arriero.testing.models import tiny_llama
    from arriero.v1 import merging_pb2

    directory = rooms.place("source")
    tiny_llama(directory, dtype=dtype, tokenizer=family, seed=7)  # type: ignore[arg-type]
    return rooms.run("import", merging_pb2.ImportSpec(source=str(directory)))


def _problem(outcome: Outcome) -> str:
    """Why a healthy run was stopped; empty when it was not."""
    if outcome.error is not None:
        return f"{type(outcome.error).__name__}: {outcome.error.message[:120]}"
    return "; ".join(
        f"{gate.gate}: {gate.detail[:120]}" for gate in outcome.gates if gate.gate in outcome.failed
    )


if __name__ == "__main__":
    main()
