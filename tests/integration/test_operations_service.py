"""A room's whole service as a real process: operations and jobs over gRPC."""

import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.longrunning import operations_pb2

sys.path.insert(0, str(Path(__file__).parents[1] / "unit/operations/toyroom"))

from toyroom_support import Service, asked, eventually, metadata_of, result_of, trace_of

from arriero.operations.handoff import TOKEN_KEY, Assignment
from arriero.operations.process import marked
from arriero.rpc import from_rpc_error
from arriero.rpc.channel import check_health
from arriero.store import Store
from arriero.v1 import job_pb2, merging_pb2, types_pb2


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("service"))
    running.start()
    yield running
    running.stop()


def read_logs(service: Service, name: str, **fields) -> list[job_pb2.LogLine]:
    request = job_pb2.ReadLogsRequest(operation=name, **fields)
    return [line for answer in service.jobs.ReadLogs(request, timeout=120) for line in answer.lines]


def at_work(service: Service) -> Path:
    """The staging directory of the one job that runs; of others what is left goes later."""
    (staging,) = (
        path
        for path in (service.root / "store/staging/merging").iterdir()
        if any(marked(path.name))
    )
    return staging


def test_work_is_started_followed_and_published(service):
    go = service.root / "go-whole"
    order = {"steps": 12, "seconds": 0.02, "hold": 6, "go": str(go), "save": True, "text": "whole"}
    started = service.import_(asked("whole"), **order)
    assert not started.done

    progress = eventually(
        lambda: (
            (p := metadata_of(service.get(started.name)).progress).step > 1
            and p.HasField("cpu_cores")
            and p
        ),
        "progress with usage",
    )
    assert progress.phase == "toying"
    assert progress.total_steps == 12
    assert progress.memory_bytes > 1_000_000
    assert progress.HasField("checkpoint_time")
    assert progress.eta_seconds > 0
    go.touch()

    done = service.wait(started.name)
    store = Store.open(service.root / "store")
    outputs = result_of(done).outputs
    assert store.get(outputs[0].digest).file("data.txt").read_text() == "whole"
    store.verify(outputs[0].digest)
    assert metadata_of(done).progress.phase == "done", "the last word is heard too"


def test_logs_are_followed_and_kept(service):
    started = service.import_(asked("logs"), steps=5, seconds=0.1, text="logs")
    followed = read_logs(service, started.name, follow=True)
    assert service.get(started.name).done
    messages = [line.message for line in followed]
    assert messages[0] == "attempt 1 starts"
    assert "starts at step 0" in messages
    assert "a raw line" in messages
    assert {line.attempt for line in followed} == {1}
    assert {line.stage for line in followed} == {"toy"}
    assert [line.number for line in followed] == list(range(1, len(followed) + 1))
    assert [line.number for line in read_logs(service, started.name, after=2)] == [
        line.number for line in followed[2:]
    ]


def test_waiting_returns_after_its_timeout_and_cancel_ends_it(service):
    trace = service.root / "trace-cancel"
    started = service.import_(asked("cancel"), steps=10_000, seconds=0.05, trace=str(trace))
    eventually(lambda: trace_of(trace), "the job runs")
    pid = trace_of(trace)[0][0]
    request = operations_pb2.WaitOperationRequest(name=started.name)
    request.timeout.FromMilliseconds(100)
    assert not service.operations.WaitOperation(request).done

    service.cancel(started.name)
    done = service.wait(started.name)
    assert metadata_of(done).state == types_pb2.OPERATION_STATE_CANCELLED
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(grpc.RpcError) as caught:
        service.cancel("operations/none")
    assert from_rpc_error(caught.value).code == "NOT_FOUND"


def test_a_caller_sees_its_mistakes_with_their_field(service):
    with pytest.raises(grpc.RpcError) as caught:
        service.merging.Import(merging_pb2.ImportRequest(context=asked("bad")))
    error = from_rpc_error(caught.value)
    assert error.code == "INVALID_ARGUMENT"
    assert error.violations[0].field == "source"


def test_reports_without_the_attempts_token_are_refused(service):
    trace = service.root / "trace-token"
    started = service.import_(asked("token"), steps=10_000, seconds=0.05, trace=str(trace))
    eventually(lambda: trace_of(trace), "the job runs")
    staging = at_work(service)
    request = job_pb2.ReportProgressRequest(execution=staging.name, attempt=1)
    with pytest.raises(grpc.RpcError) as caught:
        service.jobs.ReportProgress(request)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    service.cancel(started.name)
    service.wait(started.name)
    assert not list(marked(staging.name))


def test_a_job_of_another_minor_version_reports(service):
    trace = service.root / "trace-versions"
    started = service.import_(asked("versions"), steps=10_000, seconds=0.05, trace=str(trace))
    eventually(lambda: trace_of(trace), "the job runs")
    staging = at_work(service)
    token = Assignment.read(staging / "attempts/1/assignment.json").report_token
    # As the first protos had it, and with a field that this build does not know (99: 1).
    older = job_pb2.ReportProgressRequest(execution=staging.name, attempt=1)
    older.progress.phase, older.progress.step = "of another build", 7
    newer = older.SerializeToString() + b"\x98\x06\x01"
    report = service.channel.unary_unary("/arriero.v1.JobService/ReportProgress")
    for sent in (older.SerializeToString(), newer):
        assert report(sent, metadata=((TOKEN_KEY, token),), timeout=120) == b""
    service.cancel(started.name)
    service.wait(started.name)


def test_operations_are_listed_and_not_deleted(service):
    service.wait(service.import_(asked("listed"), steps=1).name)
    listed = service.operations.ListOperations(
        operations_pb2.ListOperationsRequest(name="operations", page_size=1)
    )
    assert len(listed.operations) == 1
    for call, request in (
        (
            service.operations.DeleteOperation,
            operations_pb2.DeleteOperationRequest(name=listed.operations[0].name),
        ),
        (
            service.operations.ListOperations,
            operations_pb2.ListOperationsRequest(filter="done=true"),
        ),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call(request)
        assert caught.value.code() in (
            grpc.StatusCode.UNIMPLEMENTED,
            grpc.StatusCode.INVALID_ARGUMENT,
        )


def test_the_service_is_ready_and_the_only_one_of_its_store(service):
    assert check_health((service.root / "address").read_text().strip())
    second = Service(service.root)
    address = service.root / "address"
    kept = address.read_text()
    with pytest.raises(AssertionError, match="another process"):
        second.start()
    address.write_text(kept)
