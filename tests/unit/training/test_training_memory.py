"""What a training needs is told before it starts, and what would make it fit."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from arriero.errors import FailedPrecondition
from arriero.training.memory import Demand, fit

GB = 10**9
# Llama-2-7B.
CONFIG = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
LORA = Demand(
    config=CONFIG,
    parameters=6_738_415_616,
    linear=6_476_005_376,
    trained=4_194_304,
    full=False,
    base_bytes=2,
    quantization="",
    double=False,
    optimizer="adamw_torch",
    rows=4,
    length=512,
    gradient_checkpointing=False,
    host=False,
)
FULL = replace(LORA, full=True, trained=LORA.parameters)


def test_components_are_those_of_the_method():
    lora, full = LORA.need(), FULL.need()
    assert lora.weights == pytest.approx(13.5 * GB, rel=0.01)  # 16 bits
    assert lora.optimizer + lora.gradients < 0.1 * GB
    # Four bytes each for weights and gradients, eight for the two moments.
    assert full.weights + full.gradients + full.optimizer == pytest.approx(16 * LORA.parameters)


def test_a_quantized_base_takes_a_quarter_or_half_and_embeddings_stay():
    nf4 = replace(LORA, quantization="nf4", double=True).need().weights
    assert nf4 == pytest.approx(0.52 * LORA.linear + 2 * 262_410_240, rel=0.02)
    assert nf4 < replace(LORA, quantization="nf4").need().weights
    assert replace(LORA, quantization="int8").need().weights < LORA.need().weights * 0.55


def test_optimizer_states_of_8_bits_take_a_quarter_and_paged_ones_none():
    whole = FULL.need().optimizer
    assert replace(FULL, optimizer="adamw_8bit").need().optimizer == pytest.approx(
        whole / 4, rel=0.1
    )
    assert replace(FULL, optimizer="paged_adamw_8bit").need().optimizer == 0


def test_activations_grow_with_rows_and_shrink_with_gradient_checkpointing():
    need, half = LORA.need(), replace(LORA, rows=2).need()
    assert need.activations == 2 * half.activations
    assert need.logits == replace(LORA, rows=8).need().logits  # so many at a time
    assert replace(LORA, gradient_checkpointing=True).need().activations < need.activations / 8


def test_the_micro_batch_is_halved_until_it_fits():
    wide = replace(LORA, rows=16)
    assert fit(wide, wide.need().total, "a GPU") == 16
    assert fit(wide, wide.need().total - 1, "a GPU") == 8
    assert fit(wide, replace(LORA, rows=1).need().total, "a GPU") == 1


def test_what_may_just_fit_is_tried():
    one = replace(LORA, rows=1).need()
    assert fit(LORA, one.total - one.activations // 2, "a GPU") == 1
    with pytest.raises(FailedPrecondition):
        fit(LORA, one.total - one.activations // 2 - 2, "a GPU")


@pytest.mark.parametrize(
    ("demand", "free", "advice"),
    [
        (LORA, 12 * GB, "load_in_4bit: true would make it fit"),
        (replace(LORA, length=4096), 20 * GB, "gradient_checkpointing: true would make it fit"),
        (replace(LORA, base_bytes=4), 20 * GB, "dtype: bfloat16 would make it fit"),
        (FULL, 80 * GB, "optim: adamw_8bit would make it fit"),
        (FULL, 24 * GB, "method: lora would make it fit"),
        (FULL, 8 * GB, "method: lora with load_in_4bit: true would make it fit"),
        (LORA, 2 * GB, "no setting makes it fit"),
    ],
)
def test_what_can_not_fit_is_refused_with_figures_and_the_knob_that_helps(demand, free, advice):
    with pytest.raises(FailedPrecondition, match=advice) as caught:
        fit(demand, free, "this host")
    least = replace(demand, rows=1).need()
    assert caught.value.metadata["needed_bytes"] == str(least.total)
    assert f"weights {least.weights / 1e9:.2f} GB" in caught.value.message
    assert f"this host has {free / 1e9:.2f} GB free" in caught.value.message


def test_what_adapters_drop_is_kept_besides():
    dropping = replace(LORA, dropped=32 * 2 * 4096)  # two modules of each layer
    more = dropping.need().activations - LORA.need().activations
    assert more == LORA.tokens * 2 * 32 * 2 * 4096


# A training in a process of its own, and what it took at most. `ru_maxrss` would count the
# process that started this one too: a fork's peak outlives its exec.
CHILD = """
import json, re, sys
from arriero.training import allocator
allocator.settle()
from pathlib import Path
from arriero.operations.kinds import ResolveContext
from arriero.settings import SourceSettings
from arriero.store import Store
from arriero.testing.jobs import run_job
from arriero.training.job import train
from arriero.training.rows import Rows
from arriero.training.spec import demand_of, resolve
from arriero.v1 import training_pb2
from arriero.weights import Weights
store, fields = Store.open(sys.argv[1]), json.loads(sys.argv[4])
inputs = {"model": store.get(sys.argv[2]), "dataset": store.get(sys.argv[3])}
context = ResolveContext(store, {n: [a] for n, a in inputs.items()}, SourceSettings())
spec = resolve(training_pb2.TrainSpec(**fields), context).spec
path, rows = inputs["model"].path, spec.micro_batch_size
config = json.loads((path / "config.json").read_text())
longest = Rows(inputs["dataset"].path).longest(rows)
need = demand_of(spec, config, Weights.open(path), longest, rows, base_bytes=4).need()
run_job(train, "train", spec, inputs, store, Path(sys.argv[1]).parent)
peak = int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps({"estimate": need.total, "peak": 1024 * peak, "need": str(need)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("layers", "hidden", "method"),
    [
        (5, 512, {"lora": {"r": 8, "target_modules": ["all-linear"]}}),
        # More of them, as what is kept of each is little.
        (
            16,
            384,
            {"lora": {"r": 8, "target_modules": ["all-linear"]}, "gradient_checkpointing": True},
        ),
        (5, 512, {"method": "full"}),
    ],
)
def test_the_estimate_is_near_what_a_training_takes(
    kit, tmp_path: Path, layers, hidden, method
) -> None:
    """Within -10% and +50% of the peak of its process."""
    model = kit.model(hidden=hidden, layers=layers, inner=3 * hidden)
    random = np.random.default_rng(0)
    rows = [([int(i) for i in random.integers(3, 384, 448)], 1) for _ in range(8)]
    fields = {"max_steps": 1, "batch_size": 8, "micro_batch_size": 8, "dtype": "float32", **method}
    arguments = [tmp_path / "store", model.digest, kit.dataset(rows).digest, json.dumps(fields)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # the host's memory is what is measured
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.9 < found["estimate"] / found["peak"] < 1.5, found


def test_rows_count_with_their_own_lengths_and_not_as_if_padded():
    long, short = (
        replace(LORA, lengths=(512, 512, 512, 512)),
        replace(LORA, lengths=(512, 64, 64, 8)),
    )
    assert long.need() == LORA.need()
    assert short.tokens == 648
    assert short.need().activations == LORA.need().activations * 648 // 2048
    assert replace(short, rows=1).tokens == 512
    assert replace(short, length=100).tokens == 100 + 64 + 64 + 8


def test_the_longest_rows_come_first(kit, tmp_path):
    from arriero.training.rows import Rows

    drawn = [([3] * length, 1) for length in (4, 9, 2, 7)]
    rows = Rows(kit.write_dataset(tmp_path / "rows", drawn))
    assert rows.longest(2) == (9, 7)
    assert rows.longest(8) == (9, 7, 4, 2)
