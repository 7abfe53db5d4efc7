"""Kills of jobs and services in the middle of work, with real processes."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit/operations/toyroom"))

from google.rpc import code_pb2
from toyroom_support import Service, asked, eventually, metadata_of, result_of, trace_of

from arriero.operations.process import marked
from arriero.rpc.parent import ProcessId
from arriero.store import Store


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    running = Service(tmp_path)
    running.start()
    yield running
    running.stop(signal.SIGKILL)
    for staging in (tmp_path / "store/staging/merging").glob("*"):
        eventually(lambda name=staging.name: not list(marked(name)), "no orphan")


def steps_of(trace: Path) -> list[int]:
    return [step for _, _, step in trace_of(trace)]


def running_job(trace: Path) -> ProcessId:
    identity = ProcessId.of(trace_of(trace)[-1][0])
    assert identity is not None
    return identity


def complete(service: Service, operation) -> None:
    store = Store.open(service.root / "store")
    outputs = result_of(operation).outputs
    assert [output.name for output in outputs] == ["main", "report"]
    for output in outputs:
        store.verify(output.digest)
    assert len(store.list()) == 2


def test_a_killed_job_is_tried_again_from_its_checkpoint(service, tmp_path):
    trace = tmp_path / "trace"
    go = tmp_path / "go"
    order = {"steps": 20, "hold": 10, "go": str(go), "save": True, "trace": str(trace)}
    started = service.import_(asked("a"), **order)
    eventually(lambda: len(trace_of(trace)) >= 4, "steps")
    os.kill(running_job(trace).pid, signal.SIGKILL)
    go.touch()
    done = service.wait(started.name)
    complete(service, done)
    metadata = metadata_of(done)
    assert metadata.attempt == 2
    assert metadata.jobs[0].status.code == code_pb2.UNAVAILABLE
    assert (
        metadata.jobs[1].start_time.ToMilliseconds() >= metadata.jobs[0].end_time.ToMilliseconds()
    )
    steps = steps_of(trace)
    assert sorted(set(steps)) == list(range(1, 21))
    assert len(steps) <= 21, "at most the step that was under way is taken twice"


@pytest.mark.parametrize("extra", [{}, {"stubborn": True, "child": True}])
def test_a_killed_service_takes_its_job_along_and_its_successor_finishes(service, tmp_path, extra):
    trace = tmp_path / "trace"
    go = tmp_path / "go"
    order = {"steps": 30, "hold": 20, "go": str(go), "save": True, "trace": str(trace), **extra}
    started = service.import_(asked("a"), **order)
    eventually(lambda: len(trace_of(trace)) >= 4, "steps")
    job = running_job(trace)
    (staging,) = (tmp_path / "store/staging/merging").iterdir()

    service.stop(signal.SIGKILL)
    eventually(lambda: not job.alive(), "the job follows its service")
    taken = len(steps_of(trace))
    go.touch()

    service.start()
    assert service.import_(asked("a"), **order).name == started.name, "idempotent after a restart"
    eventually(lambda: len(trace_of(trace)) > taken, "the next attempt")
    assert len(set(marked(staging.name))) <= (2 if extra else 1)
    done = service.wait(started.name)
    complete(service, done)
    steps = steps_of(trace)
    assert sorted(set(steps)) == list(range(1, 31))
    assert len(steps) <= 31, "it went on from its checkpoint"
    assert steps == sorted(steps), "never two at once"
    metadata = metadata_of(done)
    assert metadata.attempt == 2
    assert not list(marked(staging.name))


def test_a_restart_while_the_old_job_still_lives_never_makes_two(service, tmp_path):
    trace = tmp_path / "trace"
    go = tmp_path / "go"
    order = {"steps": 20, "hold": 10, "go": str(go), "save": True, "trace": str(trace)}
    started = service.import_(asked("a"), **order)
    eventually(lambda: len(trace_of(trace)) >= 3, "steps")
    service.stop(signal.SIGKILL)
    service.start()  # at once: the watchdog has not looked yet
    go.touch()
    done = service.wait(started.name)
    complete(service, done)
    by_attempt = [attempt for _, attempt, _ in trace_of(trace)]
    assert by_attempt == sorted(by_attempt), "the first job was gone before the second began"
    assert sorted(set(steps_of(trace))) == list(range(1, 21))


def test_sigterm_lets_the_job_save_and_the_restarted_service_goes_on(service, tmp_path):
    trace = tmp_path / "trace"
    go = tmp_path / "go"
    order = {"steps": 40, "hold": 20, "go": str(go), "save": True, "trace": str(trace)}
    started = service.import_(asked("a"), **order)
    eventually(lambda: len(trace_of(trace)) >= 3, "steps")
    job = running_job(trace)
    assert service.stop(signal.SIGTERM) == 0
    assert not job.alive()
    go.touch()
    service.start()
    done = service.wait(started.name)
    complete(service, done)
    assert steps_of(trace) == list(range(1, 41)), "not one step lost"
    assert metadata_of(done).jobs[0].status.code == code_pb2.UNAVAILABLE


def test_work_cancelled_just_before_a_kill_is_not_taken_up_again(service, tmp_path):
    trace = tmp_path / "trace"
    started = service.import_(asked("a"), steps=10_000, seconds=0.05, trace=str(trace))
    eventually(lambda: len(trace_of(trace)) >= 2, "steps")
    service.cancel(started.name)
    service.stop(signal.SIGKILL)
    service.start()
    done = service.wait(started.name)
    assert done.error.code == code_pb2.CANCELLED
    assert not Store.open(tmp_path / "store").list()
    taken = len(trace_of(trace))
    time.sleep(0.2)  # several steps' time
    assert len(trace_of(trace)) == taken
