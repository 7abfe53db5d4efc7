"""Defaults come from the protos, and never replace what was given."""

from arriero.operations.defaults import with_defaults
from arriero.v1 import dataset_pb2, quantization_pb2, training_pb2


def test_what_is_unset_takes_the_documented_default() -> None:
    spec = with_defaults(dataset_pb2.DatasetSpec())
    assert spec.cutoff_len == 512
    assert spec.template == "alpaca"
    assert spec.add_eos_token is True


def test_zero_and_unset_differ() -> None:
    assert with_defaults(training_pb2.TrainSpec(seed=0, save_steps=0)).seed == 0
    assert with_defaults(training_pb2.TrainSpec()).seed == 42


def test_messages_inside_are_filled_only_where_they_are_set() -> None:
    empty = with_defaults(quantization_pb2.EvaluateSpec())
    assert not empty.HasField("choose")
    asked = quantization_pb2.EvaluateSpec()
    asked.choose.smallest.SetInParent()
    assert with_defaults(asked).choose.smallest.max_kld == 0.05


def test_lists_take_the_defaults_words() -> None:
    spec = training_pb2.TrainSpec()
    spec.lora.SetInParent()
    assert list(with_defaults(spec).lora.target_modules) == ["q_proj", "v_proj"]
    spec.lora.target_modules.append("all-linear")
    assert list(with_defaults(spec).lora.target_modules) == ["all-linear"]


def test_the_spec_that_was_given_stays_as_it_is() -> None:
    spec = dataset_pb2.DatasetSpec()
    with_defaults(spec)
    assert not spec.HasField("cutoff_len")
