"""What is wrong with a request is said before anything starts, and where it is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from arriero.cli.__main__ import app
from arriero.errors import InvalidArgument, Unauthenticated
from arriero.gates.golden import Golden
from arriero.rpc.channel import connect_sync
from arriero.rpc.status import translated
from arriero.settings import ClientSettings
from arriero.store import ManifestDraft, Store
from arriero.testing.models import VOCABULARY
from arriero.v1 import (
    dataset_pb2,
    dataset_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    merging_pb2,
    merging_pb2_grpc,
    quantization_pb2,
    quantization_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)

Stage = dict[str, Any]
Write = Callable[..., Path]
Arriero = Callable[..., Result]

NO_DIGEST = "sha256:" + "0" * 64
TOKEN = "a-token-of-the-tests-0123456789"


def rows(**fields: Any) -> Stage:
    given = {"sources": ["rows.jsonl"], "tokenizer": "base", "template": "alpaca", **fields}
    return {"dataset": given}


def train(**fields: Any) -> Stage:
    return {"train": {"model": "base", "dataset": "rows", **fields}}


def merge(**fields: Any) -> Stage:
    return {"merge": {"model": "base", "adapters": ["sft"], **fields}}


def quantize(**fields: Any) -> Stage:
    return {"quantize": {"model": "tuned", "types": ["F16"], **fields}}


def deploy(**fields: Any) -> Stage:
    return {"deploy": {"model": "best", "endpoint": "live", **fields}}


@dataclass
class Case:
    """A pipeline with one thing wrong.

    Attributes:
        stages: that take the place of the right ones.
        field: that must be named.
        line: of the file, that must be named too.
        says: what the message must match.
        code: of the error.
        files: written beside the pipeline first, by name.
    """

    stages: dict[str, Stage]
    field: str
    line: str
    says: str
    code: str = "INVALID_ARGUMENT"
    files: dict[str, str] = field(default_factory=dict)


ROW = '{"instruction": "a", "output": "b"}\n'
CASES = {
    # What the file alone tells.
    "an unknown field": Case(
        {"sft": train(learning_rat=0.1)},
        "stages[2].train.learning_rat",
        "learning_rat: 0.1",
        "unknown field 'learning_rat'; did you mean 'learning_rate'",
    ),
    "a word for a number": Case(
        {"sft": train(batch_size="four")},
        "stages[2].train.batch_size",
        "batch_size: four",
        "expected a whole number, found 'four'",
    ),
    "a word for a list": Case(
        {"rows": rows(sources="rows.jsonl")},
        "stages[1].dataset.sources",
        "sources: rows.jsonl",
        r"expected a list, found 'rows.jsonl'; write \[rows.jsonl\]",
    ),
    "an unknown gate mode": Case(
        {"tuned": merge(gates={"merge.delta": "perhaps"})},
        "stages[3].merge.gates['merge.delta']",
        "merge.delta: perhaps",
        "unknown value 'perhaps'; known: enforce, warn, skip",
    ),
    # What the graph tells.
    "a cycle": Case(
        {
            "tuned": merge(model="again"),
            "quants": quantize(model="base"),
            "again": merge(model="tuned"),
        },
        "stages[7].merge.model",
        "model: tuned",
        "the stages form a cycle: tuned -> again -> tuned",
    ),
    "an input that names no stage": Case(
        {"rows": rows(tokenizer="bse")},
        "stages[1].dataset.tokenizer",
        "tokenizer: bse",
        r"no stage is named 'bse' \(stages: .*\); did you mean 'base'",
    ),
    "an output that is not there": Case(
        {"tuned": merge(adapters=["sft.lora"])},
        "stages[3].merge.adapters[0]",
        "- sft.lora",
        "no output 'lora'; it has: adapter, golden",
    ),
    "a stage of the wrong kind": Case(
        {"sft": train(model="rows")},
        "stages[2].train.model",
        "model: rows",
        "'rows' is of kind dataset; expected model",
    ),
    "a missing input": Case(
        {"best": {"evaluate": {"models": []}}},
        "stages[5].evaluate.models",
        "models: []",
        "empty; expected at least one gguf",
    ),
    "a tag that is none": Case(
        {"tags": {"gguf": "best"}},
        "tags['gguf']",
        "gguf: best",
        "'gguf' is not a reference; expected kind/name:tag",
    ),
    # What the store tells.
    "a reference to no artifact": Case(
        {"sft": train(model="model/none:v1")},
        "stages[2].train.model",
        "model: model/none:v1",
        "no tag model/none:v1",
        code="NOT_FOUND",
    ),
    "a digest of no artifact": Case(
        {"sft": train(model=NO_DIGEST)},
        "stages[2].train.model",
        f"model: {NO_DIGEST}",
        "no artifact sha256:0000",
        code="NOT_FOUND",
    ),
    "a reference of the wrong kind": Case(
        {"sft": train(model="dataset/raw:v1")},
        "stages[2].train.model",
        "model: dataset/raw:v1",
        "'dataset/raw:v1' is of kind dataset; expected model",
    ),
    "a source in the store that is not there": Case(
        {"rows": rows(sources=["dataset/none:v1"])},
        "stages[1].dataset.sources[0]",
        "- dataset/none:v1",
        "no tag dataset/none:v1",
        code="NOT_FOUND",
    ),
    # What the rooms tell, although nothing before these stages was made yet.
    "a missing file of rows": Case(
        {"rows": rows(sources=["missing.jsonl"])},
        "stages[1].dataset.sources[0]",
        "- missing.jsonl",
        "missing.jsonl' does not exist",
        code="NOT_FOUND",
    ),
    "a missing model": Case(
        {"base": {"import": {"source": "./no-model"}}},
        "stages[0].import.source",
        "source: ./no-model",
        "no-model' does not exist",
        code="NOT_FOUND",
    ),
    "malformed JSON": Case(
        {"rows": rows(sources=["bad.jsonl"])},
        "stages[1].dataset.sources[0]",
        "- bad.jsonl",
        r"bad.jsonl: row 3, line 4: malformed JSON: Unterminated string .*; expected a JSON array",
        files={"bad.jsonl": ROW + "\n" + ROW + ROW[:-3] + "\n" + ROW},
    ),
    "an empty dataset": Case(
        {"rows": rows(sources=["empty.jsonl"])},
        "stages[1].dataset.sources",
        "sources:",
        "hold no rows; expected a JSON array of objects, or one object per line",
        files={"empty.jsonl": "\n"},
    ),
    "an empty array": Case(
        {"rows": rows(sources=["empty.json"])},
        "stages[1].dataset.sources",
        "sources:",
        "hold no rows",
        files={"empty.json": "[]"},
    ),
    "more rows held out than there are": Case(
        {"rows": rows(val_set_size=500)},
        "stages[1].dataset.val_set_size",
        "val_set_size: 500",
        "holds out 500 of 24 usable rows",
    ),
    "an unknown template": Case(
        {"rows": rows(template="alpacca")},
        "stages[1].dataset.template",
        "template: alpacca",
        "unknown template 'alpacca'; did you mean 'alpaca'",
    ),
    "an unknown gate": Case(
        {"rows": rows(gates={"dataset.labls": "skip"})},
        "stages[1].dataset.gates['dataset.labls']",
        "dataset.labls: skip",
        "unknown gate; known gates: dataset.schema",
    ),
    "rank 0": Case(
        {"sft": train(lora={"r": 0})},
        "stages[2].train.lora.r",
        "r: 0",
        "0; expected a rank of 1 to",
    ),
    "a negative learning rate": Case(
        {"sft": train(learning_rate=-0.001)},
        "stages[2].train.learning_rate",
        "learning_rate: -0.001",
        "-0.001; expected a number above 0",
    ),
    "an unknown scheduler": Case(
        {"sft": train(lr_scheduler_type="cosin")},
        "stages[2].train.lr_scheduler_type",
        "lr_scheduler_type: cosin",
        "'cosin' is not available; expected .*; did you mean 'cosine'",
    ),
    "weights for other adapters": Case(
        {"tuned": merge(weights=[0.5, 0.5])},
        "stages[3].merge.weights",
        "weights:",
        "has 2 entries for 1 adapters; expected one for each",
    ),
    "an adapter twice": Case(
        {"tuned": merge(adapters=["sft", "sft"])},
        "stages[3].merge.adapters",
        "adapters:",
        "names one adapter twice",
    ),
    "a dtype that is none": Case(
        {"tuned": merge(dtype="float8")},
        "stages[3].merge.dtype",
        "dtype: float8",
        "'float8' is not known; expected one of auto, bfloat16",
    ),
    "a quant type that does not exist": Case(
        {"quants": quantize(types=["F16", "Q9_K"])},
        "stages[4].quantize.types[1]",
        "- Q9_K",
        "'Q9_K'.*Q4_K_M",
    ),
    "a limit that is no limit": Case(
        {"best": {"evaluate": {"models": ["quants"], "choose": {"smallest": {"max_kld": -1.0}}}}},
        "stages[5].evaluate.choose.smallest.max_kld",
        "max_kld: -1.0",
        "is -1.0; expected a positive number of nats",
    ),
    "replicas below 0": Case(
        {"live": deploy(replicas=-1)},
        "stages[6].deploy.replicas",
        "replicas: -1",
        "-1 is not between 0 and",
    ),
    # What climbs out, and what a spec must not hold.
    "rows that climb out": Case(
        {"rows": rows(sources=["../rows.jsonl"])},
        "stages[1].dataset.sources[0]",
        "- ../rows.jsonl",
        r"climbs with '\.\.'",
    ),
    "rows outside of what may be read": Case(
        {"rows": rows(sources=["/etc/passwd"])},
        "stages[1].dataset.sources[0]",
        "- /etc/passwd",
        "outside of the paths that this service may read .*ARRIERO_ALLOWED_PATHS",
    ),
    "a model that climbs out": Case(
        {"base": {"import": {"source": "../model"}}},
        "stages[0].import.source",
        "source: ../model",
        r"climbs with '\.\.'",
    ),
    "a model outside of what may be read": Case(
        {"base": {"import": {"source": "/etc"}}},
        "stages[0].import.source",
        "source: /etc",
        "outside of the paths",
    ),
    "a wheel's member that climbs out": Case(
        {"base": {"import": {"source": "pypi://llm==1.0/../../model.gguf"}}},
        "stages[0].import.source",
        "source: pypi://llm==1.0/../../model.gguf",
        "is not a path in a wheel",
    ),
    "a reference that climbs out": Case(
        {"sft": train(model="model/../../etc:v1")},
        "stages[2].train.model",
        "model: model/../../etc:v1",
        "'../../etc' is not a name",
    ),
    "a digest that climbs out": Case(
        {"sft": train(model="sha256:../../../etc/passwd")},
        "stages[2].train.model",
        "model: sha256:../../../etc/passwd",
        "is not a whole digest",
    ),
    "a source in the store that climbs out": Case(
        {"rows": rows(sources=["dataset/../../etc"])},
        "stages[1].dataset.sources[0]",
        "- dataset/../../etc",
        "expected /path/to/rows.jsonl, a directory of such files, or dataset/name:tag",
    ),
    "a template that climbs out": Case(
        {"rows": rows(template="../template.json")},
        "stages[1].dataset.template",
        "template: ../template.json",
        "'../template.json' is a path; expected alpaca",
    ),
    "an endpoint that climbs out": Case(
        {"live": deploy(endpoint="../live")},
        "stages[6].deploy.endpoint",
        "endpoint: ../live",
        "'../live' is not an endpoint name",
    ),
    "a stage that climbs out": Case(
        {"../base": {"import": {"source": "."}}},
        "stages[7].name",
        "name: ../base",
        "'../base' is not a stage name",
    ),
    "a tag that climbs out": Case(
        {"tags": {"gguf/../x:v1": "best"}},
        "tags['gguf/../x:v1']",
        "gguf/../x:v1: best",
        "'../x' is not a name",
    ),
}


@pytest.fixture(scope="module")
def arriero(platform: Any) -> Arriero:
    """The `arriero` command in this process, which saves its start; answers as `Result`."""

    def run(*arguments: str, **extra: str) -> Result:
        env = {"ARRIERO_HOME": platform.env["ARRIERO_HOME"], "COLUMNS": "160", **extra}
        done = CliRunner().invoke(app, list(arguments), env=env)
        assert isinstance(done.exception, SystemExit | None), done.exception
        assert "Traceback" not in done.output
        return done

    return run


@pytest.fixture(scope="module")
def untouched(platform: Any, arriero: Arriero, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a platform holds that must not change: a function to look at it."""
    raw = tmp_path_factory.mktemp("raw") / "rows.jsonl"
    raw.write_text(ROW)
    assert arriero("artifacts", "push", str(raw), "dataset/raw:v1").exit_code == 0
    store = platform.home.root / "store"

    def look() -> tuple[Any, ...]:
        places = ("operations/*/*", "staging/*/*", "artifacts/*", "manifests/*", "tags/*/*/*")
        found = [str(path) for place in places for path in sorted(store.glob(place))]
        with platform.client() as client:
            return [run.id for run in client.list_runs()], client.endpoints.list(), found

    return look


@pytest.fixture
def nothing_starts(untouched: Callable[[], Any]) -> Iterator[None]:
    """No run is recorded, no job started, nothing written to the store."""
    before = untouched()
    yield
    assert untouched() == before


def place(path: Path, line: str) -> str:
    """`file:line:` of the first line that ends with the words."""
    lines = path.read_text().splitlines()
    (number, *_) = [i for i, text in enumerate(lines, 1) if text.strip(" -") == line.strip(" -")]
    return f"{path}:{number}:"


def write_case(case: Case, write: Write, directory: Path) -> Path:
    for name, text in case.files.items():
        (directory / name).write_text(text)
    stages = dict(case.stages)
    tags = stages.pop("tags", None)
    path = write(directory, name="wrong", **stages)
    if tags is not None:
        text = "".join(f"  {tag}: {target}\n" for tag, target in tags.items())
        path.write_text(path.read_text() + "tags:\n" + text)
    return path


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_wrong_pipeline_is_refused_by_field_and_line(
    case: Case, arriero: Arriero, tiny_pipeline: Write, tmp_path: Path, nothing_starts: None
) -> None:
    path = write_case(case, tiny_pipeline, tmp_path)
    done = arriero("run", str(path), "--output", "json")
    assert done.exit_code == 2
    assert done.stdout == ""
    error = json.loads(done.stderr)["error"]
    assert error["code"] == case.code
    if case.code == "INVALID_ARGUMENT":
        said = {v["field"]: v["description"] for v in error["violations"]}
    else:
        said = {error["metadata"]["field"]: error["message"]}
    assert case.field in said
    assert place(path, case.line) in said[case.field]
    assert re.search(case.says, said[case.field])


def test_everything_that_is_wrong_is_said_at_once_and_to_people(
    platform: Any, tiny_pipeline: Write, tmp_path: Path, nothing_starts: None
) -> None:
    path = tiny_pipeline(
        tmp_path,
        rows=rows(cutoff_len=1),
        sft=train(learning_rate=-1.0, lora={"r": 0}),
        quants=quantize(types=["Q9_K"]),
    )
    for arguments in ([], ["--dry-run"], ["--detach"]):
        done = platform.cli("run", str(path), *arguments, check=False)
        assert done.returncode == 2
        assert done.stdout == ""
        lines = done.stderr.splitlines()
        assert all(line.startswith("error stages[") and f"{path}:" in line for line in lines)
        assert {line.split()[1].rstrip(":") for line in lines} == {
            "stages[1].dataset.cutoff_len",
            "stages[2].train.learning_rate",
            "stages[2].train.lora.r",
            "stages[4].quantize.types[0]",
        }


def test_an_artifacts_name_that_climbs_out_is_refused(
    arriero: Arriero,
    tiny_pipeline: Write,
    tiny_llama_dir: Path,
    tmp_path: Path,
    nothing_starts: None,
) -> None:
    named = {"import": {"source": str(tiny_llama_dir), "name": "../x"}}
    done = arriero("run", str(tiny_pipeline(tmp_path, base=named)))
    assert done.exit_code == 2
    assert "stages[0].import.name" in done.stderr
    assert "'../x' is not a name" in done.stderr


def test_a_link_that_leads_out_is_refused(
    arriero: Arriero, tiny_pipeline: Write, tmp_path: Path, nothing_starts: None
) -> None:
    (tmp_path / "inside.jsonl").symlink_to("/etc/passwd")
    path = tiny_pipeline(tmp_path, rows=rows(sources=["inside.jsonl"]))
    done = arriero("run", str(path))
    assert done.exit_code == 2
    assert "outside of the paths" in done.stderr


def test_a_token_in_a_pipeline_is_refused_and_not_repeated(
    arriero: Arriero, tiny_pipeline: Write, tmp_path: Path, nothing_starts: None
) -> None:
    secret = "hf_abcdefghijklmnopqrstuvwxyz"
    source = {"source": "hf://org/name", "token_secret": secret}
    done = arriero("run", str(tiny_pipeline(tmp_path, base={"import": source})))
    assert done.exit_code == 2
    assert "stages[0].import.token_secret" in done.stderr
    assert "ARRIERO_SECRET_<NAME>" in done.stderr
    assert secret not in done.output


FILES = {
    "missing": (None, "does not exist"),
    "empty": (b"", "is empty; expected 'name' and 'stages'"),
    "not text": (b"\x89PNG\r\n\x1a\n\xff\xfe", "is not UTF-8 text"),
    "not YAML": (b"name: [x\n", ":2:1: not YAML"),
    "no pipeline": (b"- 1\n", "expected fields (name, stages"),
    "JSON rows": (ROW.encode(), ":1:2: unknown field 'instruction'"),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_wrong_file_is_refused_in_one_line(
    content: tuple[bytes | None, str], arriero: Arriero, tmp_path: Path, nothing_starts: None
) -> None:
    data, says = content
    path = tmp_path / "pipeline.yaml"
    if data is not None:
        path.write_bytes(data)
    done = arriero("run", str(path))
    assert done.exit_code == 2
    assert done.stdout == ""
    first, *_ = done.stderr.splitlines()
    assert first.startswith("error ")
    assert str(path) in first
    assert says in first


# Arguments, exit code, and what the one line says.
COMMANDS = [
    (["run", "/"], 2, "pipeline file / cannot be read: Is a directory"),
    (["runs", "get", "../../etc/passwd"], 2, "no run '../../etc/passwd'"),
    (["runs", "watch", "nope"], 2, "no run 'nope'"),
    (["runs", "logs", "nope"], 2, "no run 'nope'"),
    (["runs", "cancel", "nope"], 2, "no run 'nope'"),
    (["runs", "retry", "nope"], 2, "no run 'nope'"),
    (["artifacts", "get", "model/../x:v1"], 2, "'../x' is not a name"),
    (["artifacts", "get", "nope"], 2, "'nope' is not a reference; expected kind/name:tag"),
    (["artifacts", "get", "deadbeef"], 2, "no artifact deadbeef"),
    (["artifacts", "lineage", NO_DIGEST], 2, "no artifact sha256:0000"),
    (["artifacts", "list", "--kind", "modle"], 2, "kind: 'modle' is not one of model"),
    (["artifacts", "tag", "dataset/raw:v1", "dataset/../x:v1"], 2, "'../x' is not a name"),
    (["artifacts", "tag", "dataset/raw:v1", "model/x:v1"], 2, "is for a model, but"),
    (["artifacts", "pull", "dataset/none:v1", "/nowhere/at/all"], 2, "no tag dataset/none:v1"),
    (["artifacts", "push", "/nope", "dataset/x"], 2, "/nope is neither a directory nor a file"),
    (["artifacts", "push", "/etc/hostname", "dataset/../x"], 2, "'../x' is not a name"),
    (["artifacts", "push", "/etc/hostname", "model/x"], 2, "expected config.json and"),
    (["artifacts", "push", "/etc/hostname", "x"], 2, "'x' is not one of dataset"),
    (["endpoints", "create", "../x", "gguf/a:v1"], 2, "'../x' is not an endpoint name"),
    (["endpoints", "create", "x", "../a"], 2, "unknown kind '..' in '../a'"),
    (["endpoints", "create", "x", "gguf/a:v1"], 2, "no tag gguf/a:v1"),
    (["endpoints", "create", "x", "dataset/raw:v1"], 2, "is of kind dataset; expected gguf"),
    (["endpoints", "get", "nope"], 2, "no endpoint named 'nope'"),
    (["endpoints", "delete", "nope"], 2, "no endpoint named 'nope'"),
    (["endpoints", "scale", "nope", "--replicas", "2"], 2, "no endpoint named 'nope'"),
    (["chat", "nope", "hello"], 2, "no endpoint named 'nope'"),
    (["generate", "nope", "hello"], 2, "no endpoint named 'nope'"),
    (["import", "../model"], 2, "climbs with '..'"),
    (["import", "/etc/passwd"], 2, "outside of the paths"),
    (["import", "ftp://x/y"], 2, "ftp:// is not supported"),
    (["import", "hf://../../x"], 2, "is not a hub repository"),
    (["up"], 1, "already runs"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "says"), COMMANDS, ids=[" ".join(c[0]) for c in COMMANDS]
)
def test_a_wrong_command_is_refused_in_one_line(
    arguments: list[str], code: int, says: str, arriero: Arriero, nothing_starts: None
) -> None:
    done = arriero(*arguments)
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error ")
    assert says in line


USAGES = [
    (["run"], "Missing argument 'PIPELINE.yaml'"),
    (["rnu"], "No such command 'rnu'"),
    (["run", "x.yaml", "--sett", "a=b"], "No such option: --sett"),
    (["run", "x.yaml", "--output", "xml"], "'xml' is not one of 'table', 'json'"),
    (["endpoints", "scale", "x", "--replicas", "many"], "--replicas"),
    (["endpoints", "scale", "x", "--replicas", "-1"], "--replicas"),
    (["runs", "list", "--limit", "0"], "--limit"),
]


@pytest.mark.parametrize(("arguments", "says"), USAGES, ids=[" ".join(u[0]) for u in USAGES])
def test_wrong_flags_are_refused_with_the_usage(
    arguments: list[str], says: str, arriero: Arriero
) -> None:
    done = arriero(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Usage: ")
    assert says in done.stderr


STARTS = [
    ("merging", merging_pb2_grpc.MergingServiceStub, "Import", merging_pb2.ImportRequest),
    ("merging", merging_pb2_grpc.MergingServiceStub, "Merge", merging_pb2.MergeRequest),
    (
        "dataset",
        dataset_pb2_grpc.DatasetServiceStub,
        "PrepareDataset",
        dataset_pb2.PrepareDatasetRequest,
    ),
    ("training", training_pb2_grpc.TrainingServiceStub, "Train", training_pb2.TrainRequest),
    (
        "quantization",
        quantization_pb2_grpc.QuantizationServiceStub,
        "Quantize",
        quantization_pb2.QuantizeRequest,
    ),
    (
        "quantization",
        quantization_pb2_grpc.QuantizationServiceStub,
        "Evaluate",
        quantization_pb2.EvaluateRequest,
    ),
]


@pytest.mark.parametrize("start", STARTS, ids=[s[2] for s in STARTS])
def test_an_empty_start_is_the_callers_mistake(
    start: tuple[Any, ...], platform: Any, nothing_starts: None
) -> None:
    room, stub, method, request = start
    address = platform.home.running()["services"][room]["address"]
    with connect_sync(address) as channel, pytest.raises(InvalidArgument) as caught, translated():
        getattr(stub(channel), method)(request())
    assert caught.value.violations
    assert all(v.field and v.description for v in caught.value.violations)


# Tokens


@pytest.fixture(scope="module")
def guarded(platform_at: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """All services, asking for a token."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(f"# who may call\n{TOKEN} ada\nanother-{TOKEN} bob\n")
    with platform_at(ARRIERO_SERVER_TOKEN_FILE=str(tokens)) as made:
        yield made


@pytest.mark.parametrize(
    ("token", "says"),
    [("", "no bearer token"), (f"{TOKEN}x", "is not one that this server")],
    ids=["missing", "wrong"],
)
def test_without_a_right_token_nobody_gets_in(
    token: str, says: str, guarded: Any, tiny_pipeline: Write, tmp_path: Path
) -> None:
    path = tiny_pipeline(tmp_path)
    for arguments in (["run", str(path)], ["artifacts", "gc"]):
        done = guarded.cli(*arguments, "--output", "json", check=False, ARRIERO_TOKEN=token)
        assert done.returncode == 2
        error = json.loads(done.stderr)["error"]
        assert error["code"] == "UNAUTHENTICATED"
        assert says in error["message"]
        assert "ARRIERO_TOKEN" in error["message"]
        assert TOKEN not in done.stderr
    assert not [*(guarded.home.root / "store").glob("operations/*/*/operation.json")]


def test_each_room_asks_for_itself(guarded: Any) -> None:
    for room, stub, method, request in STARTS:
        address = guarded.home.running()["services"][room]["address"]
        for token in (None, "wrong"):
            channel = connect_sync(address, ClientSettings(token=token))
            with channel, pytest.raises(Unauthenticated), translated():
                getattr(stub(channel), method)(request())


def test_with_a_token_everything_works_between_the_services_too(
    guarded: Any, tiny_gguf: Path, tmp_path: Path
) -> None:
    store = Store.open(guarded.home.store)
    staging = store.staging("tests", "golden")
    even = np.full((4, VOCABULARY), -np.log(VOCABULARY), dtype=np.float16)
    Golden(np.arange(4, dtype=np.int32), np.array([4], dtype=np.int32), even).write(staging)
    golden = store.publish(staging, ManifestDraft(kind="report")).digest
    path = tmp_path / "serve.yaml"
    path.write_text(
        f"""
name: serve
stages:
- {{name: file, import: {{source: {tiny_gguf}}}}}
- {{name: live, deploy: {{model: file, endpoint: live, golden: "{golden}", context: 256,
    gates: {{serve.smoke: warn}}}}}}
"""
    )
    done = guarded.cli("run", str(path), "--output", "json", ARRIERO_TOKEN=TOKEN)
    run = json.loads(done.stdout)
    assert run["state"] == "RUN_STATE_SUCCEEDED"
    assert run["owner"] == "ada"
    shown = guarded.cli("endpoints", "get", "live", "--output", "json", ARRIERO_TOKEN=TOKEN)
    (replica,) = json.loads(shown.stdout)["replicas"]
    assert replica["kl_divergence"] > 0  # the orchestrator was let in
    text = guarded.cli("generate", "live", "Name", "--max-tokens", "3", ARRIERO_TOKEN=TOKEN)
    assert text.stdout.strip("\n")
    with connect_sync(replica["address"]) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(Unauthenticated), translated():
            stub.GetModel(inference_pb2.GetModelRequest())
    for log in guarded.home.logs.iterdir():
        assert TOKEN not in log.read_text(), log
