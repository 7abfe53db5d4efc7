"""Generate `arriero/v1` from the protos: messages, services, type stubs and comments.

    python protos/generate.py services

A test generates into a temporary directory and compares with what is committed.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2

HERE = Path(__file__).resolve().parent


def generate(target: Path) -> None:
    """Write generated code below `target` (which becomes the import root)."""
    target.mkdir(parents=True, exist_ok=True)
    protos = sorted(str(path.relative_to(HERE)) for path in HERE.glob("arriero/v1/*.proto"))
    scripts = Path(sys.executable).parent
    plugins = [
        f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
    ]
    outputs = [f"--{kind}_out={target}" for kind in ("python", "grpc_python")]
    outputs += [f"--{kind}_out=quiet:{target}" for kind in ("mypy", "mypy_grpc")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", "-I", "third_party"]
        + plugins
        + outputs
        + protos,
        cwd=HERE,
        check=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    comments = dict(sorted(_comments(protos)))
    (target / "arriero" / "v1" / "comments.json").write_text(
        json.dumps(comments, indent=0, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _comments(protos: list[str]) -> Iterator[tuple[str, str]]:
    """(full name, comment) of every message, field, enum and value; descriptors hold none."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "descriptors"
        subprocess.run(
            [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", "-I", "third_party"]
            + ["--include_source_info", f"--descriptor_set_out={path}", *protos],
            cwd=HERE,
            check=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        files = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file
    for file in files:
        for location in file.source_code_info.location:
            text = " ".join(location.leading_comments.split())
            name = _name(file, list(location.path))
            if text and name:
                yield f"{file.package}.{name}", text


def _name(file: descriptor_pb2.FileDescriptorProto, path: list[int]) -> str:
    """The dotted name that a path of field numbers leads to; empty for what is no type."""
    node, names = file, []
    for number, index in zip(path[::2], path[1::2], strict=False):
        field = node.DESCRIPTOR.fields_by_number[number]
        if field.name not in ("message_type", "nested_type", "enum_type", "field", "value"):
            return ""
        node = getattr(node, field.name)[index]
        names.append(node.name)
    return ".".join(names) if len(path) % 2 == 0 else ""


if __name__ == "__main__":
    generate(Path(sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "services").resolve())
