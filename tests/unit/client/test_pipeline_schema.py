"""What editors are told about pipeline files agrees with what reading them accepts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from arriero.client import parse_pipeline, pipeline_schema
from arriero.errors import InvalidArgument
from arriero.v1 import pipeline_pb2

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*/pipeline.yaml"))
CHECK = jsonschema.Draft7Validator(pipeline_schema())


class Loader(yaml.SafeLoader):
    """YAML 1.2's numbers, as editors read them: 3e-4 is one."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9.]*[eE][-+]?[0-9]+"), list("-+0123456789")
)


def problems(text: str) -> list[str]:
    return [error.message for error in CHECK.iter_errors(yaml.load(text, Loader))]


def accepted(text: str) -> bool:
    try:
        parse_pipeline(text)
    except InvalidArgument:
        return False
    return True


GOOD = """
name: faq
stages:
- {name: base, import: {source: ./model, as: model}}
- name: rows
  dataset: {sources: [a.jsonl], tokenizer: base, gates: {dataset.bos: warn}, columns: {input: q}}
- {name: sft, train: {model: base, dataset: rows, learning_rate: 3e-4, lora: {r: 8}}}
- {name: q, quantize: {model: base, types: [Q8_0]}, force: true}
- {name: best, evaluate: {models: q, choose: {smallest: {max_kld: 0.05}}}}
- {name: live, deploy: {model: best, endpoint: faq, rope: ntk}}
- {name: long, deploy: {model: best, endpoint: long, rope: {type: yarn, factor: 4}}}
tags: {"gguf/faq:prod": best}
"""


def test_the_schema_is_one() -> None:
    jsonschema.Draft7Validator.check_schema(pipeline_schema())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name)
def test_every_example_fits(path: Path) -> None:
    assert problems(path.read_text()) == []


def test_a_good_file_fits() -> None:
    assert problems(GOOD) == []
    assert accepted(GOOD)


@pytest.mark.parametrize(
    ("find", "put"),
    [
        ("learning_rate", "learning_rat"),
        ("3e-4", "fast"),
        ("r: 8", "r: 8.5"),
        ("r: 8", "rank: 8"),
        ("[a.jsonl]", "a.jsonl"),
        ("[Q8_0]", "Q8_0"),
        ("warn", "loud"),
        ("force: true", "force: perhaps"),
        ("import:", "imports:"),
        ("rope: ntk", "rope: 4"),
        ("{sources: [a.jsonl], tok", "{cutoff_len: 4294967296, tok"),
        (", import: {source: ./model, as: model}", ""),
        ("{name: q, quantize", "{import: {source: x}, name: q, quantize"),
    ],
)
def test_what_reading_refuses_does_not_fit(find: str, put: str) -> None:
    wrong = GOOD.replace(find, put)
    assert wrong != GOOD
    assert not accepted(wrong)
    assert problems(wrong)


@pytest.mark.parametrize(
    ("find", "put"),
    [("dataset.bos", "dataset.boss"), ("tokenizer: base, ", ""), ("name: faq", "tags: {}")],
)
def test_what_is_refused_only_by_the_services_does_not_fit_either(find: str, put: str) -> None:
    assert problems(GOOD.replace(find, put, 1))


def test_every_field_of_every_stage_is_described_or_speaks_for_itself() -> None:
    schema: dict[str, Any] = pipeline_schema()
    stages = pipeline_pb2.Stage.DESCRIPTOR.oneofs_by_name["work"].fields
    for stage in stages:
        found = schema["definitions"][stage.message_type.name]["properties"]
        assert set(found) == set(stage.message_type.fields_by_name)
    dataset = schema["definitions"]["DatasetSpec"]["properties"]
    assert dataset["cutoff_len"] == {
        "type": "integer",
        "minimum": -(2**31),
        "maximum": 2**31 - 1,
        "description": "Longest row in tokens.",
        "default": 512,
    }
    assert "Takes a model or tokenizer: a stage" in dataset["tokenizer"]["description"]
    assert schema["definitions"]["TransformSpec"]["properties"]["fields"]["default"] == ["output"]
