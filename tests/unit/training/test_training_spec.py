"""A spec is filled in and judged before anything starts, without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.operations.kinds import ResolveContext
from arriero.store import Artifact
from arriero.training.spec import resolve
from arriero.v1 import training_pb2


def spec_of(**fields: object) -> training_pb2.TrainSpec:
    return training_pb2.TrainSpec(model="m", dataset="d", **fields)  # type: ignore[arg-type]


def refused(context: ResolveContext, **fields: object) -> dict[str, str]:
    with pytest.raises(InvalidArgument) as caught:
        resolve(spec_of(**fields), context)
    return {item.field: item.description for item in caught.value.violations}


def test_defaults_are_those_of_the_proto(context: ResolveContext):
    spec = resolve(spec_of(), context).spec
    assert spec.lora.r == 8
    assert spec.lora.lora_alpha == 16
    assert list(spec.lora.target_modules) == ["q_proj", "v_proj"]
    assert (spec.num_epochs, spec.batch_size, spec.micro_batch_size) == (3, 16, 8)
    assert (spec.learning_rate, spec.lr_scheduler_type, spec.optim) == (
        3e-4,
        "linear",
        "adamw_torch",
    )
    assert (spec.warmup_steps, spec.max_grad_norm, spec.seed, spec.dtype) == (0.05, 1.0, 42, "auto")
    assert spec.HasField("max_steps")
    assert spec.HasField("gradient_checkpointing")


def test_zero_is_not_unset(context: ResolveContext):
    spec = resolve(spec_of(lora={"lora_dropout": 0.0}, warmup_steps=0, seed=0), context).spec
    assert (spec.lora.lora_dropout, spec.warmup_steps, spec.seed) == (0, 0, 0)
    assert spec.lora.r == 8


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"lora": {"r": 0}}, "lora.r", "0; expected a rank of 1"),
        ({"lora": {"r": -4}}, "lora.r", "-4"),
        ({"lora": {"lora_dropout": 1.0}}, "lora.lora_dropout", "0 <= dropout < 1"),
        ({"lora": {"lora_dropout": float("nan")}}, "lora.lora_dropout", "nan"),
        ({"lora": {"lora_alpha": 0}}, "lora.lora_alpha", "above 0"),
        ({"learning_rate": -1e-4}, "learning_rate", "-0.0001; expected a number above 0"),
        ({"learning_rate": float("inf")}, "learning_rate", "inf"),
        ({"num_epochs": 0}, "num_epochs", "above 0"),
        ({"max_steps": -1}, "max_steps", "-1"),
        ({"batch_size": 0}, "batch_size", "at least 1"),
        (
            {"batch_size": 10, "micro_batch_size": 4},
            "micro_batch_size",
            "divisor of batch_size 10, such as 2",
        ),
        ({"micro_batch_size": 0}, "micro_batch_size", "at least 1"),
        ({"dtype": "bf16"}, "dtype", "did you mean 'bfloat16'?"),
        ({"optim": "adamw_4bit"}, "optim", "did you mean 'adamw_8bit'?"),
        ({"method": "lorra"}, "method", "did you mean 'lora'?"),
        ({"adam_beta1": 1.0}, "adam_beta1", "0 <= adam_beta1 < 1"),
        ({"adam_beta2": -0.1}, "adam_beta2", "0 <= adam_beta2 < 1"),
        ({"adam_epsilon": 0}, "adam_epsilon", "above 0"),
        ({"neftune_noise_alpha": -5}, "neftune_noise_alpha", "at least 0"),
        ({"eval_steps": -1}, "eval_steps", "each epoch's end"),
        ({"eval_steps": 5}, "eval_steps", "needs held-out rows"),
        ({"early_stopping_patience": -1}, "early_stopping_patience", "0 for never"),
        ({"early_stopping_patience": 2}, "early_stopping_patience", "set val_set_size"),
        ({"early_stopping_threshold": -1}, "early_stopping_threshold", "at least 0"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end", "needs held-out rows"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_8bit", "one of the two"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"},
            "bnb_4bit_quant_type",
            "did you mean 'nf4'?",
        ),
        ({"method": "full", "load_in_4bit": True}, "load_in_4bit", "use method lora"),
        ({"method": "full", "lora": {"use_dora": True}}, "lora.use_dora", "leave it out"),
        ({"report_to": ["tensorbord"]}, "report_to", "did you mean 'tensorboard'?"),
        ({"lora": {"modules_to_save": ["embed"]}}, "lora.modules_to_save", "embed_tokens"),
        ({"lora": {"modules_to_save": ["q_proj"]}}, "lora.modules_to_save", "gets LoRA too"),
        ({"lora": {"rank_pattern": {"q_proj": 0}}}, "lora.rank_pattern['q_proj']", "rank of 1"),
        (
            {"lora": {"rank_pattern": {"k_proj": 2}}},
            "lora.rank_pattern['k_proj']",
            "one of: q_proj, v_proj",
        ),
        (
            {"lora": {"alpha_pattern": {"q_proj": -1}}},
            "lora.alpha_pattern['q_proj']",
            "above 0",
        ),
        ({"lora": {"alpha_pattern": {"q(": 1}}}, "lora.alpha_pattern['q(']", "regular expression"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type", "did you mean 'cosine'?"),
        ({"warmup_steps": -1}, "warmup_steps", "share"),
        ({"warmup_steps": 1.5}, "warmup_steps", "1.5"),
        ({"warmup_steps": 50, "max_steps": 20}, "warmup_steps", "50 steps of 20"),
        ({"max_grad_norm": -1}, "max_grad_norm", "at least 0"),
        ({"save_total_limit": 0}, "save_total_limit", "at least 1"),
        ({"save_steps": -1}, "save_steps", "one a minute"),
        ({"lora": {"target_modules": ["qkv"]}}, "lora.target_modules", "q_proj"),
        (
            {"lora": {"target_modules": ["q_proj", "v_prj"]}},
            "lora.target_modules",
            "did you mean 'v_proj'?",
        ),
        ({"lora": {"target_modules": ["all-linear", "q_proj"]}}, "lora.target_modules", "alone"),
        ({"lora": {"target_modules": ["lm_head"]}}, "lora.target_modules", "no linear layer"),
        ({"gates": {"adapter.helth": 1}}, "gates['adapter.helth']", "adapter.health"),
    ],
)
def test_a_wrong_field_is_named_with_what_was_expected(context, fields, field, said):
    assert said in refused(context, **fields)[field]


def test_all_that_is_wrong_is_said_at_once(context: ResolveContext):
    found = refused(context, lora={"r": 0}, learning_rate=-1, dtype="int8")
    assert set(found) == {"lora.r", "learning_rate", "dtype"}


def test_names_of_layers_that_exist_are_listed(context: ResolveContext):
    said = refused(context, lora={"target_modules": ["Wqkv"]})["lora.target_modules"]
    for name in ("all-linear", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"):
        assert name in said
    assert "lm_head" not in said


def test_an_unset_micro_batch_divides_the_batch(context: ResolveContext):
    assert resolve(spec_of(batch_size=10), context).spec.micro_batch_size == 5
    assert resolve(spec_of(batch_size=11), context).spec.micro_batch_size == 1
    assert resolve(spec_of(batch_size=2), context).spec.micro_batch_size == 2


def test_what_changes_no_result_is_not_part_of_the_key(context: ResolveContext):
    assert set(resolve(spec_of(), context).unkeyed) == {
        "resources",
        "save_steps",
        "save_total_limit",
        "report_to",
        "nodes",
        "nproc_per_node",
        "fsdp",
    }


def test_needs_grow_with_the_work(context: ResolveContext):
    small = resolve(spec_of(lora={"r": 4}), context)
    large = resolve(spec_of(lora={"r": 64, "target_modules": ["all-linear"]}), context)
    assert 0 < small.disk_bytes < large.disk_bytes
    assert 0 < small.memory_bytes < large.memory_bytes


def test_rows_of_another_tokenizer_are_refused(kit, model: Artifact):
    other = kit.dataset(kit.draw_rows(3, largest=5000), "sha256:" + "0" * 64)
    with pytest.raises(FailedPrecondition, match="384 embedding rows"):
        resolve(spec_of(), kit.context(model=model, dataset=other))


def test_rows_of_another_tokenizer_whose_ids_fit_are_taken(kit, model: Artifact):
    other = kit.dataset(kit.draw_rows(3), "sha256:" + "0" * 64)
    resolve(spec_of(), kit.context(model=model, dataset=other))


def test_held_out_rows_are_judged_too(kit, model: Artifact, dataset: Artifact):
    other = kit.dataset(kit.draw_rows(3, largest=5000), "sha256:" + "0" * 64)
    with pytest.raises(FailedPrecondition, match="val_dataset holds token id"):
        resolve(spec_of(), kit.context(model=model, dataset=dataset, val_dataset=other))


def test_rows_that_train_nothing_are_refused(kit, model: Artifact):
    nothing = kit.dataset([([4, 5, 6], 3)], model.digest)
    with pytest.raises(FailedPrecondition, match="1 rows with 0 trained tokens"):
        resolve(spec_of(), kit.context(model=model, dataset=nothing))


def test_a_model_without_config_is_refused(kit, dataset: Artifact):
    broken = kit.model(tweak=lambda place: (place / "config.json").write_text("[]"))
    with pytest.raises(FailedPrecondition, match="json cannot be read"):
        resolve(spec_of(), kit.context(model=broken, dataset=dataset))


def test_resolving_needs_no_torch():
    program = (
        "import json, sys, arriero.training.service, arriero.training.job\n"
        "heavy = {'torch', 'transformers', 'peft', 'llama_cpp'}\n"
        "print(json.dumps(sorted(heavy & set(sys.modules))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == []


def test_a_service_is_wired(tmp_path: Path):
    from arriero.training.service import KINDS

    (kind,) = KINDS
    assert kind.name == "train"
    assert kind.job_module == "arriero.training.job"
