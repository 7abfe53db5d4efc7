"""Pipeline files: what is read, what is refused, and where it says it is wrong."""

import pytest

from arriero.client import absolute_source, load_pipeline, parse_pipeline
from arriero.errors import FieldViolation, InvalidArgument, NotFound
from arriero.v1 import pipeline_pb2, types_pb2

WHOLE = """\
name: zh
labels: {team: faq}
stages:
- {name: base, import: {source: "hf://meta-llama/Llama-2-7b-hf@0123456", as: model}}
- name: rows
  dataset:
    sources: [./rows.jsonl, /data/more.json, "dataset/alpaca-zh:v1"]
    tokenizer: base
    val_set_size: 0
    add_eos_token: false
    gates: {dataset.schema: warn, dataset.bos: skip}
- name: sft
  train:
    model: base
    dataset: rows
    lora: {r: 16, lora_alpha: 32, target_modules: [all-linear]}
    learning_rate: 3e-4
    num_epochs: 2
  force: true
- {name: quants, quantize: {model: base, types: [Q4_0, Q8_0]}}
- {name: best, evaluate: {models: [quants], text: wiki.txt, choose: {smallest: {max_kld: .05}}}}
- {name: live, deploy: {model: best, endpoint: zh, replicas: 3}}
tags: {"gguf/zh:prod": best}
"""


def _refused(text, **kwargs):
    with pytest.raises(InvalidArgument) as caught:
        parse_pipeline(text, source="p.yaml", **kwargs)
    return caught.value


def _stage(body):
    """A pipeline with one train stage; `body` starts in line 5, column 7."""
    return f"name: a\nstages:\n- name: sft\n  train: {{\n      {body} }}\n"


# what is read


def test_a_whole_pipeline_is_read_field_by_field(tmp_path):
    pipeline = parse_pipeline(WHOLE, directory=tmp_path).pipeline
    assert [s.WhichOneof("work") for s in pipeline.stages] == [
        "import", "dataset", "train", "quantize", "evaluate", "deploy",
    ]  # fmt: skip
    assert getattr(pipeline.stages[0], "import").source.startswith("hf://")
    assert pipeline.stages[4].evaluate.text == str(tmp_path / "wiki.txt")
    rows = pipeline.stages[1].dataset
    assert list(rows.sources) == [
        str(tmp_path / "rows.jsonl"),
        "/data/more.json",
        "dataset/alpaca-zh:v1",
    ]
    assert rows.HasField("val_set_size")
    assert not rows.HasField("cutoff_len")
    assert dict(rows.gates) == {
        "dataset.schema": types_pb2.GATE_MODE_WARN,
        "dataset.bos": types_pb2.GATE_MODE_SKIP,
    }
    train = pipeline.stages[2].train
    assert (train.lora.r, train.lora.lora_alpha, train.learning_rate) == (16, 32.0, 3e-4)
    assert pipeline.stages[2].force
    assert pipeline.stages[4].evaluate.choose.smallest.max_kld == 0.05
    assert dict(pipeline.tags) == {"gguf/zh:prod": "best"}
    assert dict(pipeline.labels) == {"team": "faq"}


def test_an_empty_message_counts_as_given():
    text = "name: a\nstages: [{name: e, evaluate: {models: [q], choose: {smallest: {}}}}]"
    assert parse_pipeline(text).pipeline.stages[0].evaluate.choose.HasField("smallest")


def test_relative_paths_start_at_the_file_and_keep_their_dots(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "p.yaml").write_text(
        "name: a\nstages:\n- {name: m, import: {source: ../model}}\n"
        "- {name: d, dataset: {sources: [x/../y.json], tokenizer: m}}\n"
    )
    monkeypatch.chdir(tmp_path / "a")
    pipeline = load_pipeline("../a/p.yaml").pipeline
    assert getattr(pipeline.stages[0], "import").source == f"{tmp_path}/a/../model"
    assert list(pipeline.stages[1].dataset.sources) == [f"{tmp_path}/a/x/../y.json"]


def test_a_templates_file_is_a_path_and_its_name_is_none(tmp_path):
    (tmp_path / "p.yaml").write_text(
        "name: a\nstages:\n"
        "- {name: d, dataset: {sources: [x.json], tokenizer: m, template: own.jinja}}\n"
        "- {name: e, dataset: {sources: [x.json], tokenizer: m, template: chatml}}\n"
    )
    stages = load_pipeline(tmp_path / "p.yaml").pipeline.stages
    assert [stage.dataset.template for stage in stages] == [f"{tmp_path}/own.jinja", "chatml"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rows.json", "/d/rows.json"),
        ("./dataset/rows.json", "/d/dataset/rows.json"),
        ("dataset/rows:v1", "dataset/rows:v1"),
        ("sha256:00", "sha256:00"),
        ("pypi://x==1/y.gguf", "pypi://x==1/y.gguf"),
        ("/x/../y", "/x/../y"),
    ],
)
def test_only_relative_paths_are_made_absolute(text, expected, tmp_path):
    assert absolute_source(text, tmp_path).replace(str(tmp_path), "/d") == expected


def test_the_home_directory_is_written_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/ana")
    assert absolute_source("~/rows.json", tmp_path) == "/home/ana/rows.json"


def test_anchors_are_read():
    text = (
        "name: a\nstages:\n- {name: x, train: {model: m, dataset: d, lora: &l {r: 4}}}\n"
        "- {name: y, train: {model: m, dataset: d, lora: *l}}\n"
    )
    assert parse_pipeline(text).pipeline.stages[1].train.lora.r == 4


# what is refused


@pytest.mark.parametrize(
    ("body", "column", "path", "says"),
    [
        ("lerning_rate: 1", 7, "lerning_rate", "did you mean 'learning_rate'?"),
        ("lora: {rank: 8}", 14, "lora.rank", "unknown field 'rank'"),
        ("lora: 8", 13, "lora", "expected fields (r, "),
        ("lora: {target_modules: all-linear}", 30, "lora.target_modules", "write [all-linear]"),
        ("lora: {r: eight}", 17, "lora.r", "expected a whole number, found 'eight'"),
        ("lora: {r: 1.5}", 17, "lora.r", "expected a whole number, found the number 1.5"),
        ('lora: {r: "8"}', 17, "lora.r", "leave the quotes out"),
        ("lora: {r: 99999999999}", 17, "lora.r", "from -2147483648 to 2147483647"),
        ("lora: {r: }", 16, "lora.r", "found nothing"),
        ("lora: {use_rslora: yes}", 26, "lora.use_rslora", "expected true or false, found 'yes'"),
        ("model: 7", 14, "model", "expected text, found the number 7; put it in quotes"),
        ("model: true", 14, "model", "put it in quotes"),
        ("model: [a]", 14, "model", "expected text, found a list"),
        ("model: !x y", 14, "model", "found the YAML tag '!x'"),
        ("learning_rate: .nan", 22, "learning_rate", "expected a number"),
        ("learning_rate: 1e999", 22, "learning_rate", "expected a number"),
        ("gates: [x]", 14, "gates", "expected names with values, found a list"),
        ("gates: {train.finite: wran}", 29, "gates['train.finite']", "did you mean 'warn'?"),
        ("model: a, model: b", 17, "model", "'model' is given twice, first in line 5"),
        ("<<: {model: a}", 7, "<<", "merge keys"),
    ],
)
def test_a_wrong_field_is_named_with_its_place(body, column, path, says):
    error = _refused(_stage(body))
    assert [v.field for v in error.violations] == [f"stages[0].train.{path}"]
    assert error.message.startswith(f"p.yaml:5:{column}: ")
    assert says in error.message


@pytest.mark.parametrize(
    ("text", "place", "says"),
    [
        ("", "p.yaml", "empty"),
        ("# only a comment\n", "p.yaml", "empty"),
        ("- a\n- b\n", "p.yaml:1:1", "expected fields (name, stages"),
        ("name: a\nstages: {x: 1}\n", "p.yaml:2:9", "expected a list, found fields"),
        ("name: a\nstagse: []\n", "p.yaml:2:1", "did you mean 'stages'?"),
        ("name: a\nmatrix: {}\n", "p.yaml:2:1", "reserved"),
        ("name: a\nname: b\n", "p.yaml:2:1", "given twice, first in line 1"),
        ("name: a\n? [x]\n: y\n", "p.yaml:2:3", "expected a name, found a list"),
        ("name: [a\n", "p.yaml:2:1", "not YAML"),
        ("name: a\n---\nname: b\n", "p.yaml:2:1", "not YAML"),
        ("name: *nobody\n", "p.yaml:1:7", "not YAML"),
        ("name: a\n\tb: c\n", "p.yaml:2:1", "not YAML"),
        ("name: a\nlabels: {x: \x01}\n", "p.yaml:2:13", "not YAML"),
        (
            "name: a\nstages: [{name: x}]",
            "p.yaml:2:10",
            "stage without work; expected one of impor",
        ),
        ("name: a\nstages: [{name: x, trian: {}}]", "p.yaml:2:20", "did you mean 'train'?"),
        (
            "name: a\nstages: [{name: x, train: {}, merge: {}}]",
            "p.yaml:2:31",
            "'merge' beside 'train'",
        ),
        ("[" * 5000, "p.yaml", "nested too deeply"),
    ],
)
def test_what_is_no_pipeline_is_refused_with_its_place(text, place, says):
    error = _refused(text)
    assert error.message.startswith(place)
    assert says in error.message


def test_every_mistake_is_told_at_once():
    error = _refused("name: a\nstages:\n- {name: x, train: {modle: b, lora: {r: x}}}\n- {}\n")
    assert [v.field for v in error.violations] == [
        "stages[0].train.modle",
        "stages[0].train.lora.r",
        "stages[1]",
    ]
    assert error.message.endswith("(and 2 more)")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(NotFound, match="does not exist"):
        load_pipeline(tmp_path / "none.yaml")
    with pytest.raises(InvalidArgument, match="cannot be read"):
        load_pipeline(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: ñ".encode("latin-1"))
    with pytest.raises(InvalidArgument, match="UTF-8"):
        load_pipeline(tmp_path / "latin.yaml")
    (tmp_path / "big.yaml").write_bytes(b"#" * (1 << 21))
    with pytest.raises(InvalidArgument, match="larger"):
        load_pipeline(tmp_path / "big.yaml")


def test_one_word_of_a_message_is_its_main_field():
    text = WHOLE.replace("replicas: 3", "rope: ntk")
    file = parse_pipeline(text, source="p.yaml")
    deploy = file.pipeline.stages[-1].deploy
    assert deploy.rope == pipeline_pb2.RopeSpec(type="ntk")
    place = file.locate("stages[5].deploy.rope.type")
    assert place is not None
    assert text.splitlines()[place.line - 1][place.column - 1 :].startswith("ntk")
    for wrong, says in (("4", "expected text, found the number 4"), ("[ntk]", "found a list")):
        error = _refused(WHOLE.replace("replicas: 3", f"rope: {wrong}"))
        assert says in error.message


def test_one_word_in_an_override_too_and_more_beside_it():
    pipeline = _set("stages.live.rope=yarn", "stages.live.rope.factor=4")
    assert pipeline.stages[-1].deploy.rope == pipeline_pb2.RopeSpec(type="yarn", factor=4)


# overrides


def _set(*overrides):
    return parse_pipeline(WHOLE, overrides=overrides).pipeline


def test_overrides_reach_fields_by_stage_name():
    pipeline = _set(
        "name=second",
        "labels.team=other",
        "labels.new.one=x",
        "tags.gguf/zh:prod=quants.Q8_0",
        "stages.sft.lora.r=4",
        "stages.sft.train.num_epochs=1",
        "stages.sft.dataset=rows.val",
        "stages.sft.force=false",
        "stages.rows.gates.dataset.labels=skip",
        "stages.quants.types=[Q4_K_M]",
        "stages.best.choose.smallest.max_kld=1e-2",
        "stages.base.source=pypi://a==1/b=c.gguf",
    )
    assert pipeline.name == "second"
    assert dict(pipeline.labels) == {"team": "other", "new.one": "x"}
    assert pipeline.tags["gguf/zh:prod"] == "quants.Q8_0"
    train = pipeline.stages[2].train
    assert (train.lora.r, train.lora.lora_alpha, train.num_epochs) == (4, 32.0, 1)
    assert train.dataset == "rows.val"
    assert not pipeline.stages[2].force
    assert dict(pipeline.stages[1].dataset.gates) == {
        "dataset.schema": types_pb2.GATE_MODE_WARN,
        "dataset.bos": types_pb2.GATE_MODE_SKIP,
        "dataset.labels": types_pb2.GATE_MODE_SKIP,
    }
    assert list(pipeline.stages[3].quantize.types) == ["Q4_K_M"]
    assert pipeline.stages[4].evaluate.choose.smallest.max_kld == 0.01
    assert getattr(pipeline.stages[0], "import").source == "pypi://a==1/b=c.gguf"


def test_text_in_an_override_is_taken_as_it_is():
    assert _set("stages.rows.template=a: b # c").stages[1].dataset.template == "a: b # c"


def test_paths_in_overrides_start_in_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline = _set("stages.rows.sources=[here.json]")
    assert list(pipeline.stages[1].dataset.sources) == [str(tmp_path / "here.json")]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.sft.lora.r", "expected key=value"),
        ("=1", "expected key=value"),
        ("stages.sft..r=1", "expected key=value"),
        ("stages.stf.lora.r=1", "no stage 'stf'; did you mean 'sft'?"),
        ("stages.sft=1", "expected stages.<name>.<field>=<value>"),
        ("stages.sft.lora.rank=1", "unknown field 'rank'"),
        ("stages.sft.lora.r.x=1", "'r' has no fields"),
        ("stages.sft.lora.r=x", "expected a whole number"),
        ("stages.sft.lora.r=", "no value"),
        ("stages.quants.types=Q8_0", "write [Q8_0]"),
        ("stages.rows.gates.dataset.bos=wran", "did you mean 'warn'?"),
        ("nmae=x", "did you mean 'name'?"),
        ("stages.sft.lora.r=[", "not YAML"),
    ],
)
def test_a_wrong_override_is_refused_in_its_own_words(override, says):
    error = _refused(WHOLE, overrides=[override])
    assert f"--set {override}" in error.message
    assert says in error.message


# places for what the server refuses


def test_a_field_is_found_by_its_path_or_by_what_holds_it():
    file = parse_pipeline(WHOLE, source="p.yaml")
    assert str(file.locate("stages[2].train.lora.r")) == "p.yaml:16:15"
    assert str(file.locate("stages[2].train.lora")) == "p.yaml:16:5"
    assert str(file.locate("stages[2].train.lora.lora_dropout")) == "p.yaml:16:5"
    assert str(file.locate("stages[1].dataset.sources[2]")) == "p.yaml:7:46"
    assert str(file.locate("stages[1].dataset.gates['dataset.bos']")) == "p.yaml:11:48"
    assert str(file.locate("tags['gguf/zh:prod']")) == "p.yaml:23:24"
    assert file.locate("nowhere") is None


def test_a_refusal_by_the_server_is_shown_with_its_place():
    file = parse_pipeline(WHOLE, source="p.yaml", overrides=["stages.sft.lora.lora_alpha=-1"])
    explained = file.explain(
        InvalidArgument(
            "two",
            violations=[
                FieldViolation("stages[2].train.lora.r", "16 is above 8"),
                FieldViolation("stages[2].train.lora.lora_alpha", "-1 is below 0"),
                FieldViolation("elsewhere", "no"),
            ],
        )
    )
    assert [v.description for v in explained.violations] == [
        "p.yaml:16:15: 16 is above 8",
        "--set stages.sft.lora.lora_alpha=-1: -1 is below 0",
        "elsewhere: no",
    ]
    assert explained.message == "p.yaml:16:15: 16 is above 8 (and 2 more)"


def test_the_one_field_of_another_error_is_shown_with_its_place():
    file = parse_pipeline(WHOLE, source="p.yaml")
    missing = NotFound("'/x' does not exist").at("sources[2]").at("stages[1].dataset")
    assert file.explain(missing).message == (
        "stages[1].dataset.sources[2]: p.yaml:7:46: '/x' does not exist"
    )
    other = NotFound("no run 'x'")
    assert file.explain(other).message == "no run 'x'"
