"""Merged values, against PEFT's own merge."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arriero.errors import FailedPrecondition
from arriero.testing.adapters import tiny_adapter
from arriero.testing.models import tiny_llama
from arriero.weights import MergedWeights, Weights, spacing
from arriero.weights.health import check_adapter

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
DTYPES = ["float32", "bfloat16", "float16"]


def load(base: Path, dtype: str = "float32", rows: int = 0) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=getattr(torch, dtype))
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def trained(
    base: Path, place: Path, *, dtype: str = "float32", rows: int = 0, seed: int = 0, **config: Any
) -> Path:
    """An adapter as PEFT saves it, with every trained value moved by chance."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ALL, **config}
    model = get_peft_model(load(base, dtype, rows), LoraConfig(task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.05
            if "magnitude" in name:  # a norm
                parameter.abs_()
    model.save_pretrained(str(place), **({"save_embedding_layers": True} if rows else {}))
    return place


def merged_by_peft(
    base: Path, adapter: Path, dtype: str = "float32", rows: int = 0
) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    model: Any = PeftModel.from_pretrained(load(base, dtype, rows), str(adapter))
    return dict(model.merge_and_unload().state_dict())


def check_equal(ours: MergedWeights, theirs: dict[str, torch.Tensor]) -> None:
    """Equal names, types and shapes, and values within one unit in the last place."""
    expected = dict(theirs)
    if HEAD not in ours:
        assert expected.pop(HEAD).equal(expected[EMBEDDINGS])
    assert set(ours) == set(expected)
    for name, plan in ours.items():
        found, right = ours.tensor(name), expected[name]
        assert plan.shape == tuple(found.shape) == tuple(right.shape), name
        assert found.dtype == right.dtype, name
        off = (found.double() - right.double()).abs() / spacing(right.double(), right.dtype)
        assert off.max() <= 1.0, f"{name}: {off.max()} ulp"


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny base of a type, made once; `tied` has no output layer of its own."""
    made: dict[tuple[str, bool], Path] = {}

    def find(dtype: str = "float32", tied: bool = False) -> Path:
        if (dtype, tied) not in made:
            place = tmp_path_factory.mktemp("base")
            model = load(tiny_llama(place / "plain"), dtype)
            if tied:
                model.config.tie_word_embeddings = True
                model.tie_weights()
            model.save_pretrained(str(place / "saved"))
            made[dtype, tied] = place / "saved"
        return made[dtype, tied]

    return find


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 1.5, "layers.0.mlp.*": 3}},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {
            "modules_to_save": ["norm", "input_layernorm", "layers.1.mlp"],
            "target_modules": ["q_proj"],
        },
        {"target_modules": [*ALL, "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
        {
            "rank_pattern": {"^model.layers.1.self_attn.o_proj": 2},
            "alpha_pattern": {"^model.layers.0.*": 11},
            "exclude_modules": ["k_proj"],
            "use_rslora": True,
            "init_lora_weights": "orthogonal",
        },
        {"target_modules": ["o_proj"], "modules_to_save": ["self_attn.q_proj"]},
        {"target_modules": "all-linear", "r": 1},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"fan_in_fan_out": True},  # wrong for linear layers; PEFT ignores it
    ],
    ids=[
        "plain",
        "rslora",
        "dora",
        "patterns",
        "embeddings saved",
        "other modules saved",
        "embeddings",
        "embeddings dora",
        "anchored patterns",
        "a linear layer saved",
        "all linear, rank 1",
        "one layer",
        "fan in fan out",
    ],
)
def test_every_method_gives_what_peft_gives(
    tmp_path: Path, base_of: Callable[..., Path], dtype: str, config: dict[str, Any]
) -> None:
    base = base_of(dtype)
    adapter = trained(base, tmp_path / "a", dtype=dtype, **config)
    ours = MergedWeights.open(base, [adapter], [1.0])
    check_equal(ours, merged_by_peft(base, adapter, dtype))
    before = Weights.open(base)
    assert all(not ours.tensor(name).equal(before.tensor(name)) for name in ours.touched)
    assert {n for n in ours if ours.raw(n) is not None} == set(before) - set(ours.touched)
    assert check_adapter(adapter, base=before) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [400, 380], ids=["grown", "shrunk"])
@pytest.mark.parametrize(
    "config",
    [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}],
    ids=["saved beside", "modules to save"],
)
def test_a_resized_vocabulary_comes_with_the_adapter(
    tmp_path: Path,
    base_of: Callable[..., Path],
    dtype: str,
    tied: bool,
    rows: int,
    config: dict[str, Any],
) -> None:
    base = base_of(dtype, tied)
    adapter = trained(base, tmp_path / "a", dtype=dtype, rows=rows, **config)
    ours = MergedWeights.open(base, [adapter], [1.0])
    check_equal(ours, merged_by_peft(base, adapter, dtype, rows))
    assert check_adapter(adapter, base=Weights.open(base)) == []
    assert ours.config["vocab_size"] == rows
    assert ours[EMBEDDINGS].shape == (rows, 64)
    assert ours.untied == (tied and bool(config))
    assert ours.config["tie_word_embeddings"] == (tied and not config)


@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=["head", "embeddings", "both"],
)
def test_tied_layers_that_were_trained_apart_are_untied(
    tmp_path: Path, base_of: Callable[..., Path], config: dict[str, Any]
) -> None:
    base = base_of("bfloat16", tied=True)
    adapter = trained(base, tmp_path / "a", dtype="bfloat16", **config)
    ours = MergedWeights.open(base, [adapter], [1.0])
    check_equal(ours, merged_by_peft(base, adapter, "bfloat16"))
    assert ours.untied
    assert ours.config["tie_word_embeddings"] is False
    assert not ours.tensor(HEAD).equal(ours.tensor(EMBEDDINGS))


@pytest.mark.parametrize(
    "config", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]}]
)
def test_tied_layers_that_were_trained_as_one_stay_tied(
    tmp_path: Path, base_of: Callable[..., Path], config: dict[str, Any]
) -> None:
    base = base_of("float32", tied=True)
    adapter = trained(base, tmp_path / "a", ensure_weight_tying=True, **config)
    ours = MergedWeights.open(base, [adapter], [1.0])
    assert not ours.untied
    assert HEAD not in ours
    check_logits(base, adapter, ours, tmp_path / "m")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_lora_on_one_of_two_tied_layers_leaves_the_other_alone(
    tmp_path: Path, base_of: Callable[..., Path], target: str
) -> None:
    # PEFT's own merge adds the delta to both, since they are one tensor there; what
    # the adapter computes while it is not merged is the truth.
    base = base_of("float32", tied=True)
    adapter = trained(base, tmp_path / "a", target_modules=["q_proj", target])
    ours = MergedWeights.open(base, [adapter], [1.0])
    assert ours.untied
    assert check_adapter(adapter, base=Weights.open(base)) == []
    before = Weights.open(base).tensor(EMBEDDINGS)
    left = EMBEDDINGS if target == "lm_head" else HEAD
    assert ours.tensor(left).equal(before)
    check_logits(base, adapter, ours, tmp_path / "m")


def check_logits(base: Path, adapter: Path, ours: MergedWeights, place: Path) -> None:
    """A model made of the merged tensors says what PEFT's says before a merge."""
    import json

    from peft import PeftModel

    place.mkdir()
    save_file({n: ours.tensor(n) for n in ours}, str(place / "model.safetensors"), {"format": "pt"})
    (place / "config.json").write_text(json.dumps(ours.config))
    ids = torch.arange(3, 60)[None]
    live: Any = PeftModel.from_pretrained(load(base), str(adapter))
    with torch.no_grad():
        off = load(place)(input_ids=ids).logits - live(input_ids=ids).logits
    assert off.abs().max() < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_adapters_are_summed_by_weight_and_rounded_once(
    tmp_path: Path, base_of: Callable[..., Path], dtype: str
) -> None:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    base = base_of(dtype)
    one = trained(base, tmp_path / "a", dtype=dtype)
    two = trained(base, tmp_path / "b", dtype=dtype, seed=1, r=2, use_rslora=True)
    model: Any = PeftModel.from_pretrained(load(base, "float32"), str(one), adapter_name="one")
    model.load_adapter(str(two), adapter_name="two")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling = {
                "one": module.scaling["one"] * 0.7,
                "two": module.scaling["two"] * -0.4,
            }
    theirs = model.merge_and_unload(adapter_names=["one", "two"]).to(getattr(torch, dtype))
    check_equal(MergedWeights.open(base, [one, two], [0.7, -0.4]), dict(theirs.state_dict()))


def test_dora_adapters_are_stacked_as_peft_does(
    tmp_path: Path, base_of: Callable[..., Path]
) -> None:
    from peft import PeftModel

    base = base_of()
    one = trained(base, tmp_path / "a", use_dora=True)
    two = trained(base, tmp_path / "b", seed=1, use_dora=True)
    model: Any = PeftModel.from_pretrained(load(base), str(one), adapter_name="one")
    model.load_adapter(str(two), adapter_name="two")
    theirs = model.merge_and_unload(adapter_names=["one", "two"]).state_dict()
    ours = MergedWeights.open(base, [one, two], [1.0, 1.0])
    for name in ours.touched:
        assert torch.allclose(ours.tensor(name), theirs[name], rtol=1e-5, atol=1e-6)


def test_whole_tensors_are_weighted_by_their_difference_from_the_base(
    tmp_path: Path, base_of: Callable[..., Path]
) -> None:
    base = base_of()
    adapter = trained(base, tmp_path / "a", modules_to_save=["lm_head"])
    before = Weights.open(base).tensor(HEAD)
    whole = load_file(str(adapter / "adapter_model.safetensors"))["base_model.model." + HEAD]
    assert MergedWeights.open(base, [adapter], [1.0]).tensor(HEAD).equal(whole)
    half = MergedWeights.open(base, [adapter], [0.5]).tensor(HEAD)
    assert torch.allclose(half, (before + whole) / 2, atol=1e-6)


def test_fan_in_fan_out_layers_lie_the_other_way(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(str(tmp_path / "gpt2"))
    for dora in (False, True):
        model: Any = get_peft_model(
            GPT2LMHeadModel.from_pretrained(str(tmp_path / "gpt2")),
            LoraConfig(
                r=3, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=dora,
                init_lora_weights=False, task_type="CAUSAL_LM",
            ),
        )  # fmt: skip
        place = tmp_path / f"adapter-{dora}"
        model.save_pretrained(str(place))
        plain: Any = GPT2LMHeadModel.from_pretrained(str(tmp_path / "gpt2"))
        theirs = PeftModel.from_pretrained(plain, str(place)).merge_and_unload().state_dict()
        ours = MergedWeights.open(tmp_path / "gpt2", [place], [1.0])
        [name] = ours.touched
        assert ours.tensor(name).shape == (16, 48)
        assert torch.allclose(ours.tensor(name), theirs[name], rtol=1e-6, atol=1e-7)


def test_norms_are_pefts_however_few_columns_are_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base_of: Callable[..., Path]
) -> None:
    monkeypatch.setattr("arriero.weights.terms.BLOCK", 64 * 64 * 4)
    monkeypatch.setattr("arriero.weights.terms._COLUMNS", 16)
    base = base_of("float32")
    adapter = trained(base, tmp_path / "a", target_modules=["embed_tokens"], use_dora=True)
    check_equal(MergedWeights.open(base, [adapter], [1.0]), merged_by_peft(base, adapter))


def test_blocks_of_rows_are_the_whole(tmp_path: Path, base_of: Callable[..., Path]) -> None:
    base = base_of("bfloat16")
    config = {"target_modules": [*ALL, "embed_tokens"], "use_dora": True}
    adapter = trained(base, tmp_path / "a", dtype="bfloat16", **config)
    ours = MergedWeights.open(base, [adapter], [1.0])
    for name in ours.touched:
        blocks = list(ours.blocks(name, 64 * 2 * 7))
        assert len(blocks) > 1
        found = torch.cat([ours.rows(name, *block) for block in blocks])
        # To the last bit of the type: some CPUs' products sum in an order that follows the height.
        torch.testing.assert_close(found, ours.tensor(name), rtol=2**-7, atol=1e-6)


def test_threads_may_compute_side_by_side(tmp_path: Path, base_of: Callable[..., Path]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    base = base_of("bfloat16")
    adapter = trained(base, tmp_path / "a", dtype="bfloat16", use_dora=True)
    ours = MergedWeights.open(base, [adapter], [1.0])
    alone = {name: ours.tensor(name) for name in ours.touched}
    work = [name for _ in range(40) for name in alone]
    with ThreadPoolExecutor(4) as pool:
        for name, found in zip(work, pool.map(ours.tensor, work), strict=True):
            assert found.equal(alone[name])


def test_the_base_is_left_alone(tmp_path: Path, base_of: Callable[..., Path]) -> None:
    base = base_of("float32")
    before = (base / "model.safetensors").read_bytes()
    ours = MergedWeights.open(base, [trained(base, tmp_path / "a")], [1.0])
    first = {name: ours.tensor(name) for name in ours}
    assert all(ours.tensor(name).equal(first[name]) for name in ours)
    assert (base / "model.safetensors").read_bytes() == before


# --- what does not fit ------------------------------------------------------------------


def test_a_base_without_the_targets_is_refused_with_figures(tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "a", tiny_llama(tmp_path / "two"))
    one = tiny_llama(tmp_path / "one", layers=1)
    with pytest.raises(FailedPrecondition, match=r"2 of 4 modules.*layers\.1\.self_attn\.q_proj"):
        MergedWeights.open(one, [adapter], [1.0])


def test_a_base_of_another_width_is_refused_with_figures(tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "a", tiny_llama(tmp_path / "wide"))
    narrow = tiny_llama(tmp_path / "narrow", hidden=32)
    with pytest.raises(FailedPrecondition, match=r"base \(32, 32\), adapter \(64, 64\)"):
        MergedWeights.open(narrow, [adapter], [1.0])


def edited(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    path = str(adapter / "adapter_model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return adapter


def test_embeddings_resized_without_the_output_layer_are_refused(
    tmp_path: Path, base_of: Callable[..., Path]
) -> None:
    adapter = trained(base_of(), tmp_path / "a", rows=400)
    edited(adapter, lambda tensors: tensors.pop("base_model.model." + HEAD))
    with pytest.raises(FailedPrecondition, match="400 rows of embeddings and 384 of the output"):
        MergedWeights.open(base_of(), [adapter], [1.0])


def test_a_vocabulary_is_resized_by_one_adapter_alone(
    tmp_path: Path, base_of: Callable[..., Path]
) -> None:
    grown = trained(base_of(), tmp_path / "a", rows=400)
    other = trained(base_of(), tmp_path / "b", modules_to_save=["lm_head"])
    with pytest.raises(FailedPrecondition, match="by one adapter of weight 1 alone"):
        MergedWeights.open(base_of(), [grown], [0.5])
    with pytest.raises(FailedPrecondition, match=r"lm_head.weight.*by one adapter|shapes"):
        MergedWeights.open(base_of(), [grown, other], [1.0, 1.0])


def test_packed_weights_are_refused(tmp_path: Path, base_of: Callable[..., Path]) -> None:
    adapter = trained(base_of(), tmp_path / "a")
    packed = tiny_llama(tmp_path / "packed")
    path = str(packed / "model.safetensors")
    tensors = load_file(path)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, path)
    with pytest.raises(FailedPrecondition, match="not quantized"):
        MergedWeights.open(packed, [adapter], [1.0])
