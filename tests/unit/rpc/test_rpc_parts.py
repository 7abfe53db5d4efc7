"""Logs, listening rules, tokens, traces, methods and supervisors, each alone."""

import json
import logging
import os
import subprocess
import sys
import threading
import time

import pytest

from arriero.errors import (
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    Unauthenticated,
)
from arriero.rpc import auth, channel, listen, logs, methods, parent, roles, trace
from arriero.rpc.roles import Role
from arriero.settings import ClientSettings


def _formatted(message, *args, **extra):
    record = logging.getLogger("test").makeRecord(
        "test", logging.INFO, "f.py", 1, message, args, None, extra=extra
    )
    return json.loads(logs.JsonFormatter("dataset").format(record))


# logs


def test_a_log_line_is_one_json_object_with_bound_and_extra_fields():
    with logs.bind(run="r1", stage="sft"), logs.bind(attempt=2):
        line = _formatted("loss %.1f\nnext", 1.5, step=7)
    assert line["message"] == "loss 1.5\nnext"
    assert (line["service"], line["level"], line["logger"]) == ("dataset", "INFO", "test")
    assert (line["run"], line["stage"], line["attempt"], line["step"]) == ("r1", "sft", 2, 7)
    assert line["time"].endswith("Z")
    assert "run" not in _formatted("later")


@pytest.mark.parametrize(
    "text",
    [
        "authorization: Bearer abcdef123456",
        "token=abcdef123456",
        'hub {"api_key": "abcdef123456"}',
        "https://ana:abcdef123456@example.org/x",
        "the hub said hf_abcdef123456 is bad",
    ],
)
def test_secrets_are_blotted_out(text):
    assert "abcdef123456" not in _formatted(text)["message"]
    assert "abcdef123456" not in json.dumps(_formatted("x", detail={"deep": [text]}))


def test_a_registered_secret_is_blotted_out_wherever_it_stands():
    logs.add_secret("correct-horse")
    assert "correct-horse" not in _formatted("I saw correct-horse here")["message"]


def test_ordinary_words_about_tokens_stay():
    assert _formatted("tokens: 4096, tokenizer=llama")["message"] == "tokens: 4096, tokenizer=llama"


# listening


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "localhost:1", "unix:/tmp/s"])
def test_plain_text_is_fine_on_this_machine(address):
    listen.check_plaintext(address, insecure=False)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "10.0.0.3:1", "example.org:1"])
def test_plain_text_beyond_loopback_is_refused_unless_asked_for(address):
    with pytest.raises(FailedPrecondition, match="TLS"):
        listen.check_plaintext(address, insecure=False)
    listen.check_plaintext(address, insecure=True)


@pytest.mark.parametrize("address", ["", "7000", ":7000", "host:", "host:x", "host:70000", "::1:5"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(InvalidArgument, match="listen"):
        listen.split(address)


# tokens


def test_a_token_file_gives_subjects_and_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(auth, "_RECHECK_SECONDS", 0.0)
    file = tmp_path / "tokens"
    file.write_text("# people\naaaa1111 ana\n\nbbbb2222 bo\n")
    tokens = auth.TokenFile(file)
    assert tokens.identity("bbbb2222") == auth.Identity("bo", Role.ADMIN)
    assert tokens.identity("aaaa111") is None
    file.write_text("cccc3333 cy\n")
    assert tokens.identity("aaaa1111") is None
    assert tokens.identity("cccc3333").subject == "cy"
    file.write_text("broken\n")
    assert tokens.identity("cccc3333").subject == "cy"  # old tokens hold


@pytest.mark.parametrize(
    "text", ["", "# nobody\n", "onlytoken\n", "tok sub onlytoken\n", "tok sub admin extra\n"]
)
def test_a_wrong_token_file_is_refused_without_showing_it(tmp_path, text):
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(InvalidArgument) as caught:
        auth.TokenFile(file)
    assert "onlytoken" not in caught.value.message


def test_missing_and_wrong_tokens_are_told_apart_by_reason(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("aaaa1111 ana\n")
    tokens = auth.TokenFile(file)
    for header, reason in [
        ([], "TOKEN_MISSING"),
        ([("authorization", "Basic aaaa1111")], "TOKEN_MISSING"),
        ([("authorization", "Bearer wrong")], "TOKEN_WRONG"),
        ([("authorization", "Bearer ")], "TOKEN_WRONG"),
    ]:
        with pytest.raises(Unauthenticated) as caught:
            auth.authenticate(header, None, tokens)
        assert caught.value.reason == reason
    assert auth.authenticate([("authorization", "bearer aaaa1111")], None, tokens).subject == "ana"


def test_without_a_token_file_the_certificate_names_the_caller():
    assert auth.authenticate([], [b"trainer"], None).subject == "trainer"
    assert auth.authenticate([], None, None) == auth.Identity(auth.LOCAL, Role.ADMIN)


# roles


def test_a_token_file_names_roles_and_a_line_without_one_is_an_admins(tmp_path):
    file = tmp_path / "tokens"
    file.write_text("aaaa1111 ana\nbbbb2222 bo viewer\ncccc3333 cy deployer\n")
    tokens = auth.TokenFile(file)
    found = [tokens.identity(token) for token in ("aaaa1111", "bbbb2222", "cccc3333")]
    assert found == [
        auth.Identity("ana", Role.ADMIN),
        auth.Identity("bo", Role.VIEWER),
        auth.Identity("cy", Role.DEPLOYER),
    ]


def test_every_rpc_needs_a_role_that_fits_what_it_changes():
    expected = {
        "/arriero.v1.RunService/GetRun": Role.VIEWER,
        "/arriero.v1.RunService/CreateRun": Role.RUNNER,
        "/arriero.v1.TrainingService/Train": Role.RUNNER,
        "/google.longrunning.Operations/WaitOperation": Role.VIEWER,
        "/google.longrunning.Operations/CancelOperation": Role.RUNNER,
        "/google.longrunning.Operations/DeleteOperation": Role.ADMIN,
        "/arriero.v1.InferenceService/Chat": Role.VIEWER,
        "/arriero.v1.ArtifactService/PushArtifact": Role.RUNNER,
        "/arriero.v1.ArtifactService/CollectGarbage": Role.ADMIN,
        "/arriero.v1.EndpointService/ScaleEndpoint": Role.DEPLOYER,
        "/somebody.else.Service/Method": Role.ADMIN,
    }
    assert {method: roles.needed(method) for method in expected} == expected
    for method in methods.known():
        changes = methods.audited(method)
        assert not changes or roles.needed(method) >= Role.RUNNER, method


def test_a_role_that_is_too_low_is_refused_by_name():
    roles.check(Role.DEPLOYER, Role.RUNNER, "bo", "it")
    with pytest.raises(PermissionDenied, match="it needs the role runner, bo is a viewer"):
        roles.check(Role.VIEWER, Role.RUNNER, "bo", "it")


def test_a_token_is_not_sent_in_plain_text_beyond_loopback():
    with pytest.raises(FailedPrecondition, match="plain text"):
        channel.connect_sync("example.org:1", ClientSettings(token="aaaa1111"))
    channel.connect_sync("example.org:1", ClientSettings(token="aaaa1111", insecure=True)).close()


# traces


def test_a_trace_goes_on_with_a_new_span():
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    assert trace.adopt(f"00-{trace_id}-00f067aa0ba902b7-01") == trace_id
    out = trace.outgoing()
    assert out.startswith(f"00-{trace_id}-")
    assert out.endswith("-01")
    assert "00f067aa0ba902b7" not in out


@pytest.mark.parametrize("header", [None, "", "junk", f"00-{'0' * 32}-00f067aa0ba902b7-01"])
def test_without_a_valid_trace_a_new_one_starts(header):
    trace_id = trace.adopt(header)
    assert len(trace_id) == 32
    assert trace.current_id() == trace_id


# methods


def test_only_idempotent_methods_are_retried():
    names = {
        f"/{n['service']}/{n['method']}"
        for n in json.loads(methods.service_config())["methodConfig"][0]["name"]
    }
    assert "/arriero.v1.RunService/CreateRun" in names
    assert "/google.longrunning.Operations/WaitOperation" in names
    for never in (
        "InferenceService/Generate",
        "InferenceService/Chat",
        "JobService/ReportProgress",
    ):
        assert f"/arriero.v1.{never}" not in names
    assert "/arriero.v1.ArtifactService/PushArtifact" not in names
    assert "/arriero.v1.EndpointService/CreateEndpoint" not in names


def test_changes_are_audited_and_reads_are_not():
    for changes in ("RunService/CreateRun", "EndpointService/DeleteEndpoint"):
        assert methods.audited(f"/arriero.v1.{changes}")
    for reads in ("RunService/GetRun", "InferenceService/Chat", "JobService/ReportProgress"):
        assert not methods.audited(f"/arriero.v1.{reads}")


# supervisors


def test_a_process_is_known_by_its_start_and_zombies_are_gone():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = parent.ProcessId.of(child.pid)
    try:
        assert known is not None
        assert known.alive()
        assert not parent.ProcessId(child.pid, "1").alive()
    finally:
        child.kill()
        # Not reaped yet: a zombie at most.
        deadline = time.monotonic() + 300
        while known.alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        gone = not known.alive()
        child.communicate()
    assert gone
    assert parent.ProcessId.of(child.pid) is None


def test_the_environment_ties_a_child_to_this_process():
    env = parent.environment()
    assert parent.from_env(env) == parent.ProcessId.of(os.getpid())
    assert parent.from_env({}) is None
    with pytest.raises(InvalidArgument, match=parent.PID):
        parent.from_env({parent.PID: "x"})


def test_a_watch_tells_of_a_death_once():
    died = threading.Event()
    thread = parent.watch(parent.ProcessId(os.getpid(), "1"), died.set, interval=0.01)
    assert died.wait(120)
    thread.join(120)
    assert not thread.is_alive()
