import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from arriero.dataset.job import prepare
from arriero.dataset.spec import resolve
from arriero.errors import ArrieroError, FailedPrecondition, InvalidArgument, Preempted
from arriero.gates import GateResult, Verdict
from arriero.operations.job import Job, Output
from arriero.operations.kinds import ResolveContext
from arriero.prompts import Template
from arriero.testing.jobs import run_job
from arriero.v1 import dataset_pb2, types_pb2


def row(number: int, **fields: Any) -> dict[str, Any]:
    return {"instruction": f"What is {number}?", "input": "", "output": f"It is {number}."} | fields


class Prepared:
    """The outputs of a job, read back."""

    def __init__(self, outputs: list[Output], job: Job) -> None:
        self.outputs = {output.name: output for output in outputs}
        self.job = job

    def rows(self, name: str) -> list[dict[str, list[int]]]:
        with pa.memory_map(str(self.outputs[name].path / "data.arrow")) as file:
            return pa.ipc.open_file(file).read_all().to_pylist()

    def json(self, name: str, file: str) -> dict[str, Any]:
        return json.loads((self.outputs[name].path / file).read_text())

    def gate(self, name: str) -> GateResult:
        return next(result for result in self.job.gates.results if result.gate == name)


Run = Callable[..., Prepared]


@pytest.fixture
def run(store, publish, data, allowed, tmp_path, bytes_dir) -> Run:
    """Resolves and runs a dataset stage over rows, with the byte-level tokenizer."""
    default = publish(bytes_dir, "tokenizer", "bytes")

    def run(rows: list[Any] | None = None, tokenizer=default, seen=None, **fields) -> Prepared:
        if rows is not None:
            (data / "rows.json").write_text(json.dumps(rows, indent=1))
        fields.setdefault("sources", [str(data / "rows.json")])
        spec = dataset_pb2.DatasetSpec(tokenizer=tokenizer.digest, **fields)
        context = ResolveContext(store=store, inputs={"tokenizer": [tokenizer]}, sources=allowed)
        jobs: list[Job] = []
        outputs = run_job(
            prepare,
            "dataset",
            resolve(spec, context).spec,
            {"tokenizer": tokenizer},
            store,
            tmp_path,
            prepare=lambda job: (jobs.append(job), seen and seen(job)),
        )
        return Prepared(outputs, jobs[0])

    return run


def test_rows_become_ids_and_masked_labels(run: Run) -> None:
    done = run([row(i) for i in range(5)])
    assert list(done.outputs) == ["train", "report"]
    rows = done.rows("train")
    assert len(rows) == 5
    for item in rows:
        masked = item["labels"].count(-100)
        assert 0 < masked < len(item["input_ids"])
        assert item["labels"][masked:] == item["input_ids"][masked:]
        assert item["input_ids"][-1] == 2
    facts = done.json("train", "dataset.json")
    assert facts["rows"] == 5
    assert facts["tokens"] == sum(len(item["input_ids"]) for item in rows)
    assert facts["trained_tokens"] == sum(
        sum(label != -100 for label in item["labels"]) for item in rows
    )
    assert facts["max_length"] == max(len(item["input_ids"]) for item in rows)
    assert facts["tokenizer"] == done.job.input("tokenizer").digest
    assert (facts["bos_token_id"], facts["eos_token_id"], facts["pad_token_id"]) == (1, 2, 2)
    assert done.outputs["train"].metrics["rows"] == 5
    template = Template.read(done.outputs["train"].path)
    assert template is not None
    assert template.name == "alpaca"
    assert {r.gate for r in done.job.gates.results if r.verdict is Verdict.PASSED} == {
        "dataset.schema",
        "dataset.truncation",
        "dataset.labels",
        "dataset.bos",
    }


def test_the_same_seed_gives_the_same_bytes(run: Run) -> None:
    def train(**fields: Any) -> bytes:
        done = run([row(i) for i in range(30)], **fields)
        return (done.outputs["train"].path / "data.arrow").read_bytes()

    assert train() == train()
    assert train(seed=1) != train()


def test_held_out_rows_are_not_trained_on(run: Run) -> None:
    done = run([row(i) for i in range(20)], val_set_size=0.25)
    train, val = done.rows("train"), done.rows("val")
    assert (len(train), len(val)) == (15, 5)
    assert not [item for item in val if item in train]
    assert done.json("val", "dataset.json")["rows"] == 5
    assert list(done.outputs) == ["train", "val", "report"]


def test_the_probe_has_256_ids_of_held_out_rows(run: Run) -> None:
    done = run([row(i) for i in range(40)], val_set_size=20)
    probe = done.json("train", "probe.json")["sequences"]
    assert sum(len(ids) for ids in probe) == 256
    assert done.json("val", "probe.json")["sequences"] == probe
    val = [item["input_ids"] for item in done.rows("val")]
    assert all(any(ids == whole[: len(ids)] for whole in val) for ids in probe)


def test_the_probe_takes_training_rows_when_nothing_is_held_out(run: Run) -> None:
    probe = run([row(i) for i in range(20)]).json("train", "probe.json")["sequences"]
    assert sum(len(ids) for ids in probe) == 256
    few = run([row(1)]).json("train", "probe.json")["sequences"]
    assert 2 <= sum(len(ids) for ids in few) <= 128


def test_only_the_first_rows_are_kept_when_asked(run: Run) -> None:
    rows = [row(i) for i in range(20)]
    few, all_ = run(rows, max_rows=4).rows("train"), run(rows).rows("train")
    assert few == all_[:4]


def test_bad_rows_fail_the_gate_and_are_named(run: Run) -> None:
    done = run([row(1), row(2, output=7), {"instruction": "x"}, "text", row(3)])
    gate = done.gate("dataset.schema")
    assert gate.verdict is Verdict.FAILED
    assert gate.figure == 3
    assert "row 2 (line 7): field 'output' is a number, expected text" in gate.detail
    assert "set on_bad_row: skip" in gate.detail
    # Waived, it is what was asked for with `skip`.
    assert len(done.rows("train")) == 2


def test_bad_rows_may_be_skipped_and_are_counted(run: Run) -> None:
    done = run([row(1), {}, row(3)], on_bad_row="skip")
    gate = done.gate("dataset.schema")
    assert (gate.verdict, gate.figure) == (Verdict.PASSED, 1)
    assert "row 2" in gate.detail
    report = done.json("report", "report.json")
    assert report["bad_rows"]["count"] == 1
    assert report["bad_rows"]["named"][0]["row"] == 2


def test_a_gate_may_warn(run: Run) -> None:
    done = run([row(1), {}], gates={"dataset.schema": types_pb2.GATE_MODE_WARN})
    assert done.gate("dataset.schema").verdict is Verdict.WARNED


def test_sources_without_a_usable_row_are_refused(run: Run) -> None:
    with pytest.raises(InvalidArgument, match=r"none of 2 rows can be used: .*row 1"):
        run([{}, 3], on_bad_row="skip", format="alpaca")


def test_rows_that_train_nothing_fail_the_gate_or_are_dropped(run: Run) -> None:
    rows = [row(1), row(2, instruction="llama " * 200)]
    done = run(rows, cutoff_len=120)
    assert done.gate("dataset.labels").verdict is Verdict.FAILED
    assert "row 2" in done.gate("dataset.labels").detail
    assert "raise cutoff_len" in done.gate("dataset.labels").detail
    done = run(rows, cutoff_len=120, on_bad_row="skip")
    assert done.gate("dataset.labels").verdict is Verdict.PASSED
    assert len(done.rows("train")) == 1
    assert done.json("report", "report.json")["masked_rows"]["count"] == 1
    with pytest.raises(FailedPrecondition, match="raise it"):
        run(rows[1:], cutoff_len=120, on_bad_row="skip")


def test_an_end_of_turn_that_is_no_token_fails_the_gate(
    run: Run, publish, sentencepiece_dir: Path
) -> None:
    tokenizer = publish(sentencepiece_dir, "tokenizer", "sentencepiece")
    gate = run([row(1)], tokenizer, template="chatml").gate("dataset.labels")
    assert gate.verdict is Verdict.FAILED
    assert "'<|im_end|>'" in gate.detail
    assert "expected one special token" in gate.detail
    done = run([row(1)], tokenizer, template="chatml", add_eos_token=False)
    assert done.gate("dataset.labels").verdict is Verdict.PASSED


def test_a_second_bos_fails_the_gate(run: Run, publish, sentencepiece_dir: Path) -> None:
    tokenizer = publish(sentencepiece_dir, "tokenizer", "sentencepiece")
    rows = [row(1), row(2, system="<s>Be brief.")]
    gate = run(rows, tokenizer).gate("dataset.bos")
    assert (gate.verdict, gate.figure) == (Verdict.FAILED, 1)
    assert "begins with BOS twice" in gate.detail
    assert run(rows[:1], tokenizer).gate("dataset.bos").detail == "one '<s>' by the tokenizer"
    fine = run(rows[:1], tokenizer, template="llama-2").gate("dataset.bos")
    assert fine.detail == "one '<s>' by the template"


def test_a_template_whose_bos_is_not_the_tokenizers_fails_the_gate(
    run: Run, publish, tmp_path: Path, bytes_dir: Path
) -> None:
    import shutil

    tuned = tmp_path / "tuned"
    shutil.copytree(bytes_dir, tuned)
    Template(
        "foreign",
        "{% for m in messages %}<s>{{ m.content }}{{ eos_token }}{% endfor %}",
        writes_bos=True,
    ).write(tuned)
    gate = run([row(1)], publish(tuned, "tokenizer", "tuned"), template="model").gate("dataset.bos")
    assert gate.verdict is Verdict.FAILED
    assert "does not begin with the tokenizer's '<|im_start|>'" in gate.detail


def test_the_report_shows_lengths_and_marked_samples(run: Run) -> None:
    done = run(
        [row(i, origin="a") for i in range(9)] + [row(9, output="<|im_end|> x")],
        cutoff_len=100,
        template="chatml",
    )
    report = done.json("report", "report.json")
    encoded = report["encoded"]
    assert sum(bucket["rows"] for bucket in encoded["lengths"]) == encoded["rows"] == 10
    assert len(encoded["samples"]) == 3
    assert encoded["samples"][0]["text"].endswith("assistant\n⟦It is 0.<|im_end|>⟧")
    assert report["unused_fields"] == {"origin": 9}
    assert report["rows_with_special_tokens"]["named"][0]["row"] == 10
    assert report["rows"] == {"read": 10, "usable": 10, "chosen": 10, "train": 10, "val": 0}
    assert done.outputs["report"].metrics["truncated_share"] == encoded["truncated_share"]
    assert done.outputs["report"].labels == {"report": "dataset"}


def test_pushed_rows_are_a_source_and_a_parent(run: Run, publish, store) -> None:
    raw = publish({"a.jsonl": json.dumps(row(1)), "b.json": json.dumps([row(2)])}, "dataset", "raw")
    store.tag("dataset/raw:v1", raw.digest)
    done = run(sources=["dataset/raw:v1"])
    assert len(done.rows("train")) == 2
    assert list(done.outputs["train"].parents) == [done.job.input("tokenizer").digest, raw.digest]


def test_a_source_that_changed_since_it_was_accepted_is_refused(run: Run, data: Path) -> None:
    def change(_: Job) -> None:
        (data / "rows.json").write_text(json.dumps([row(9)]))

    with pytest.raises(InvalidArgument, match="the source changed"):
        run([row(1)], seen=change)


def test_preemption_ends_the_work(run: Run) -> None:
    with pytest.raises(Preempted):
        run([row(1)], seen=lambda job: job.preempted.set())


def test_rows_of_the_models_own_template_hold_the_input(run: Run) -> None:
    done = run([row(1, input="in Peru")], template="model")
    assert (
        "What is 1?\nin Peru" in done.json("report", "report.json")["encoded"]["samples"][0]["text"]
    )


def test_nothing_but_errors_of_the_tree_comes_out(run: Run, data: Path) -> None:
    for text in ("", "{", '[{"instruction":1}]', "\x00", '["a"'):
        (data / "rows.json").write_text(text)
        with pytest.raises(ArrieroError):
            run()


def test_packed_rows_hold_whole_samples(run: Run) -> None:
    rows = [row(i, output="llama " * (i % 7 + 1)) for i in range(40)]
    plain = run(rows, cutoff_len=250, val_set_size=8)
    splits = ("train", "val")
    samples = {split: plain.rows(split) for split in splits}
    probe, facts_before = plain.json("val", "probe.json"), plain.json("train", "dataset.json")
    packed = run(rows, cutoff_len=250, val_set_size=8, packing=True)
    for split in splits:
        found = packed.rows(split)
        cut = []
        for item in found:
            assert len(item["input_ids"]) == len(item["labels"]) == sum(item["lengths"]) <= 250
            start = 0
            for length in item["lengths"]:
                assert item["labels"][start] == -100
                cut.append((item["input_ids"][start:][:length], item["labels"][start:][:length]))
                start += length
        whole = [(item["input_ids"], item["labels"]) for item in samples[split]]
        assert sorted(cut) == sorted(whole)
        assert len(found) < len(whole)
        facts = packed.json(split, "dataset.json")
        assert (facts["packing"], facts["samples"], facts["rows"]) == (True, len(whole), len(found))
    facts = packed.json("train", "dataset.json")
    assert facts["trained_tokens"] == facts_before["trained_tokens"]
    assert "lengths" not in samples["train"][0]
    assert packed.json("val", "probe.json") == probe
