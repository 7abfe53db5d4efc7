"""What is wrong with a pipeline is said before anything starts, and where it is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

Stage = dict[str, Any]
Write = Callable[..., Path]
Arriero = Callable[..., Result]

NO_DIGEST = "sha256:" + "0" * 64


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
        "expected /path/to/rows.jsonl, a directory of such files, dataset/name:tag",
    ),
    "a template that climbs out": Case(
        {"rows": rows(template="../template.json")},
        "stages[1].dataset.template",
        "template: ../template.json",
        "/../template.json' climbs with '..'",
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
