"""What tests of the toy room say and ask, in this process or over gRPC."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc

import arriero
from arriero.rpc import connect_sync
from arriero.v1 import job_pb2_grpc, merging_pb2, merging_pb2_grpc, types_pb2


def python_path() -> str:
    """For child processes: the toy room, and Arriero as this process has it."""
    roots = [str(Path(__file__).parent), str(Path(next(iter(arriero.__path__))).parent)]
    return os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])


def order(**fields: Any) -> merging_pb2.ImportSpec:
    return merging_pb2.ImportSpec(source=json.dumps(fields))


def asked(request_id: str = "", **fields: Any) -> types_pb2.StageContext:
    return types_pb2.StageContext(request_id=request_id, run="run-1", stage="toy", **fields)


def metadata_of(operation: Any) -> types_pb2.OperationMetadata:
    metadata = types_pb2.OperationMetadata()
    assert operation.metadata.Unpack(metadata)
    return metadata


def result_of(operation: Any) -> types_pb2.OperationResult:
    result = types_pb2.OperationResult()
    assert operation.response.Unpack(result), operation
    return result


def eventually(condition: Callable[[], Any], what: str, timeout: float = 300.0) -> Any:
    """The first true value of a condition; fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.02)
    return value


def trace_of(path: Path) -> list[tuple[int, int, int]]:
    """(pid, attempt, step) of every step that any job took."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    return [tuple(map(int, line.split())) for line in lines]  # type: ignore[misc]


class Service:
    """The toy room's service as a real process over a store."""

    def __init__(self, root: Path, **environment: str) -> None:
        self.root = root
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: grpc.Channel | None = None

    def start(self) -> None:
        address = self.root / "address"
        address.unlink(missing_ok=True)
        with (self.root / "service.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "toyroom_service"],
                env={
                    **os.environ,
                    "PYTHONPATH": python_path(),
                    "ARRIERO_STORE": str(self.root / "store"),
                    "ARRIERO_ADDRESS_FILE": str(address),
                    "ARRIERO_DRAIN_SECONDS": "60",
                    **self.environment,
                },
                stdout=log,
                stderr=log,
            )
        eventually(lambda: address.exists() or self.process.poll() is not None, "service is up")
        assert self.process.poll() is None, (self.root / "service.log").read_text()
        self.channel = connect_sync(address.read_text().strip())
        self.merging = merging_pb2_grpc.MergingServiceStub(self.channel)
        self.operations = operations_pb2_grpc.OperationsStub(self.channel)
        self.jobs = job_pb2_grpc.JobServiceStub(self.channel)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; returns the exit code."""
        assert self.process is not None
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(120)

    def import_(self, context: types_pb2.StageContext, **fields: Any) -> Any:
        request = merging_pb2.ImportRequest(context=context, spec=order(**fields))
        return self.merging.Import(request)

    def wait(self, name: str, seconds: float = 300.0) -> Any:
        request = operations_pb2.WaitOperationRequest(name=name)
        request.timeout.FromMilliseconds(int(seconds * 1000))
        operation = self.operations.WaitOperation(request, timeout=seconds + 60)
        assert operation.done, operation
        return operation

    def get(self, name: str) -> Any:
        return self.operations.GetOperation(operations_pb2.GetOperationRequest(name=name))

    def cancel(self, name: str) -> None:
        self.operations.CancelOperation(operations_pb2.CancelOperationRequest(name=name))
