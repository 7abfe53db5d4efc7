"""What a dataset stage can be asked for, each through the job."""

import gzip
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from arriero.dataset import crew
from arriero.dataset import job as dataset_job
from arriero.dataset.job import prepare
from arriero.dataset.spec import resolve
from arriero.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from arriero.gates import GateResult, Verdict
from arriero.operations.job import Job
from arriero.operations.kinds import ResolveContext
from arriero.testing.jobs import run_job
from arriero.v1 import dataset_pb2, types_pb2


def row(number: int, **fields: Any) -> dict[str, Any]:
    return {"instruction": f"What is {number}?", "input": "", "output": f"It is {number}."} | fields


def chat(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


class Prepared:
    """The outputs of a job, read at once: the next job may write over them."""

    def __init__(self, outputs: list[Any], job: Job, decode: Callable[[list[int]], str]) -> None:
        self.rows, self.bytes, self.facts = {}, {}, {}
        self.files = {o.name: sorted(path.name for path in o.path.iterdir()) for o in outputs}
        for output in outputs:
            if (output.path / "data.arrow").exists():
                self.bytes[output.name] = (output.path / "data.arrow").read_bytes()
                with pa.memory_map(str(output.path / "data.arrow")) as file:
                    self.rows[output.name] = pa.ipc.open_file(file).read_all().to_pylist()
                self.facts[output.name] = json.loads((output.path / "dataset.json").read_text())
            else:
                self.report = json.loads((output.path / "report.json").read_text())
        self.gates: dict[str, GateResult] = {r.gate: r for r in job.gates.results}
        self._decode = decode

    def texts(self, name: str = "train") -> list[str]:
        return [self._decode(item["input_ids"]) for item in self.rows[name]]

    def trained(self, name: str = "train") -> list[str]:
        """What is trained on in each row."""
        return [
            self._decode([label for label in item["labels"] if label != -100])
            for item in self.rows[name]
        ]


Run = Callable[..., Prepared]


@pytest.fixture
def run(store, publish, data, allowed, tmp_path, bytes_dir) -> Run:
    """Resolves and runs a dataset stage; rows may be one list, or one for each source."""
    from tokenizers import Tokenizer

    default = publish(bytes_dir, "tokenizer", "bytes")
    backend = Tokenizer.from_file(str(bytes_dir / "tokenizer.json"))

    def decode(ids: list[int]) -> str:
        return str(backend.decode(ids, skip_special_tokens=False))

    def run(*sources: list[Any], tokenizer=default, raw=(), seen=None, **fields) -> Prepared:
        for number, items in enumerate(sources):
            (data / f"{number}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in items))
        names = [str(data / f"{number}.jsonl") for number in range(len(sources))]
        fields.setdefault("sources", names)
        fields.setdefault("template", "chatml")
        spec = dataset_pb2.DatasetSpec(
            tokenizer=tokenizer.digest, rows=[item.digest for item in raw], **fields
        )
        inputs = {"tokenizer": [tokenizer]} | ({"rows": list(raw)} if raw else {})
        context = ResolveContext(store=store, inputs=inputs, sources=allowed)
        jobs: list[Job] = []
        outputs = run_job(
            prepare,
            "dataset",
            resolve(spec, context).spec,
            inputs,
            store,
            tmp_path,
            prepare=lambda job: (jobs.append(job), seen and seen(job)),
        )
        return Prepared(outputs, jobs[0], decode)

    return run


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sources are worth processes of their own, and small batches."""
    monkeypatch.setattr(dataset_job, "_BYTES_A_PROCESS", 1)
    monkeypatch.setattr("arriero.dataset.preparation._BATCH", 7)


def test_every_answer_of_a_conversation_is_trained_on(run: Run) -> None:
    done = run([chat("Hello", "Hi!", "Who are you?", "A llama.")])
    assert done.trained() == ["Hi!<|im_end|>A llama.<|im_end|>"]
    assert done.texts()[0].startswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    whole = run([chat("Hello", "Hi!", "Who are you?", "A llama.")], train_on_inputs=True)
    assert whole.trained()[0].startswith("user\nHello")
    bare = run([chat("Hello", "Hi!", "Who are you?", "A llama.")], add_eos_token=False)
    assert bare.trained() == ["Hi!A llama."]


@pytest.mark.parametrize("template", ["alpaca", "llama-2", "vicuna", "chinese-alpaca-2", "model"])
def test_every_template_trains_every_answer(run: Run, template: str) -> None:
    done = run([chat("Hello", "Hi!", "Who?", "A llama.")], template=template)
    trained = done.trained()[0].replace(" ", "")
    assert trained == "Hi!<|im_end|>Allama.<|im_end|>"
    assert done.gates["dataset.labels"].verdict is Verdict.PASSED


def test_formats_are_known_by_the_first_row_of_each_source(run: Run) -> None:
    shared = {"conversations": [{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]}
    done = run([row(1)], [shared], [chat("d", "e")], [{"text": "Llamas walk."}])
    assert [source["format"] for source in done.report["sources"]] == [
        *("alpaca", "sharegpt", "messages", "text")
    ]
    assert {"It is 1.<|im_end|>", "c<|im_end|>", "e<|im_end|>"} < set(done.trained())
    assert "Llamas walk.<|im_end|>" in done.texts()
    assert done.gates["dataset.schema"].verdict is Verdict.PASSED


def test_rows_of_no_known_format_are_refused_with_their_fields(run: Run) -> None:
    with pytest.raises(InvalidArgument, match=r"has the fields question, answer; .*columns"):
        run([{"question": "a", "answer": "b"}])
    done = run(
        [{"question": "a", "answer": "b"}], columns={"instruction": "question", "output": "answer"}
    )
    assert done.trained() == ["b<|im_end|>"]


def test_long_plain_text_is_split_and_nothing_is_lost(run: Run, data: Path) -> None:
    words = " ".join(f"llama {number} walks over the Andes." for number in range(60))
    (data / "wiki.txt.gz").write_bytes(gzip.compress(f"{words}\n\nShort.\n".encode()))
    done = run(sources=[str(data / "wiki.txt.gz")], cutoff_len=64)
    assert max(len(item["input_ids"]) for item in done.rows["train"]) == 64
    text = "".join(done.texts())
    assert text.count("<|im_end|>") == 2
    assert (
        sum(len(item["input_ids"]) for item in done.rows["train"])
        == (done.report["encoded"]["tokens"])
    )
    assert words in text.replace("Short.<|im_end|>", "")
    assert done.gates["dataset.truncation"].figure == 0
    # The tokenizer's own template goes on with the model, not one that nobody trained.
    assert done.facts["train"]["template"] == "model"
    cut = run(sources=[str(data / "wiki.txt.gz")], cutoff_len=64, over_length="truncate")
    assert len(cut.rows["train"]) == 2
    assert cut.gates["dataset.truncation"].verdict is Verdict.WARNED


def test_split_samples_begin_with_bos_where_the_tokenizer_adds_one(
    run: Run, publish, sentencepiece_dir: Path
) -> None:
    tokenizer = publish(sentencepiece_dir, "tokenizer", "sentencepiece")
    done = run([{"text": "llama " * 100}], tokenizer=tokenizer, cutoff_len=50)
    assert len(done.rows["train"]) > 2
    for item in done.rows["train"]:
        assert (item["input_ids"][0], item["labels"][0]) == (1, -100)
        assert len(item["input_ids"]) <= 50
        assert item["labels"][1:] == item["input_ids"][1:]
    assert done.files["train"] == ["data.arrow", "dataset.json", "probe.json"]
    assert done.gates["dataset.bos"].verdict is Verdict.PASSED


def test_silently_cut_rows_are_told_and_refused_when_asked(run: Run) -> None:
    rows = [row(i) for i in range(8)] + [row(9, output="llama " * 200)] * 2
    gate = run(rows, cutoff_len=100).gates["dataset.truncation"]
    assert (gate.verdict, gate.figure, gate.threshold) == (Verdict.WARNED, 0.2, 0.1)
    assert "2 of 10 rows were cut at 100 tokens" in gate.detail
    assert "row 9 (line 9)" in gate.detail
    assert "raise cutoff_len" in gate.detail
    enforced = {"dataset.truncation": types_pb2.GATE_MODE_ENFORCE}
    assert run(rows, cutoff_len=100, gates=enforced).gates["dataset.truncation"].verdict is (
        Verdict.FAILED
    )
    kept = run(rows, cutoff_len=100, gates=enforced, max_truncated_share=0.2)
    assert kept.gates["dataset.truncation"].verdict is Verdict.PASSED
    assert kept.report["encoded"]["truncated_rows"] == 2


def test_long_rows_are_dropped_or_refused_when_asked(run: Run) -> None:
    rows = [row(1), row(2, output="llama " * 200), row(3)]
    done = run(rows, cutoff_len=100, over_length="drop")
    assert len(done.rows["train"]) == 2
    assert done.report["encoded"]["dropped_rows"] == 1
    assert done.report["long_rows"]["named"][0]["row"] == 2
    assert done.gates["dataset.truncation"].figure == 0
    with pytest.raises(FailedPrecondition, match=r"1 rows are longer .*row 2.*tokens.* would do"):
        run(rows, cutoff_len=100, over_length="fail")
    assert len(run(rows[:1], cutoff_len=100, over_length="fail").rows["train"]) == 1


def test_equal_rows_are_kept_once_when_asked(run: Run) -> None:
    rows = [row(1), row(2), row(1), row(1, input="x")]
    assert len(run(rows).rows["train"]) == 4
    done = run(rows, dedup="exact")
    assert len(done.rows["train"]) == 3
    assert done.report["duplicates"] == {"equal": 1, "near": 0}
    across = run(rows[:2], rows[2:], dedup="exact")
    assert sorted(across.texts()) == sorted(done.texts())


def test_rows_that_say_nearly_the_same_are_kept_once_when_asked(run: Run) -> None:
    story = " ".join(f"word{number}" for number in range(60))
    other = " ".join(f"thing{number}" for number in range(60))
    near = story.replace("word30", "changed").upper()
    rows = [row(1, output=text) for text in (story, other, near, f"{story} again", story)]
    done = run(rows, dedup="near", dedup_threshold=0.7)
    assert len(done.rows["train"]) == 2
    assert done.report["duplicates"] == {"equal": 1, "near": 2}
    assert sorted(done.trained()) == [f"{other}<|im_end|>", f"{story}<|im_end|>"]
    strict = run(rows, dedup="near", dedup_threshold=1.0)
    assert strict.report["duplicates"] == {"equal": 1, "near": 0}
    done = run(
        [row(1, output="你好，世界！今天天气很好。"), row(1, output="你好世界今天天气很好")],
        dedup="near",
    )
    assert done.report["duplicates"]["near"] == 1


def test_sources_are_mixed_by_their_weights(run: Run) -> None:
    first, second = [row(i) for i in range(10)], [row(i) for i in range(100, 120)]
    done = run(first, second, source_weights=[3, 0.5], val_set_size=4)
    texts = done.texts() + done.texts("val")
    own = [text for text in done.texts() if "What is 1" in text and "What is 10" not in text]
    assert len(set(texts)) == 20
    assert not set(done.texts()) & set(done.texts("val"))
    assert len(done.rows["val"]) == 4
    assert own
    only = run(first, second, source_weights=[1, 0])
    assert len(only.rows["train"]) == 10


def test_rows_of_other_stages_follow_the_sources(run: Run, publish) -> None:
    raw = publish({"rows.jsonl": json.dumps(row(7)) + "\n"}, "dataset", "translated")
    done = run([row(1)], raw=[raw], source_weights=[1, 2])
    assert sorted(done.trained()) == [
        *("It is 1.<|im_end|>", "It is 7.<|im_end|>", "It is 7.<|im_end|>")
    ]
    alone = run(raw=[raw], sources=[])
    assert alone.trained() == ["It is 7.<|im_end|>"]
    assert alone.report["sources"][0]["sha256"].startswith("sha256:")


def test_the_number_of_processes_never_changes_the_result(run: Run, several: None) -> None:
    rows = [row(i, output="llama " * (i % 9 + 1)) for i in range(60)]
    rows[20] = {"instruction": "x"}
    settings = {"val_set_size": 9, "dedup": "near", "on_bad_row": "skip", "packing": True}
    one = run(rows, num_proc=1, **settings)
    three = run(rows, num_proc=3, **settings)
    assert one.bytes == three.bytes
    one.report["spec"].pop("num_proc"), three.report["spec"].pop("num_proc")
    assert one.report == three.report


def test_a_killed_worker_is_named_as_such(
    run: Run, several: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def kept(*arguments: Any, **named: Any) -> Any:
        started.append(popen(*arguments, **named))
        return started[-1]

    monkeypatch.setattr(crew.subprocess, "Popen", kept)
    ask = crew.Crew._ask

    def kill_first(self: crew.Crew, question: Any) -> Any:
        if started[0].poll() is None:
            os.kill(started[0].pid, signal.SIGKILL)
            started[0].wait()
        return ask(self, question)

    monkeypatch.setattr(crew.Crew, "_ask", kill_first)
    with pytest.raises(ResourceExhausted, match=r"signal 9, .*out of memory: set num_proc lower"):
        run([row(i) for i in range(40)], num_proc=2)
    assert all(process.poll() is not None for process in started)


def test_workers_leave_when_their_job_is_gone(tmp_path: Path, bytes_dir: Path) -> None:
    import sys

    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from arriero.dataset.batches import Batches, Settings\n"
        "from arriero.dataset.crew import Crew\n"
        f"batches = Batches(Settings({str(bytes_dir)!r}, '', 64, False, True, 'auto', False))\n"
        "with Crew(batches, 2) as crew:\n"
        "    print(*[worker.pid for worker in crew._workers], flush=True)\n"
        "    time.sleep(60)\n"
    )
    job = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    pids = [int(word) for word in job.stdout.readline().split()]
    job.kill()
    job.wait()
    import psutil

    _, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], 120)
    assert not alive


def test_a_users_own_template_is_a_file(run: Run, data: Path) -> None:
    source = (
        "{% for m in messages %}{{ '[' + m.role + '] ' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    (data / "brackets.jinja").write_text(source)
    done = run([row(1)], template=str(data / "brackets.jinja"))
    assert done.texts() == ["[user] What is 1?<|im_end|>[assistant] It is 1.<|im_end|>"]
    assert done.trained() == ["It is 1.<|im_end|>"]
    assert done.facts["train"]["template"] == "brackets"
    assert done.report["spec"]["template_sha256"].startswith("sha256:")
    (data / "own.json").write_text(
        json.dumps({"name": "own", "chat_template": source, "end_of_turn": "<|im_end|>"})
    )
    assert run([row(1)], template=str(data / "own.json")).texts() == done.texts()


def test_a_template_that_changed_since_it_was_accepted_is_refused(run: Run, data: Path) -> None:
    (data / "own.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")

    def change(_: Job) -> None:
        (data / "own.jinja").write_text("{% for m in messages %}x{{ m.content }}{% endfor %}")

    with pytest.raises(InvalidArgument, match=r"template_sha256: .*the file changed"):
        run([row(1)], template=str(data / "own.jinja"), seen=change)


def test_a_template_that_refuses_a_row_makes_it_a_bad_row(run: Run, data: Path) -> None:
    (data / "one.jinja").write_text(
        "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    rows = [chat("a", "b"), chat("a", "b", "c", "d")]
    gate = run(rows, template=str(data / "one.jinja")).gates["dataset.schema"]
    assert gate.verdict is Verdict.FAILED
    assert "row 2 (line 2): messages: the template refuses them: one turn only" in gate.detail


def test_a_vocabulary_larger_than_the_embedding_fails_the_gate(
    run: Run, publish, tmp_path: Path, bytes_dir: Path
) -> None:
    import shutil

    model = tmp_path / "small"
    shutil.copytree(bytes_dir, model)
    (model / "config.json").write_text('{"vocab_size": 329}')
    gate = run([row(1)], tokenizer=publish(model, "model", "small")).gates["tokenizer.match"]
    assert (gate.verdict, gate.figure, gate.threshold) == (Verdict.FAILED, 330, 329)
    assert "has none" in gate.detail
    (model / "config.json").write_text('{"text_config": {"vocab_size": 384}}')
    gate = run([row(1)], tokenizer=publish(model, "model", "large")).gates["tokenizer.match"]
    assert gate.verdict is Verdict.PASSED
    assert run([row(1)]).gates["tokenizer.match"].verdict is Verdict.SKIPPED


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"over_length": "cut"}, "over_length", "truncate or drop or fail or split"),
        ({"dedup": "fuzzy"}, "dedup", "none or exact or near"),
        ({"dedup_threshold": 1.5}, "dedup_threshold", "a share from 0 to 1"),
        ({"dedup": "near", "dedup_threshold": 0.1}, "dedup_threshold", "would make all rows one"),
        ({"max_truncated_share": -1}, "max_truncated_share", "a share from 0 to 1"),
        ({"num_proc": -1}, "num_proc", "0 for all CPUs"),
        ({"source_weights": [1, 2]}, "source_weights", "2 weights for 1 sources"),
        ({"source_weights": [-1]}, "source_weights[0]", "expected 0 to"),
        ({"source_weights": [0]}, "source_weights", "takes no row"),
        ({"columns": {"instructions": "q"}}, "columns['instructions']", "mean 'instruction'"),
        ({"template_sha256": "sha256:00"}, "template_sha256", "path of a file"),
        ({"template": "own.jinja"}, "template", "not an absolute path"),
    ],
)
def test_what_is_wrong_is_refused_by_its_field(run: Run, fields, field: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        run([row(1)], **fields)
    assert [violation.field for violation in caught.value.violations] == [field]
