"""Wrong files, names, flags and requests are refused in one clear line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from arriero.errors import InvalidArgument
from arriero.rpc.channel import connect_sync
from arriero.rpc.status import translated

Arriero = Callable[..., Result]

NO_DIGEST = "sha256:" + "0" * 64
FILES = {
    "missing": (None, "does not exist"),
    "empty": (b"", "is empty; expected 'name' and 'stages'"),
    "not text": (b"\x89PNG\r\n\x1a\n\xff\xfe", "is not UTF-8 text"),
    "not YAML": (b"name: [x\n", ":2:1: not YAML"),
    "no pipeline": (b"- 1\n", "expected fields (name, stages"),
    "JSON rows": (b'{"instruction": "a", "output": "b"}\n', ":1:2: unknown field 'instruction'"),
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
    (["artifacts", "push", "/etc/hostname", "x"], 2, "'x' is not a name; expected kind/name"),
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


def test_an_empty_start_is_the_callers_mistake(
    start: tuple[Any, ...], platform: Any, nothing_starts: None
) -> None:
    room, stub, method, request = start
    address = platform.home.running()["services"][room]["address"]
    with connect_sync(address) as channel, pytest.raises(InvalidArgument) as caught, translated():
        getattr(stub(channel), method)(request())
    assert caught.value.violations
    assert all(v.field and v.description for v in caught.value.violations)
