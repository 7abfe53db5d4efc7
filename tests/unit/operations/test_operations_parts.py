"""The pieces around an engine, each alone."""

import hashlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toyroom_job import GATE, join, work
from toyroom_support import eventually, order

from arriero import errors
from arriero.gates import Mode, Verdict
from arriero.operations.delivery import Output, describe, failure
from arriero.operations.endings import Next, ending_of, reason_of
from arriero.operations.handoff import Assignment, Outcome
from arriero.operations.logs import LogReader, mark, tail
from arriero.operations.process import MARKER, end_job, marked
from arriero.operations.records import ExecutionRecord, JobRecord, Records, Result, State
from arriero.operations.reporting import ProgressMeter
from arriero.operations.usage import GpuMeter, HostUsage
from arriero.rpc.parent import ProcessId
from arriero.store import Store
from arriero.testing.jobs import make_job, run_job
from arriero.v1 import merging_pb2, types_pb2

# Job


def test_a_handler_runs_in_this_process_against_a_real_store(store, model, tmp_path):
    spec = merging_pb2.MergeSpec(model=model.digest)
    outputs = run_job(join, "merge", spec, {"model": model}, store, tmp_path)
    assert [output.name for output in outputs] == ["main", "same"]
    assert (outputs[0].path / "data.txt").read_text() == "modelmodel"


def test_checkpoints_survive_attempts_and_scratch_does_not(store, tmp_path):
    spec = merging_pb2.ImportSpec()
    first = make_job("import", spec, {}, store, tmp_path)
    (first.checkpoints / "step").write_text("3")
    (first.scratch / "half").write_text("x")
    second = make_job("import", spec, {}, store, tmp_path, attempt=2)
    assert (second.checkpoints / "step").read_text() == "3"
    assert not list(second.scratch.iterdir())


def test_an_input_is_one_artifact_and_an_optional_one_may_be_missing(store, model, tmp_path):
    job = make_job("merge", merging_pb2.MergeSpec(), {"adapters": [model, model]}, store, tmp_path)
    assert job.optional_input("golden") is None
    with pytest.raises(errors.InvalidArgument, match="adapters: holds 2"):
        job.input("adapters")


def test_gate_modes_come_from_the_spec(store, tmp_path):
    spec = merging_pb2.ImportSpec()
    spec.gates[GATE] = types_pb2.GATE_MODE_WARN
    job = make_job("import", spec, {}, store, tmp_path)
    assert job.gates.mode(GATE) is Mode.WARN
    assert job.gates.judge(GATE, False).verdict is Verdict.WARNED


def test_preemption_reaches_the_handler(store, tmp_path):
    spec = order(steps=3)
    with pytest.raises(errors.Preempted):
        run_job(work, "import", spec, {}, store, tmp_path, prepare=lambda j: j.preempted.set())


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
def test_output_names_cannot_climb_out(store, tmp_path, name):
    job = make_job("import", merging_pb2.ImportSpec(), {}, store, tmp_path)
    with pytest.raises(errors.Internal):
        job.output_dir(name)


def other_version(value, *, newer):
    """What a build one minor version away writes: a field more everywhere, or the new ones less."""
    if isinstance(value, dict):
        known = {k: other_version(v, newer=newer) for k, v in value.items()}
        if newer and set(value) & {"name", "gate", "attempt", "seconds"}:
            known["of_a_later_build"] = {"x": 1}
        return known
    return [other_version(v, newer=newer) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("newer", [True, False])
def test_service_and_job_may_be_one_minor_version_apart(store, model, tmp_path, newer):
    job = make_job("merge", merging_pb2.MergeSpec(), {"model": model}, store, tmp_path)
    job.gates.judge(GATE, True, figure=1.0)
    made = job.output_dir("main")
    (made / "a.txt").write_text("abc")
    describe([Output("main", "model", made)], job).write(job.directory)
    path = Outcome.path(tmp_path / "staging", 1)
    written = other_version(json.loads(path.read_bytes()), newer=newer)
    if not newer:  # fields that came after the first release of the format
        del written["work"]
    path.unlink()
    path.write_text(json.dumps(written))
    outcome = Outcome.read(path)
    assert outcome is not None
    assert (outcome.ok, outcome.gates[0].gate, outcome.outputs[0].name) == (True, GATE, "main")

    known = {"service": "merging", "kind": "merge", "spec_type": "m:C", "spec": {}, "inputs": {}}
    where = {"store": store.url, "staging": str(tmp_path / "staging"), "execution": "e"}
    assignment = Assignment(**known, **where, attempt=1)
    path = assignment.write()
    written = other_version(json.loads(path.read_bytes()), newer=newer)
    if not newer:
        del written["detached"], written["last_failure"]
    path.unlink()
    path.write_text(json.dumps(written))
    assert Assignment.read(path) == assignment


def test_an_outcome_names_every_file_with_its_digest_and_survives_json(store, model, tmp_path):
    job = make_job("merge", merging_pb2.MergeSpec(), {"model": model}, store, tmp_path)
    job.gates.judge(GATE, False, figure=math.nan, threshold=math.inf)
    made = job.output_dir("main")
    (made / "sub").mkdir()
    (made / "sub" / "a.txt").write_text("abc")
    outcome = describe([Output("main", "model", made, metrics={"loss": math.nan})], job)
    outcome.write(job.directory)
    read = Outcome.read(Outcome.path(tmp_path / "staging", 1))
    assert read is not None
    assert read.ok
    (output,) = read.outputs
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert output.files == (("sub/a.txt", 3, abc),)
    assert output.parents == (model.digest,)
    assert math.isnan(output.metrics["loss"])
    assert math.isnan(read.gates[0].figure or 0)
    assert read.gates[0].threshold == math.inf


def test_outputs_must_be_whole_and_in_their_place(store, tmp_path):
    job = make_job("import", merging_pb2.ImportSpec(), {}, store, tmp_path)
    with pytest.raises(errors.Internal, match="has no files"):
        describe([Output("main", "model", job.output_dir("main"))], job)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a").write_text("a")
    with pytest.raises(errors.Internal, match="outside of the attempt"):
        describe([Output("main", "model", elsewhere)], job)
    linked = job.output_dir("main")
    (linked / "a").symlink_to(elsewhere / "a")
    with pytest.raises(errors.InvalidArgument, match="symbolic link"):
        describe([Output("main", "model", linked)], job)
    twice = Output("x", "model", existing="sha256:" + "0" * 64)
    with pytest.raises(errors.Internal, match="share a name"):
        describe([twice, twice], job)


@pytest.mark.parametrize(
    ("error", "retryable", "preempted", "said"),
    [
        (errors.InvalidArgument.field("lora.r", "is 0"), False, False, "lora.r"),
        (errors.Unavailable("away"), True, False, "away"),
        (errors.Preempted("saved"), True, True, "saved"),
        (MemoryError(), True, False, "out of memory"),
        (OSError(28, "No space left on device"), False, False, "no space left"),
        (ZeroDivisionError("division by zero"), False, False, "ZeroDivisionError"),
    ],
)
def test_every_error_becomes_a_status_that_says_what_to_do(error, retryable, preempted, said):
    outcome = failure(1, error, logging.getLogger("test"))
    assert said in outcome.status["message"]
    assert (outcome.retryable, outcome.preempted) == (retryable, preempted)
    assert not outcome.ok
    json.dumps(outcome.status)


def test_an_assignment_is_for_its_owner_alone_and_reads_back(tmp_path):
    assignment = Assignment(
        service="s", kind="import", spec_type="arriero.v1.merging_pb2:ImportSpec",
        spec={"source": "x", "dtype": "float16"}, inputs={"model": ["sha256:0"]}, store="/s",
        staging=str(tmp_path), execution="e", attempt=2, report_token="secret",
        service_process=ProcessId.of(os.getpid()),
    )  # fmt: skip
    path = assignment.write()
    assert path.stat().st_mode & 0o077 == 0
    read = Assignment.read(path)
    assert read == assignment
    message = read.message()
    assert isinstance(message, merging_pb2.ImportSpec)
    assert message.dtype == "float16"


def test_files_of_a_newer_version_are_refused(tmp_path):
    path = tmp_path / "outcome.json"
    path.write_text('{"format": 99}')
    with pytest.raises(errors.FailedPrecondition, match="newer"):
        Outcome.read(path)


# Progress


def test_the_time_left_counts_from_this_process_first_step():
    now = [100.0]
    meter = ProgressMeter(lambda: now[0])
    meter.update(phase="training", step=500, total=1000, unit="steps")
    assert not meter.read().HasField("eta_seconds")
    now[0] += 10
    meter.update(phase="training", step=520, total=1000, unit="steps")
    assert meter.read().eta_seconds == pytest.approx(240.0)
    now[0] += 1
    meter.update(phase="saving", step=1, total=4)
    assert not meter.read().HasField("eta_seconds"), "another phase, another rate"


def test_the_checkpoint_time_stays_until_there_is_a_newer_one():
    meter = ProgressMeter()
    meter.update(phase="training", step=1, checkpoint_time=1000.5)
    meter.update(phase="training", step=2)
    assert meter.read().checkpoint_time.ToMilliseconds() == 1_000_500
    assert not meter.read().HasField("loss")


def test_host_usage_is_that_of_the_whole_tree():
    usage = HostUsage()
    assert usage.sample()[0] is None
    end = time.process_time() + 0.1
    while time.process_time() < end:
        pass
    cores, memory = usage.sample()
    assert cores is not None
    assert cores > 0
    assert memory is not None
    assert memory > 1_000_000


def test_a_machine_without_nvml_has_no_gpus(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert GpuMeter().sample() == []


# Ends of jobs


def _outcome(**fields):
    return Outcome(attempt=1, status={"code": 14, "message": "m"}, created="", **fields)


@pytest.mark.parametrize(
    ("code", "outcome", "following", "counted"),
    [
        (0, Outcome(1, {}, ""), Next.PUBLISH, True),
        (1, Outcome(1, {}, ""), Next.PUBLISH, True),
        (None, Outcome(1, {}, ""), Next.PUBLISH, True),
        (1, _outcome(retryable=True), Next.AGAIN, True),
        (1, _outcome(), Next.FAIL, True),
        (75, _outcome(preempted=True), Next.AGAIN, False),
        (75, None, Next.AGAIN, False),
        (None, None, Next.AGAIN, False),
        (-15, None, Next.AGAIN, False),
        (-9, None, Next.AGAIN, True),
        (-11, None, Next.AGAIN, True),
        (3, None, Next.AGAIN, True),
    ],
)
def test_the_outcome_wins_over_the_exit_code(code, outcome, following, counted):
    ending = ending_of(code, outcome)
    assert (ending.next, ending.counted) == (following, counted)


def test_a_crash_says_its_signal_and_the_last_lines():
    assert "SIGSEGV" in ending_of(-11, None, ["Fatal Python error"]).message
    assert "Fatal Python error" in ending_of(-11, None, ["Fatal Python error"]).message
    assert "code 3" in ending_of(3, None).message


@pytest.mark.parametrize("code", [-9, 137])
@pytest.mark.parametrize(
    ("oom_killed", "reason", "said"),
    [
        (True, "OUT_OF_MEMORY", "the kernel's out-of-memory killer"),
        (None, "OUT_OF_MEMORY", "probably because memory ran out"),
        (False, "JOB_KILLED", "by somebody or a watchdog"),
    ],
)
def test_a_kill_for_want_of_memory_is_named_as_such(code, oom_killed, reason, said):
    ending = ending_of(code, None, oom_killed=oom_killed)
    assert reason_of(ending.status) == reason
    assert said in ending.message
    assert ending.next is Next.AGAIN


# Processes


def test_everything_that_a_job_started_is_ended_with_it(tmp_path):
    script = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],"
        " start_new_session=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, MARKER: tmp_path.name}
    job = subprocess.Popen([sys.executable, "-c", script], env=environment, start_new_session=True)
    leader = ProcessId.of(job.pid)
    eventually(lambda: len(list(marked(tmp_path.name))) == 2, "job and child run")
    assert end_job(tmp_path.name, leader)
    assert job.wait(120) == -signal.SIGKILL
    assert not list(marked(tmp_path.name))


def test_a_reused_pid_is_not_the_job():
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert end_job("nobody", ProcessId(bystander.pid, "12345"), timeout=1)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


# Records


def test_records_read_back_as_they_were_written(tmp_path):
    records = Records(Store.open(tmp_path), "merging")
    record = ExecutionRecord(
        id="e1", kind="import", result_key="k", spec={"a": [1]}, inputs={"model": ["d"]},
        attempt=2, state=State.RUNNING, create_time="t",
        jobs=[JobRecord(1, "t", "t2", {"code": 14}, False, ProcessId(1, "2")), JobRecord(2, "t")],
        result=Result(outputs=[{"name": "x"}]),
    )  # fmt: skip
    records.save(record)
    assert records.executions() == [record]
    assert record.counted == 1
    assert records.operations() == []


# Logs


def _lines(path: Path, after: int = 0, ended: bool = True):
    return list(LogReader(path).read(ended=ended, after=after))


def test_json_lines_and_raw_lines_are_numbered_and_know_their_attempt(tmp_path):
    path = tmp_path / "log.jsonl"
    mark(path, "attempt 1 starts", attempt=1, stage="train")
    with path.open("a") as file:
        file.write('{"time": "2026-01-01T00:00:00Z", "level": "WARNING", "message": "hot"}\n')
        file.write("Segmentation fault\n")
        file.write("10%\r50%\r100%\n")
        file.write('{"half": ')
    mark(path, "attempt 2 starts", attempt=2, stage="train", level="ERROR")
    lines = _lines(path)
    assert [line.number for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line.attempt for line in lines] == [1, 1, 1, 1, 1, 2]
    assert [line.level for line in lines] == ["INFO", "WARNING", "INFO", "INFO", "INFO", "ERROR"]
    assert lines[2].message == "Segmentation fault"
    assert lines[2].time == lines[1].time
    assert lines[3].message == "100%"
    assert [line.number for line in _lines(path, after=4)] == [5, 6]
    assert tail(path) == ["Segmentation fault", "100%", '{"half": ']


def test_a_line_is_given_when_it_is_whole(tmp_path):
    path = tmp_path / "log.jsonl"
    reader = LogReader(path)
    assert list(reader.read(ended=False)) == []
    with path.open("a") as file:
        file.write("one\ntw")
    assert [line.message for line in reader.read(ended=False)] == ["one"]
    with path.open("a") as file:
        file.write("o\nthree")
    assert [line.message for line in reader.read(ended=False)] == ["two"]
    assert [line.message for line in reader.read(ended=True)] == ["three"]


def test_a_digest_from_writing_is_taken_only_for_a_file_that_is_still_the_same(
    tmp_path: Path,
) -> None:
    from arriero.operations.delivery import _durable
    from arriero.weights.sink import Written

    path = tmp_path / "weights"
    path.write_bytes(b"four")
    status = path.stat()
    known = Written(4, status.st_mtime_ns, "f" * 64)
    assert _durable(path, known) == (4, "f" * 64)
    path.write_bytes(b"five")
    os.utime(path, ns=(status.st_mtime_ns + 1, status.st_mtime_ns + 1))
    assert _durable(path, known)[1] == hashlib.sha256(b"five").hexdigest()
    assert _durable(path, None)[1] == hashlib.sha256(b"five").hexdigest()
