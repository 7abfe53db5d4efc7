"""The wire contract: committed code equals what the protos generate, and says what it should."""

import filecmp
import importlib.util
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor, ServiceDescriptor

from arriero.v1 import (
    dataset_pb2,
    inference_pb2,
    job_pb2,
    merging_pb2,
    orchestrator_pb2,
    pipeline_pb2,
    quantization_pb2,
    training_pb2,
    types_pb2,
)

ROOT = Path(__file__).resolve().parents[2]
MODULES = (
    dataset_pb2,
    inference_pb2,
    job_pb2,
    merging_pb2,
    orchestrator_pb2,
    quantization_pb2,
    training_pb2,
)
SERVICES = [
    service for module in MODULES for service in module.DESCRIPTOR.services_by_name.values()
]


def test_committed_code_is_what_the_protos_generate(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "protos" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.generate(tmp_path)
    made = tmp_path / "arriero" / "v1"
    committed = ROOT / "services" / "arriero" / "v1"
    names = sorted(path.name for path in made.iterdir())
    kept = [*committed.glob("*_pb2*"), committed / "comments.json"]
    assert names == sorted(path.name for path in kept)
    _, differing, missing = filecmp.cmpfiles(made, committed, names, shallow=False)
    assert (differing, missing) == ([], []), "run `make protos` and commit"


@pytest.mark.parametrize("service", SERVICES, ids=lambda s: s.name)
def test_each_rpc_says_whether_it_may_be_retried(service: ServiceDescriptor) -> None:
    path = ROOT / "protos" / service.file.name
    lines = path.read_text().splitlines()
    for method in service.methods:
        at = next(i for i, line in enumerate(lines) if f"rpc {method.name}(" in line)
        comment = []
        while lines[at - 1].strip().startswith("//"):
            at -= 1
            comment.append(lines[at].lower())
        text = " ".join(comment)
        said = ("idempotent", "retr", "read-only", "fails with already_exists")
        assert any(word in text for word in said), f"{service.name}.{method.name}"


def test_every_artifact_input_of_a_stage_names_the_kinds_it_takes() -> None:
    kinds = {"model", "dataset", "tokenizer", "adapter", "checkpoint", "gguf", "report"}
    found = 0
    for stage in pipeline_pb2.Stage.DESCRIPTOR.oneofs_by_name["work"].fields:
        for field in stage.message_type.fields:
            if field.GetOptions().HasExtension(types_pb2.input):
                rule = field.GetOptions().Extensions[types_pb2.input]
                assert field.type == FieldDescriptor.TYPE_STRING
                assert rule.kinds
                assert set(rule.kinds) <= kinds
                found += 1
    assert found >= 10


def test_every_knob_with_a_default_can_be_left_out() -> None:
    """0 and unset differ, so a field with a default has presence."""
    for stage in pipeline_pb2.Stage.DESCRIPTOR.oneofs_by_name["work"].fields:
        for field in stage.message_type.fields:
            if field.GetOptions().Extensions[types_pb2.default_value] and not field.is_repeated:
                assert field.has_presence, f"{stage.name}.{field.name}"
