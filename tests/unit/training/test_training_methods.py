"""Every method: what it trains, that it learns, that it resumes exactly, what comes out."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from arriero.errors import FailedPrecondition, Preempted  # noqa: E402
from arriero.gates import Verdict  # noqa: E402
from arriero.gates.golden import Golden, compare  # noqa: E402
from arriero.testing.jobs import run_job  # noqa: E402
from arriero.testing.loops import make_loop, run_loop  # noqa: E402
from arriero.training import adapter  # noqa: E402
from arriero.training.job import train  # noqa: E402
from arriero.training.loop import Loop  # noqa: E402
from arriero.training.neftune import with_noise  # noqa: E402
from arriero.training.numerics import Numerics  # noqa: E402
from arriero.training.optimizers import check_optimizer  # noqa: E402
from arriero.training.plan import Lora, Plan, Quantization  # noqa: E402
from arriero.training.rows import Rows, collate  # noqa: E402
from arriero.training.spec import resolve  # noqa: E402
from arriero.v1 import training_pb2  # noqa: E402
from arriero.weights import Weights  # noqa: E402
from arriero.weights.health import check_adapter, check_model  # noqa: E402

CPU = Numerics("cpu", torch.float32)
PLAN = Plan(rows=12, max_steps=8, batch_size=4, micro_batch_size=2, learning_rate=1e-2, warmup=1)
LORA = Lora(rank=4, alpha=8, dropout=0.1, targets="all-linear")
WHOLE = replace(LORA, modules_to_save=("embed_tokens", "lm_head"))
METHODS = {
    "lora": {},
    "dora": {"lora": replace(LORA, dora=True)},
    "modules_to_save": {"lora": WHOLE},
    "full": {"lora": None},
    "full in bfloat16": {"lora": None, "how": Numerics("cpu", torch.bfloat16)},
    "modules_to_save in bfloat16": {"lora": WHOLE, "how": Numerics("cpu", torch.bfloat16)},
    "nf4": {"quantization": Quantization(4)},
    "int8": {"quantization": Quantization(8)},
    "nf4 and dora": {"lora": replace(LORA, dora=True), "quantization": Quantization(4)},
    "8-bit AdamW": {"plan": replace(PLAN, optimizer="adamw_8bit"), "lora": WHOLE},
    "NEFTune": {"plan": replace(PLAN, neftune_alpha=5.0)},
}


def tie(place: Path) -> None:
    """Make a model's output layer its embeddings."""
    from safetensors.torch import load_file, save_file

    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(str(place / "model.safetensors"))
    del tensors["lm_head.weight"]
    save_file(tensors, str(place / "model.safetensors"), metadata={"format": "pt"})


make = partial(make_loop, plan=PLAN, lora=LORA, how=CPU)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_training_is_the_same_training_and_learns(model, dataset, tmp_path, method):
    straight = make(model, dataset, **METHODS[method])
    expected = run_loop(straight)
    assert min(expected[-3:]) < expected[0]
    first = make(model, dataset, **METHODS[method])
    run_loop(first, 3)
    torch.save(first.tensors(), tmp_path / "tensors")
    # A checkpoint holds what is trained and never the base.
    names = set(first.tensors()["weights"])
    if "full" not in method:
        assert not [name for name in names if "base_layer" in name]
    second = make(model, dataset, **METHODS[method])
    second.restore(
        torch.load(tmp_path / "tensors", weights_only=True),
        json.loads(json.dumps(first.state.to_dict())),
    )
    assert second.probe() == pytest.approx(first.probe(), abs=1e-6)
    assert run_loop(second) == pytest.approx(expected, abs=1e-5)
    for name, weight in straight.tensors()["weights"].items():
        torch.testing.assert_close(second.tensors()["weights"][name], weight)


def trained(loop: Loop) -> dict[str, torch.Tensor]:
    return loop.tensors()["weights"]


def test_dora_starts_as_the_base_and_trains_its_magnitudes(kit):
    model = kit.model(dtype="bfloat16")
    dataset = kit.dataset(kit.draw_rows(12), model.digest)
    how = Numerics("cpu", torch.bfloat16)
    loop = make(model, dataset, lora=replace(LORA, dora=True, dropout=0.0), how=how)
    plain = make(model, dataset, lora=replace(LORA, dropout=0.0), how=how)
    # PEFT's own norms, rounded to bfloat16, would already scale every row wrongly.
    assert loop.probe() == pytest.approx(plain.probe(), rel=2e-3)
    before = {n: w.clone() for n, w in trained(loop).items() if "magnitude" in n}
    assert len(before) == 2 * 7
    assert {w.dtype for w in before.values()} == {torch.float32}
    run_loop(loop)
    assert any(not torch.equal(w, trained(loop)[n]) for n, w in before.items())


def test_modules_to_save_are_trained_in_float32_over_a_narrow_base(kit):
    model = kit.model(dtype="bfloat16")
    dataset = kit.dataset(kit.draw_rows(12), model.digest)
    loop = make(model, dataset, lora=WHOLE, how=Numerics("cpu", torch.bfloat16))
    saved = {n: w.clone() for n, w in trained(loop).items() if "modules_to_save" in n}
    assert len(saved) == 2
    assert {w.dtype for w in saved.values()} == {torch.float32}
    # What flows through the layers stays narrow.
    width = loop.model.get_input_embeddings()(torch.tensor([[5]])).dtype
    assert width == torch.bfloat16
    run_loop(loop)
    assert all(not torch.equal(w, trained(loop)[n]) for n, w in saved.items())


def test_tied_embeddings_stay_tied_and_are_trained_once(kit):
    model = kit.model(tweak=tie)
    dataset = kit.dataset(kit.draw_rows(12), model.digest)
    loop = make(model, dataset, lora=replace(LORA, modules_to_save=("embed_tokens", "lm_head")))
    run_loop(loop)
    core = adapter.core(loop.model)
    above = core.get_input_embeddings().modules_to_save["default"].weight
    below = core.get_output_embeddings().modules_to_save["default"].weight
    assert above.data_ptr() == below.data_ptr()
    assert len([name for name in trained(loop) if "modules_to_save" in name]) == 1


def test_patterns_set_rank_and_alpha_by_module(model, dataset):
    lora = replace(
        LORA, rank_pattern={"q_proj": 2}, alpha_pattern={"layers.1.self_attn.v_proj": 64.0}
    )
    loop = make(model, dataset, lora=lora)
    ranks = {
        name.split(".lora_A")[0].rsplit(".", 1)[-1]: weight.shape[0]
        for name, weight in trained(loop).items()
        if "lora_A" in name
    }
    assert ranks["q_proj"] == 2
    assert ranks["k_proj"] == 4
    layers = adapter.core(loop.model).model.layers
    assert layers[1].self_attn.v_proj.scaling["default"] == 64 / 4
    assert layers[0].self_attn.v_proj.scaling["default"] == 8 / 4


@pytest.mark.parametrize(("bits", "dtype"), [(4, torch.uint8), (8, torch.int8)])
def test_a_quantized_base_is_held_in_few_bits_but_for_what_is_trained_whole(
    model, dataset, bits, dtype
):
    lora = replace(LORA, targets=("q_proj",), modules_to_save=("o_proj", "embed_tokens"))
    loop = make(model, dataset, lora=lora, quantization=Quantization(bits))
    core = adapter.core(loop.model)
    layer = core.model.layers[0]
    assert layer.self_attn.q_proj.base_layer.weight.dtype == dtype
    assert layer.mlp.up_proj.weight.dtype == dtype
    assert layer.self_attn.o_proj.modules_to_save["default"].weight.dtype == torch.float32
    assert core.lm_head.weight.dtype == torch.float32
    run_loop(loop)


def test_8_bit_states_are_8_bits_where_a_tensor_is_large_enough(model, dataset):
    loop = make(model, dataset, lora=WHOLE, plan=replace(PLAN, optimizer="adamw_8bit"))
    run_loop(loop)
    kinds = {
        state["state1"].dtype
        for weight, state in loop._optimizer.state.items()
        if weight.numel() >= 4096
    }
    assert kinds == {torch.uint8}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_paging_without_a_gpu_is_refused_before_anything_is_loaded():
    with pytest.raises(FailedPrecondition, match="use adamw_8bit"):
        check_optimizer("paged_adamw_8bit", "cpu")


def test_adam_gets_its_betas_and_epsilon(model, dataset):
    plan = replace(PLAN, betas=(0.8, 0.95), epsilon=1e-6, weight_decay=0.1)
    (group,) = make(model, dataset, plan=plan)._optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.95), 1e-6, 0.1)


def test_noise_is_on_the_embeddings_in_training_alone(model, dataset):
    loop = make(model, dataset, plan=replace(PLAN, neftune_alpha=5.0))
    micro = collate(Rows(dataset.path), [0, 1])
    with torch.no_grad():
        loop._forward.eval()
        assert torch.equal(loop._forward(micro), loop._forward(micro))
        loop._forward.train()
        assert not torch.equal(loop._forward(micro), loop._forward(micro))


def test_the_noise_of_a_sample_follows_its_own_length():
    noise = with_noise(torch.zeros(1, 100, 64), (90, 10), alpha=5.0)[0].abs()
    for part, length in ((noise[:90], 90), (noise[90:], 10)):
        bound = 5 / (length * 64) ** 0.5
        assert 0.9 * bound < float(part.max()) <= bound


def test_float16_on_this_device_skips_steps_until_its_scale_is_found(model, dataset):
    loop = make(model, dataset, how=Numerics("cpu", torch.float16))
    loop._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    losses = run_loop(loop)
    assert loop.state.skipped > 0
    assert loop.state.not_finite == []
    assert len(losses) == 8
    assert loop.state.step == 8


# The whole job

FAST = {
    "max_steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "dtype": "float32",
    "save_steps": 2,
    "lora": {"r": 4, "target_modules": ["all-linear"]},
}


@pytest.fixture
def room(kit, tmp_path: Path):
    """Resolves and runs a spec, as the service and its job do."""

    def run(inputs, prepare=None, **fields):
        spec = training_pb2.TrainSpec(**{**FAST, **fields})
        resolved = resolve(spec, kit.context(**inputs)).spec
        return run_job(train, "train", resolved, inputs, kit.store, tmp_path, prepare=prepare)

    return run


def logits(directory: Path, sequences, peft: Path | None = None) -> np.ndarray:
    """transformers' own float32, with PEFT's own unmerged adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32)
    if peft is not None:
        model = PeftModel.from_pretrained(model, str(peft))
    model.eval()
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([ids])).logits[0].numpy() for ids in sequences]
    return np.concatenate(rows)


@pytest.mark.parametrize(
    "fields",
    [
        {"load_in_4bit": True},
        {"load_in_8bit": True},
        {"lora": {**FAST["lora"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 2}}},
        {"optim": "adamw_8bit", "neftune_noise_alpha": 5},
        {"lora": {**FAST["lora"], "use_dora": True}},
        {"lora": {**FAST["lora"], "use_dora": True}, "load_in_4bit": True},
        {"lora": {**FAST["lora"], "modules_to_save": ["embed_tokens", "lm_head"]}},
    ],
    ids=str,
)
def test_golden_logits_are_those_of_the_adapter_on_the_base_as_it_is_stored(
    room, model, dataset, fields
):
    made, golden = room({"model": model, "dataset": dataset}, **fields)
    assert check_adapter(made.path, base=Weights.open(model.path)) == []
    read = Golden.read(golden.path)
    own = logits(model.path, [ids.tolist() for ids in read.sequences], made.path)
    found = compare(read, own)
    assert found.kl_divergence < 2e-4  # what golden's fp16 leaves
    assert found.top1_agreement == 1
    report = json.loads((golden.path / "report.json").read_text())
    held = "nf4" if "load_in_4bit" in fields else "int8" if "load_in_8bit" in fields else "float32"
    assert (report["base"], report["trained_on"]) == (model.digest, held)


@pytest.mark.parametrize("fields", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_a_quantized_base_is_trained_after_it_was_validated(
    room, model, dataset, val_dataset, fields
):
    inputs = {"model": model, "dataset": dataset, "val_dataset": val_dataset}
    made, _ = room(inputs, dtype="bfloat16", **fields)
    assert check_adapter(made.path, base=Weights.open(model.path)) == []


@pytest.mark.parametrize("names", [["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"]])
def test_golden_logits_of_tied_embeddings_that_were_trained(kit, room, names):
    model = kit.model(tweak=tie)
    dataset = kit.dataset(kit.draw_rows(12), model.digest)
    lora = {**FAST["lora"], "modules_to_save": names}
    made, golden = room({"model": model, "dataset": dataset}, lora=lora)
    assert check_adapter(made.path, base=Weights.open(model.path)) == []
    read = Golden.read(golden.path)
    own = logits(model.path, [ids.tolist() for ids in read.sequences], made.path)
    assert compare(read, own).kl_divergence < 2e-4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_full_fine_tuning_gives_a_model_in_the_bases_types(kit, room, dtype, tied):
    model = kit.model(dtype=dtype, tweak=tie if tied else None)
    dataset = kit.dataset(kit.draw_rows(12), model.digest)
    seen = []
    made, golden = room(
        {"model": model, "dataset": dataset}, seen.append, method="full", dtype=dtype
    )

    assert (made.name, made.kind, made.golden) == ("model", "model", "output:golden")
    base, whole_model = Weights.open(model.path), Weights.open(made.path)
    assert {n: (i.dtype, i.shape) for n, i in whole_model.items()} == {
        n: (i.dtype, i.shape) for n, i in base.items()
    }
    assert check_model(made.path, base) == []
    names = {path.name for path in made.path.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer.model", "arriero-template.json"} <= names
    verdicts = {item.gate: item.verdict for item in seen[0].gates.results}
    assert verdicts["adapter.health"] is Verdict.PASSED
    read = Golden.read(golden.path)
    sequences = [ids.tolist() for ids in read.sequences]
    assert compare(read, logits(made.path, sequences)).kl_divergence < 2e-4
    assert compare(read, logits(model.path, sequences)).kl_divergence > 1e-3


def test_a_preempted_full_fine_tuning_goes_on(kit, room, model, dataset, tmp_path):
    def stop(job):
        update = job.meter.update

        def watched(**now):
            update(**now)
            if now["phase"] == "training" and now["step"] >= 3:
                job.preempted.set()

        job.meter.update = watched

    inputs = {"model": model, "dataset": dataset}
    with pytest.raises(Preempted, match="step 3 of 6"):
        room(inputs, stop, method="full")
    resumed = room(inputs, method="full")
    (tmp_path / "staging").rename(tmp_path / "first")
    straight = room(inputs, method="full")
    files = [tmp_path / "first/attempts/1/outputs/model/model.safetensors"]
    files.append(straight[0].path / "model.safetensors")
    assert files[0].read_bytes() == files[1].read_bytes()
    assert resumed[0].metrics == pytest.approx(straight[0].metrics)
