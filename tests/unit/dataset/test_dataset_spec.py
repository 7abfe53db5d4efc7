import json
from collections.abc import Callable
from pathlib import Path

import pytest

from arriero.dataset.spec import resolve
from arriero.errors import FailedPrecondition, InvalidArgument, NotFound
from arriero.operations.kinds import ResolveContext, Resolved
from arriero.v1 import dataset_pb2, types_pb2

ROW = {"instruction": "a", "output": "b"}
Ask = Callable[..., Resolved]


@pytest.fixture
def ask(store, publish, data, allowed, sentencepiece_dir) -> Ask:
    """Resolves a spec over three good rows."""
    default = publish(sentencepiece_dir, "tokenizer", "sentencepiece")
    (data / "rows.json").write_text(json.dumps([ROW] * 3))

    def ask(tokenizer=default, **fields) -> Resolved:
        fields.setdefault("sources", [str(data / "rows.json")])
        spec = dataset_pb2.DatasetSpec(tokenizer=tokenizer.digest, **fields)
        context = ResolveContext(store=store, inputs={"tokenizer": [tokenizer]}, sources=allowed)
        return resolve(spec, context)

    return ask


def test_defaults_are_filled_in(ask: Ask) -> None:
    spec = ask().spec
    assert (spec.format, spec.template, spec.on_bad_row) == ("auto", "alpaca", "fail")
    assert (spec.cutoff_len, spec.val_set_size, spec.seed, spec.max_rows) == (512, 0, 42, 0)
    assert (spec.train_on_inputs, spec.add_eos_token) == (False, True)
    assert spec.HasField("train_on_inputs")


def test_zero_is_kept_where_it_differs_from_unset(ask: Ask) -> None:
    spec = ask(seed=0, add_eos_token=False).spec
    assert (spec.seed, spec.add_eos_token) == (0, False)


def test_the_key_holds_the_bytes_and_not_the_place(ask: Ask, data: Path) -> None:
    first = ask()
    (data / "copy.json").write_bytes((data / "rows.json").read_bytes())
    second = ask(sources=[str(data / "copy.json")])
    assert first.unkeyed == ("sources", "num_proc", "token_secret")
    assert first.spec.sha256 == second.spec.sha256
    (data / "copy.json").write_text(json.dumps([ROW] * 4))
    assert ask(sources=[str(data / "copy.json")]).spec.sha256 != first.spec.sha256


def test_a_given_digest_must_be_the_sources(ask: Ask) -> None:
    digest = ask().spec.sha256[0]
    assert ask(sha256=[digest.removeprefix("sha256:")]).spec.sha256 == [digest]
    with pytest.raises(InvalidArgument, match=r"sha256\[0\].*the source changed"):
        ask(sha256=["sha256:" + "0" * 64])
    with pytest.raises(InvalidArgument, match="2 digests for 1 sources"):
        ask(sha256=[digest, digest])


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"sources": []}, "sources", "empty"),
        ({"format": "alpacca"}, "format", "did you mean 'alpaca'"),
        ({"on_bad_row": "ignore"}, "on_bad_row", "fail or skip"),
        ({"cutoff_len": 7}, "cutoff_len", "expected 8 to"),
        ({"cutoff_len": 1 << 30}, "cutoff_len", "expected 8 to"),
        ({"max_rows": -1}, "max_rows", "0 for all"),
        ({"val_set_size": -1}, "val_set_size", "share below 1"),
        ({"val_set_size": 3}, "val_set_size", "leaves none"),
        ({"val_set_size": 2, "max_rows": 2}, "val_set_size", "leaves none"),
        ({"template": "alpacca"}, "template", "did you mean 'alpaca'"),
        ({"template": "model"}, "template", "brings no chat template"),
        ({"template": "/etc/passwd"}, "template", "outside of the paths"),
        ({"gates": {"dataset.schemas": 1}}, "gates['dataset.schemas']", "known gates"),
        ({"sources": ["/etc/passwd"]}, "sources[0]", "outside of the paths"),
    ],
)
def test_what_is_wrong_is_refused_by_its_field(ask: Ask, fields, field: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        ask(**fields)
    assert [violation.field for violation in caught.value.violations] == [field]


def test_every_wrong_field_is_named_at_once(ask: Ask) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ask(cutoff_len=1, on_bad_row="x", max_rows=-2)
    assert {item.field for item in caught.value.violations} == {
        "cutoff_len",
        "on_bad_row",
        "max_rows",
    }


def test_malformed_and_empty_sources_are_refused_before_work_starts(ask: Ask, data: Path) -> None:
    (data / "bad.jsonl").write_text(json.dumps(ROW) + '\n{"instruction": \n')
    with pytest.raises(InvalidArgument, match=r"bad.jsonl: row 2, line 2: malformed JSON"):
        ask(sources=[str(data / "bad.jsonl")])
    (data / "empty.json").write_text("[]")
    with pytest.raises(InvalidArgument, match="hold no rows"):
        ask(sources=[str(data / "empty.json")])
    with pytest.raises(NotFound):
        ask(sources=[str(data / "nothing.json")])


def test_an_artifact_without_tokenizer_is_refused(ask: Ask, publish) -> None:
    with pytest.raises(FailedPrecondition, match="no tokenizer"):
        ask(publish({"config.json": "{}"}, "model"))


def test_a_tokenizer_without_eos_needs_the_wish_for_none(ask: Ask, publish) -> None:
    tokenizer = publish({"tokenizer.json": "{}"}, "tokenizer", "endless")
    with pytest.raises(InvalidArgument, match="add_eos_token: the tokenizer has no EOS"):
        ask(tokenizer)
    assert ask(tokenizer, add_eos_token=False).spec.add_eos_token is False
    # ChatML brings its own end of turn.
    assert ask(tokenizer, template="chatml").spec.template == "chatml"


def test_the_models_own_template_may_be_used(ask: Ask, publish, bytes_dir: Path) -> None:
    assert ask(publish(bytes_dir, "tokenizer", "bytes"), template="model").spec.template == "model"


def test_gate_modes_are_accepted(ask: Ask) -> None:
    spec = ask(gates={"dataset.schema": types_pb2.GATE_MODE_WARN}).spec
    assert spec.gates["dataset.schema"] == types_pb2.GATE_MODE_WARN
