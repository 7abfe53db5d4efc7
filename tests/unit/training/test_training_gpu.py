"""What differs on a GPU: kernels, types, optimizers that page, memory that runs out."""

import json
from dataclasses import replace
from functools import partial

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no GPU that torch can use", allow_module_level=True)

from arriero.operations.usage import GpuMeter  # noqa: E402
from arriero.testing.loops import make_loop, run_loop  # noqa: E402
from arriero.training import attention, blocks, fused  # noqa: E402
from arriero.training.attention import sample_attention  # noqa: E402
from arriero.training.memory import Demand  # noqa: E402
from arriero.training.numerics import Numerics, choose, peak_flops  # noqa: E402
from arriero.training.plan import Lora, Plan, Quantization  # noqa: E402
from arriero.training.rows import Rows, collate  # noqa: E402
from arriero.weights import Weights  # noqa: E402

PLAN = Plan(rows=12, max_steps=8, batch_size=4, micro_batch_size=2, learning_rate=1e-2, warmup=1)
LORA = Lora(rank=4, alpha=8, dropout=0.1, targets="all-linear")
WHOLE = replace(LORA, modules_to_save=("embed_tokens", "lm_head"))
NARROW, HALF, WIDE = (
    Numerics("cuda", dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)
)
METHODS = {
    "bfloat16": {},
    "float16": {"how": HALF},
    "float32": {"how": WIDE},
    "dora": {"lora": replace(LORA, dora=True)},
    "modules_to_save": {"lora": WHOLE},
    "full": {"lora": None},
    "nf4": {"quantization": Quantization(4)},
    "int8": {"quantization": Quantization(8)},
    "nf4 and dora": {"lora": replace(LORA, dora=True), "quantization": Quantization(4)},
    "8-bit AdamW": {"plan": replace(PLAN, optimizer="adamw_8bit"), "lora": WHOLE},
    "paged AdamW": {"plan": replace(PLAN, optimizer="paged_adamw_8bit"), "lora": WHOLE},
    "NEFTune": {"plan": replace(PLAN, neftune_alpha=5.0)},
    "checkpointing": {"plan": replace(PLAN, gradient_checkpointing=True)},
}


make = partial(make_loop, plan=PLAN, lora=LORA, how=NARROW)


# With bitsandbytes 0.50.2 on an H200: with PEFT's own layers and nothing fused too.
GARBAGE = pytest.mark.xfail(
    reason="gradients of the first layer are garbage from the sixth step on",
    strict=False,
)


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=GARBAGE) if m == "nf4 and dora" else m for m in METHODS],
)
def test_every_method_learns_and_goes_on_from_a_checkpoint(model, dataset, tmp_path, method):
    straight = make(model, dataset, **METHODS[method])
    expected = run_loop(straight)
    assert min(expected[-3:]) < expected[0]
    first = make(model, dataset, **METHODS[method])
    run_loop(first, 3)
    torch.save(first.tensors(), tmp_path / "tensors")
    second = make(model, dataset, **METHODS[method])
    second.restore(
        torch.load(tmp_path / "tensors", map_location="cpu", weights_only=True),
        json.loads(json.dumps(first.state.to_dict())),
    )
    # Kernels of a GPU add in another order each time.
    assert second.probe() == pytest.approx(first.probe(), rel=2e-3)
    assert run_loop(second) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("heads_of_keys", [1, 4])
def test_one_kernel_attends_as_samples_apart(heads_of_keys):
    torch.manual_seed(0)
    lengths = (40, 33, 5, 5, 1)
    shapes = [(sum(lengths), heads, 16) for heads in (4, heads_of_keys, heads_of_keys)]
    inputs = [
        torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes
    ]
    exact = [item.detach().double().requires_grad_() for item in inputs]
    assert attention._flashes(inputs[0])
    found = attention.whole_heads(*inputs, lengths, 0.3)
    q, k, v = (item.transpose(0, 1)[None] for item in exact)
    expected = sample_attention(q, k, v, lengths, 0.3)[0].transpose(0, 1)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    grad = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, grad.bfloat16()),
        torch.autograd.grad(expected, exact, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("how", [NARROW, WIDE], ids=str)
@pytest.mark.parametrize("quantization", [None, Quantization(4)], ids=str)
def test_what_is_fused_gives_loss_and_gradients_of_what_is_not(
    model, dataset, monkeypatch, how, quantization
):
    rows = Rows(dataset.path)
    lora = replace(LORA, dropout=0.0)

    def taken() -> tuple[float, dict[str, torch.Tensor], str]:
        loop = make(model, dataset, lora=lora, how=how, quantization=quantization)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, weight in loop._weights.items():
                if "lora_B" in name:
                    weight.normal_(std=0.1)
        loop._forward.train()
        loss = loop._forward(collate(rows, range(6)))
        loss.backward()
        found = {n: w.grad.clone() for n, w in loop._weights.items()}
        return float(loss.detach()), found, loop.path

    loss, gradients, path = taken()
    assert "4 halves of blocks fused" in path
    monkeypatch.setattr(fused, "install", lambda _: 0)
    monkeypatch.setattr(blocks, "install", lambda _: 0)
    plain, expected, _ = taken()
    close = 1e-4 if how is WIDE else 2e-2
    assert loss == pytest.approx(plain, rel=close)
    for name, gradient in gradients.items():
        size = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=3 * close * size)


def test_bfloat16_and_the_cards_peak_are_found():
    assert choose("auto").device == "cuda"
    peak = peak_flops(NARROW)
    assert peak is None or 1e13 < peak < 1e16


def test_memory_that_runs_out_halves_the_micro_batch_and_keeps_the_batch(model, dataset):
    even = replace(LORA, dropout=0.0)
    loop = make(model, dataset, plan=replace(PLAN, micro_batch_size=4), lora=even)
    expected = make(model, dataset, lora=even)
    inner, real = loop._forward.forward, torch.cuda.get_device_properties(0).total_memory
    asked = 0

    def hungry(micro):
        nonlocal asked
        if len(micro.lengths) > 2:
            asked += 1
            torch.empty(2 * real, dtype=torch.uint8, device="cuda")
        return inner(micro)

    loop._forward.forward = hungry
    losses = run_loop(loop)
    assert (asked, loop.micro_batch_size) == (1, 2)
    assert losses == pytest.approx(run_loop(expected), rel=2e-2)


def test_a_process_that_computes_sees_its_card():
    torch.zeros(1 << 20, device="cuda")
    found = GpuMeter().sample()
    assert found
    assert found[0].uuid.startswith("GPU-")
    assert 0 <= found[0].utilization_ratio <= 1
    assert 0 < found[0].memory_used_bytes < found[0].memory_total_bytes


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj")], ids=str)
def test_the_estimate_is_near_what_a_training_takes(kit, micro, targets):
    """Within -10% and +60% of the card's peak, whatever libraries hold on to apart."""
    model = kit.model(dtype="bfloat16", hidden=1024, layers=8, inner=2816)
    rows = [([3 + (7 * i + j) % 300 for j in range(1024)], 1) for i in range(8)]
    dataset = kit.dataset(rows, model.digest)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    plan = replace(PLAN, rows=8, max_steps=2, micro_batch_size=micro)
    loop = make(model, dataset, plan=plan, lora=Lora(rank=8, targets=targets))
    run_loop(loop)
    peak = torch.cuda.max_memory_allocated() - before
    weights = Weights.open(model.path)
    demand = Demand(
        config=json.loads((model.path / "config.json").read_text()),
        parameters=weights.elements,
        linear=0,
        trained=sum(weight.numel() for weight in loop._weights.values()),
        full=False,
        base_bytes=2,
        quantization="",
        double=False,
        optimizer="adamw_torch",
        rows=micro,
        length=1024,
        gradient_checkpointing=False,
        host=False,
        dropped=8 * (7 * 1024 + 1792 if targets == "all-linear" else 2 * 1024),
    )
    assert 0.9 < demand.need().total / peak < 1.6, (demand.need(), peak)
