"""The command line says what it can do, and what went wrong."""

import json
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from typer.testing import CliRunner

from arriero.cli import render
from arriero.cli.app import app
from arriero.cli.session import command
from arriero.errors import FieldViolation, InvalidArgument, NotFound
from arriero.testing.servicers import running_platform
from arriero.v1 import types_pb2
from arriero.v1.pipeline_pb2 import DeploySpec

runner = CliRunner()

COMMANDS = [
    ["up"],
    ["down"],
    ["status"],
    ["run"],
    *(["runs", name] for name in ("list", "get", "watch", "logs", "cancel", "retry")),
    *(["artifacts", name] for name in ("list", "get", "lineage", "tag", "pull", "push", "gc")),
    ["artifacts", "verify"],
    *(["endpoints", name] for name in ("list", "get", "create", "scale", "delete")),
    ["chat"],
    ["generate"],
    ["import"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_and_can_answer_in_json(command: list[str]) -> None:
    shown = runner.invoke(app, [*command, "--help"], env={"COLUMNS": "120"})
    assert shown.exit_code == 0
    assert "--output" in shown.output


def test_the_version_is_told() -> None:
    shown = runner.invoke(app, ["--version"])
    assert (shown.exit_code, shown.stdout) == (0, f"{version('arriero')}\n")


def test_an_unknown_command_is_a_usage_error() -> None:
    assert runner.invoke(app, ["fly"]).exit_code == 2


def test_nothing_running_is_said_with_what_to_do(home: object) -> None:
    shown = runner.invoke(app, ["status"])
    assert shown.exit_code == 1
    assert "arriero up --detach" in shown.stderr


def test_a_missing_pipeline_file_is_named(home: object) -> None:
    shown = runner.invoke(app, ["run", "nowhere.yaml"])
    assert shown.exit_code == 2
    assert "nowhere.yaml" in shown.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["runs", "retry", "p-1", "--waive", "merge.logits"],
        ["runs", "retry", "p-1", "--waive", "merge.logits", "--reason", " "],
        ["runs", "retry", "p-1", "--reason", "because"],
        ["runs", "retry", "p-1", "--stage", "merge"],
        ["artifacts", "verify"],
        ["artifacts", "verify", "model/m:v1", "--all"],
        ["artifacts", "verify", "model/m:v1", "--kind", "model"],
        ["artifacts", "push", "/etc/hostname", "gguf"],
    ],
    ids=" ".join,
)
def test_half_a_wish_is_refused_before_anybody_is_asked(arguments: list[str]) -> None:
    shown = runner.invoke(app, arguments)
    assert shown.exit_code == 2
    assert "is missing" in shown.stderr or "expected" in shown.stderr or "goes with" in shown.stderr


def test_errors_as_json_carry_code_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    error = InvalidArgument("r: 0", violations=[FieldViolation("lora.r", "0; expected 1 to 4096")])
    with pytest.raises(SystemExit) as ended:
        render.fail(error, as_json=True)
    assert ended.value.code == 2
    body = json.loads(capsys.readouterr().err)
    assert body["error"]["code"] == "INVALID_ARGUMENT"
    assert body["error"]["violations"] == [
        {"field": "lora.r", "description": "0; expected 1 to 4096"}
    ]


def test_errors_as_text_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        render.fail(NotFound("no run 'x'; `arriero runs list` shows what there is"))
    assert capsys.readouterr().err.strip().count("\n") == 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.42, "0.4 s"), (42, "42 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations_are_for_people(value: float, text: str) -> None:
    assert render.seconds(value) == text


def test_a_stages_cost_is_told_work_and_gates_apart():
    usage = types_pb2.JobUsage(
        work_seconds=3,
        work_memory_bytes=170_000_000,
        gate_seconds=11,
        gate_memory_bytes=696_000_000,
    )
    assert render.usage_text(usage) == "work 3.0 s, 170.0 MB; gates 11 s, 696.0 MB"
    assert render.usage_text(types_pb2.JobUsage()) == ""


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (91_700_000, "91.7 MB"), (2.5e12, "2500.0 GB")]
)
def test_sizes_are_decimal(value: float, text: str) -> None:
    assert render.size(value) == text


def test_elapsed_time_runs_until_it_is_ended() -> None:
    start, end = Timestamp(), Timestamp()
    start.FromDatetime(datetime(2020, 1, 1, tzinfo=UTC))
    end.FromDatetime(datetime(2020, 1, 1, 0, 0, 30, tzinfo=UTC))
    assert render.elapsed(start, end) == 30
    assert render.elapsed(Timestamp(), end) is None
    still = render.elapsed(start, Timestamp())
    assert still is not None
    assert still > 30


def test_a_defect_is_one_line_and_its_traceback_is_kept(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @command
    def broken() -> None:
        raise ZeroDivisionError("oops")

    with pytest.raises(SystemExit) as ended:
        broken()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "ZeroDivisionError: oops" in said
    assert "Traceback" in (home / "logs" / "cli.log").read_text()


def test_a_home_that_cannot_be_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ARRIERO_HOME", str(tmp_path / "file"))
    for arguments in (["up"], ["up", "--detach"], ["replicas"]):
        shown = runner.invoke(app, arguments)
        assert shown.exit_code == 1
        assert "cannot be Arriero's home: Not a directory; set ARRIERO_HOME" in shown.stderr


def test_a_defect_is_told_where_nothing_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ARRIERO_HOME", str(tmp_path / "file"))

    @command
    def broken() -> None:
        raise ZeroDivisionError("oops")

    with pytest.raises(SystemExit):
        broken()
    *trace, last = capsys.readouterr().err.splitlines()
    assert "ZeroDivisionError: oops" in trace
    assert last.startswith("error ZeroDivisionError: oops; a defect of Arriero")


def test_a_port_that_cannot_be_is_a_usage_error(home: Path) -> None:
    assert runner.invoke(app, ["up", "--port", "99999"]).exit_code == 2


def test_whoever_talks_to_an_endpoint_that_starts_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with running_platform() as platform:
        monkeypatch.setenv("ARRIERO_ADDRESS", platform.address)
        endpoints, spec = platform.endpoints, DeploySpec(endpoint="faq", replicas=1)
        endpoints.addresses = []
        endpoints.serve(spec)

        def start() -> None:
            while endpoints.look_ups < 3:
                time.sleep(0.01)
            endpoints.addresses = [platform.address]
            endpoints.serve(spec)

        starting = threading.Thread(target=start)
        starting.start()
        shown = runner.invoke(app, ["chat", "faq", "Who?"])
        starting.join()
    assert shown.exit_code == 0
    assert "faq is starting" in shown.stderr
    assert shown.stdout.strip()


def test_nobody_waits_for_an_endpoint_without_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_platform() as platform:
        monkeypatch.setenv("ARRIERO_ADDRESS", platform.address)
        platform.endpoints.serve(DeploySpec(endpoint="faq", replicas=0))
        shown = runner.invoke(app, ["chat", "faq", "Who?"])
    assert shown.exit_code == 1
    assert "0 of 0 are ready" in shown.stderr
