"""Samples without padding give what the model gives for each of them alone."""

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import transformers  # noqa: E402
from torch.nn import functional  # noqa: E402

from arriero.training import fused, loss, products  # noqa: E402
from arriero.training.adapter import (  # noqa: E402
    attach,
    load_base,
    spare_activations,
    trained_weights,
)
from arriero.training.attention import sample_attention  # noqa: E402
from arriero.training.forward import Forward  # noqa: E402
from arriero.training.numerics import Numerics  # noqa: E402
from arriero.training.plan import Lora  # noqa: E402
from arriero.training.rotation import rotated  # noqa: E402
from arriero.training.rows import MASKED, Rows, collate  # noqa: E402

FLOAT = Numerics("cpu", torch.float32)
BFLOAT = Numerics("cpu", torch.bfloat16)
ROWS = [([5, 6, 7, 8, 9, 10, 11], 3), ([12, 13], 1), ([14, 15, 16, 17], 0), ([18] * 7, 2)]


def with_lora(base, *, dropout: float = 0.0):
    """LoRA whose B is not zero, so that A has gradients."""
    model = attach(base, Lora(4, 8, dropout, "all-linear"), base="sha256:0", seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in trained_weights(model).items():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return model


def one_by_one(model, rows: Rows, chosen) -> tuple[float, dict[str, torch.Tensor]]:
    """transformers' own loss and gradients, a row at a time."""
    total = 0.0
    for row in chosen:
        ids = torch.tensor([rows.ids(row).tolist()])
        labels = torch.tensor([rows.labels(row).tolist()])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        one = functional.cross_entropy(logits, labels[0, 1:], ignore_index=MASKED, reduction="sum")
        one.backward()
        total += float(one.detach())
    return total, taken(model)


def taken(model) -> dict[str, torch.Tensor]:
    gradients = {name: w.grad.clone() for name, w in trained_weights(model).items()}
    model.zero_grad(set_to_none=True)
    return gradients


def forwarded(model, rows: Rows, chosen, how=FLOAT) -> tuple[float, dict[str, torch.Tensor]]:
    total = Forward(model, how)(collate(rows, chosen))
    total.backward()
    return float(total.detach()), taken(model)


def same(found, expected, tolerance: float) -> None:
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    scale = max(float(gradient.abs().max()) for gradient in expected[1].values())
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(
            found[1][name], gradient, rtol=0, atol=tolerance * scale, msg=name
        )


@pytest.fixture
def rows(kit, tmp_path: Path) -> Rows:
    return Rows(kit.write_dataset(tmp_path / "rows", ROWS))


def test_loss_and_gradients_are_those_of_each_row_alone(model, rows):
    tuned = with_lora(load_base(model.path, torch.float32, "cpu"))
    expected = one_by_one(tuned, rows, range(4))
    same(forwarded(tuned, rows, range(4)), expected, 1e-5)


def test_in_bfloat16_they_are_nearly_so(model, rows):
    expected = one_by_one(with_lora(load_base(model.path, torch.float32, "cpu")), rows, range(4))
    tuned = with_lora(load_base(model.path, torch.bfloat16, "cpu"))
    same(forwarded(tuned, rows, range(4), BFLOAT), expected, 0.03)


SHAPE = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "extra"),
    [
        ("Granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5}),
        ("Mistral", {"sliding_window": 3}),
        ("Qwen2", {}),  # biases
        ("Qwen3", {}),  # norms of queries and keys
        ("Gemma", {}),  # norms that add 1 to their weight, scaled embeddings
        ("Gemma2", {"sliding_window": 3, "query_pre_attn_scalar": 8}),  # capped logits
    ],
)
def test_families_with_peculiarities_keep_them(config, extra, rows):
    torch.manual_seed(0)
    settings = getattr(transformers, config + "Config")(**SHAPE, **extra)
    base = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager")
    tuned = with_lora(base.eval())
    expected = one_by_one(tuned, rows, range(4))
    same(forwarded(tuned, rows, range(4)), expected, 1e-4)


def test_a_model_that_cannot_be_told_about_samples_runs_them_one_by_one(model, rows, monkeypatch):
    base = load_base(model.path, torch.float32, "cpu")
    tuned = with_lora(base)
    expected = one_by_one(tuned, rows, range(4))
    monkeypatch.setattr(type(base), "_supports_attention_backend", False)
    same(forwarded(tuned, rows, range(4)), expected, 1e-5)


def test_samples_do_not_see_each_other(model):
    """Another sample's tokens change, and not one bit of the others' states does."""
    base = load_base(model.path, torch.float32, "cpu")
    Forward(base, FLOAT)
    lengths, states = (5, 4, 3), []
    for middle in ([21, 22, 23, 24], [99, 98, 97, 96]):
        ids = torch.tensor([[3, 4, 5, 6, 7, *middle, 8, 9, 10]])
        places = torch.cat([torch.arange(n) for n in lengths])[None]
        with torch.no_grad():
            out = base.base_model(
                input_ids=ids, position_ids=places, use_cache=False, sample_lengths=lengths
            )
        states.append(out.last_hidden_state[0])
    assert torch.equal(states[0][:5], states[1][:5])
    assert torch.equal(states[0][9:], states[1][9:])
    assert not torch.equal(states[0][5:9], states[1][5:9])


def write_packed(directory: Path, plan: list[list[int]], samples) -> Path:
    """Sequences of samples, as a dataset with `packing` has them."""
    import pyarrow as pa

    directory.mkdir()
    kind = pa.list_(pa.int32())
    columns: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "lengths": []}
    for sequence in plan:
        picked = [samples[i] for i in sequence]
        columns["input_ids"].append([i for ids, _ in picked for i in ids])
        labels = [[MASKED] * start + ids[start:] for ids, start in picked]
        columns["labels"].append([i for item in labels for i in item])
        columns["lengths"].append([len(ids) for ids, _ in picked])
    schema = pa.schema([(name, kind) for name in columns])
    sink = pa.OSFile(str(directory / "data.arrow"), "wb")
    with sink, pa.ipc.new_file(sink, schema) as writer:
        for i in range(len(plan)):  # a record batch each
            part = [pa.array(values[i : i + 1], type=kind) for values in columns.values()]
            writer.write_batch(pa.record_batch(part, schema=schema))
    facts = {"rows": len(plan), "tokens": 1, "trained_tokens": 1, "packing": True, "samples": 4}
    (directory / "dataset.json").write_text(json.dumps(facts))
    return directory


def test_packed_samples_train_as_if_they_were_not(model, rows, tmp_path):
    packed = Rows(write_packed(tmp_path / "packed", [[1, 0], [3, 2]], ROWS))
    assert len(packed) == 2
    assert packed.samples(0) == [(0, 2), (2, 9)]
    assert packed.samples(1) == [(0, 7), (7, 11)]
    assert packed.trained([0, 1]) == rows.trained(range(4))
    tuned = with_lora(load_base(model.path, torch.float32, "cpu"))
    expected = one_by_one(tuned, rows, range(4))
    same(forwarded(tuned, packed, [0, 1]), expected, 1e-5)


@pytest.mark.parametrize("heads_of_keys", [1, 2, 4])
def test_attention_in_samples_has_torchs_own_gradients(heads_of_keys):
    torch.manual_seed(0)
    lengths = (6, 6, 3, 1)
    shapes = [(1, 4, 16, 8), (1, heads_of_keys, 16, 8), (1, heads_of_keys, 16, 8)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    grad = torch.randn(shapes[0])
    tokens_first = [item[0].transpose(0, 1) for item in inputs]
    found = products.attend(*tokens_first, lengths, 0.3).transpose(0, 1)[None]
    expected = sample_attention(*inputs, lengths, 0.3)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_loss_in_parts_is_cross_entropy(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(loss, "_LOGITS", 3 * 50)  # three tokens at a time
    hidden = torch.randn(10, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (10,))
    found = loss.token_loss(hidden, weight, labels, torch.float32)
    expected = functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found * 0.25, (hidden, weight))
    theirs = torch.autograd.grad(expected * 0.25, (hidden, weight))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_an_unlikely_label_has_a_finite_loss():
    hidden, weight = torch.tensor([[300.0]]), torch.tensor([[1.0], [-1.0]])
    found = loss.token_loss(hidden, weight, torch.tensor([1]), torch.float32)
    assert float(found) == pytest.approx(600)


def test_dropout_keeps_the_share_and_the_mean():
    torch.manual_seed(0)
    keep, share = fused._keep(torch.empty(400, 500), 0.05)
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert share == pytest.approx(0.05, abs=1e-5)
    assert float(keep.mean()) == pytest.approx(1 - share, abs=0.002)


def test_dropout_is_drawn_in_training_alone(model, rows):
    tuned = with_lora(load_base(model.path, torch.float32, "cpu"), dropout=0.5)
    run = Forward(tuned, FLOAT)
    micro = collate(rows, range(4))
    with torch.no_grad():
        run.train()
        trained = [float(run(micro)) for _ in range(2)]
        run.eval()
        judged = [float(run(micro)) for _ in range(2)]
        with tuned.disable_adapter():
            bare = float(run(micro))
    assert trained[0] != trained[1]
    assert judged[0] == judged[1] != bare


def test_layers_are_replaced_where_that_changes_nothing(model):
    tuned = with_lora(load_base(model.path, torch.float32, "cpu"))
    assert fused.install(tuned) == 2 * 7 + 2 * 2 + 1


@pytest.mark.parametrize("kept", [0, 256])
def test_attention_as_products_turns_heads_as_transformers_does(monkeypatch, kept):
    """With probabilities kept or computed again, samples of several lengths."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    monkeypatch.setattr(products, "_KEPT", kept)
    torch.manual_seed(0)
    lengths = (40, 33, 5, 5, 1)
    tokens = sum(lengths)
    inputs = [torch.randn(tokens, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    cos, sin = (torch.randn(tokens, 8) for _ in range(2))
    q, k, v = (item.transpose(0, 1)[None] for item in inputs)
    q, k = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    expected = sample_attention(q, k, v, lengths, 0.3)[0].transpose(0, 1)
    found = products.attend(*inputs, lengths, 0.3, (cos, sin))
    torch.testing.assert_close(found, expected)
    grad = torch.randn(found.shape)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_turn_as_transformers_turns_them(dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(0)
    inputs = [torch.randn(9, heads, 8, dtype=dtype, requires_grad=True) for heads in (4, 2)]
    half = torch.outer(torch.arange(9.0), 0.5 ** torch.arange(4))
    angles = torch.cat((half, half), dim=-1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    turned = apply_rotary_pos_emb(*(i.transpose(0, 1)[None] for i in inputs), cos[None], sin[None])
    for item, expected in zip(inputs, turned, strict=True):
        expected = expected[0].transpose(0, 1)
        found = rotated(item, cos, sin)
        assert found.dtype == dtype
        close = (
            {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 4e-2}
        )
        torch.testing.assert_close(found, expected, **close)
        grad = torch.randn(found.shape).to(dtype)
        ours, theirs = (torch.autograd.grad(out, item, grad) for out in (found, expected))
        torch.testing.assert_close(ours, theirs, **close)


@pytest.mark.parametrize(
    ("config", "halves"), [("Llama", 4), ("Qwen2", 4), ("Qwen3", 2), ("Gemma", 2)]
)
def test_halves_of_blocks_are_replaced_in_the_families_that_compute_so(config, halves):
    torch.manual_seed(0)
    settings = getattr(transformers, config + "Config")(**SHAPE)
    base = transformers.AutoModelForCausalLM.from_config(settings)
    run = Forward(with_lora(base), FLOAT)
    assert f"{halves} halves of blocks fused" in run.path


def test_what_threads_would_trip_over_keeps_to_one(model):
    def concurrent(lora: Lora, **given) -> bool:
        base = load_base(model.path, torch.float32, "cpu")
        tuned = attach(base, lora, base="sha256:0", seed=0)
        if given.pop("spare", False):
            spare_activations(tuned)
        return Forward(tuned, FLOAT, **given).concurrent

    assert concurrent(Lora(4, 8))
    assert not concurrent(Lora(4, 8, dora=True))
    assert not concurrent(Lora(4, 8), noise=5.0)
    assert not concurrent(Lora(4, 8), spare=True)
