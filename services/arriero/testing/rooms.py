"""The four working rooms as fakes: real gRPC servers, made-up work.

Responsibility: answer the rooms' start calls, operations and logs as their
contract says (idempotent by `request_id`, long-polling, cancel), with delays and
failures that a test controls. Does not know what real work would make: outputs
are small artifacts of the right kind whose parents are the stage's inputs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf import empty_pb2
from google.protobuf.message import Message

from arriero import refs
from arriero.errors import ArrieroError, Cancelled, GateFailed, InvalidArgument, NotFound
from arriero.gates import GateResult, Mode, Verdict
from arriero.operations.inputs import NO_DIGEST
from arriero.operations.intake import operation_id
from arriero.rpc import Server, to_status
from arriero.settings import ServerSettings
from arriero.store import Artifact, ManifestDraft, Store
from arriero.v1 import (
    dataset_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    merging_pb2_grpc,
    quantization_pb2_grpc,
    training_pb2_grpc,
    types_pb2,
)

ROOMS = ("dataset", "training", "merging", "quantization")


@dataclass
class FakeOperation:
    """One accepted start: what was asked, and how it ended."""

    name: str
    kind: str
    request_id: str
    stage: str
    spec: Message
    error: ArrieroError | None = None
    outputs: list[types_pb2.StageOutput] = field(default_factory=list)
    gates: list[types_pb2.GateResult] = field(default_factory=list)
    progress: types_pb2.Progress = field(default_factory=types_pb2.Progress)
    cached: bool = False
    paused: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def state(self) -> types_pb2.OperationState.ValueType:
        """As the metadata show it."""
        if not self.ended.is_set():
            return types_pb2.OPERATION_STATE_RUNNING
        if self.error is None:
            return types_pb2.OPERATION_STATE_SUCCEEDED
        if isinstance(self.error, Cancelled):
            return types_pb2.OPERATION_STATE_CANCELLED
        return types_pb2.OPERATION_STATE_FAILED


class FakeRooms:
    """All four rooms of one test, in one event loop.

    Attributes:
        operations: by name, in the order of their starts.
        calls: start calls by `request_id`, repetitions included.
        cancelled: names of operations that were told to stop.
        held: stages that do not end until `release`.
        failures: by stage, how its work ends.
        gates: by stage, what its gates say; a failed one quarantines what it makes.
        check: called with kind and spec before anything else; may refuse.
        caching: equal work is answered from what was done before.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.operations: dict[str, FakeOperation] = {}
        self.calls: Counter[str] = Counter()
        self.cancelled: list[str] = []
        self.held: set[str] = set()
        self.failures: dict[str, ArrieroError] = {}
        self.gates: dict[str, list[types_pb2.GateResult]] = {}
        self.check: Callable[[str, Message], None] = lambda kind, spec: None
        self.caching = False
        self._results: dict[str, list[types_pb2.StageOutput]] = {}
        self._released: dict[str, asyncio.Event] = {}
        self._servers: dict[str, Server] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.addresses: dict[str, str] = {}

    async def __aenter__(self) -> FakeRooms:
        for room in ROOMS:
            await self.start(room)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        for room in list(self._servers):
            await self.stop(room)

    async def start(self, room: str) -> None:
        """Serve a room: on its former port when it was stopped."""
        listen = self.addresses.get(room, "127.0.0.1:0")
        server = Server(ServerSettings(listen=listen), name=room)
        _register(server, room, self)
        self.addresses[room] = await server.start()
        server.set_ready(True)
        self._servers[room] = server

    async def stop(self, room: str) -> None:
        """Make a room go away at once; its operations stay."""
        await self._servers.pop(room).stop(0)

    def environment(self) -> dict[str, str]:
        """`ARRIERO_<ROOM>_ADDRESS` of every room."""
        return {f"ARRIERO_{room.upper()}_ADDRESS": a for room, a in self.addresses.items()}

    def release(self, stage: str) -> None:
        """Let a held stage's work end."""
        self.held.discard(stage)
        self._release(stage).set()

    def of(self, stage: str) -> list[FakeOperation]:
        """The operations of a stage, oldest first."""
        return [o for o in self.operations.values() if o.stage == stage]

    async def started(self, stage: str, count: int = 1, *, timeout: float = 300) -> FakeOperation:
        """The stage's operation once it was started that often."""

        async def wait() -> FakeOperation:
            while len(self.of(stage)) < count:
                await asyncio.sleep(0.02)
            return self.of(stage)[-1]

        return await asyncio.wait_for(wait(), timeout)

    # What the servicers call

    async def accept(self, room: str, kind: str, request: Any) -> operations_pb2.Operation:
        """Start work, or find it."""
        spec, context = request.spec, request.context
        self.check(kind, spec)
        inputs = self._inputs(spec)
        key = hashlib.sha256(kind.encode() + spec.SerializeToString(deterministic=True)).hexdigest()
        known = self._results.get(key) if self.caching and not context.force else None
        if context.validate_only:
            metadata = types_pb2.OperationMetadata(
                kind=kind, result_key=key, cached=known is not None, outputs=known or ()
            )
            answer = operations_pb2.Operation()
            answer.metadata.Pack(metadata)
            return answer
        self.calls[context.request_id] += 1
        name = f"operations/{operation_id(room, context.request_id)}"
        operation = self.operations.get(name)
        if operation is None:
            copy = type(spec)()
            copy.CopyFrom(spec)
            operation = FakeOperation(name, kind, context.request_id, context.stage, copy)
            self.operations[name] = operation
            if known is not None:
                operation.cached = True
                operation.outputs = known
                operation.ended.set()
            else:
                task = asyncio.create_task(self._run(operation, inputs, key))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        return self.view(operation)

    async def wait(self, name: str, seconds: float | None) -> operations_pb2.Operation:
        """The operation when it ended, or after `seconds`."""
        operation = self._of(name)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(operation.ended.wait(), seconds)
        return self.view(operation)

    def cancel(self, name: str) -> None:
        """End it as cancelled, unless it ended."""
        operation = self._of(name)
        self.cancelled.append(name)
        if not operation.ended.is_set():
            operation.error = Cancelled("cancelled")
            operation.ended.set()

    def pause(self, name: str, *, paused: bool) -> None:
        """Hold it, or not; it goes on all the same."""
        self._of(name).paused = paused

    def lines(self, name: str) -> list[job_pb2.LogLine]:
        """Two lines that name the stage."""
        stage = self._of(name).stage
        return [
            job_pb2.LogLine(number=1, level="INFO", message=f"{stage} begins", attempt=1),
            job_pb2.LogLine(number=2, level="INFO", message=f"{stage} works", attempt=1),
        ]

    @staticmethod
    def view(operation: FakeOperation) -> operations_pb2.Operation:
        """As the rooms show an operation."""
        done = operation.ended.is_set()
        metadata = types_pb2.OperationMetadata(
            kind=operation.kind,
            state=operation.state,
            attempt=0 if operation.cached else 1,
            cached=operation.cached,
            stage=operation.stage,
            progress=operation.progress,
            paused=operation.paused,
        )
        answer = operations_pb2.Operation(name=operation.name, done=done)
        if done:
            metadata.outputs.extend(operation.outputs)
            metadata.gates.extend(operation.gates)
            if operation.error is not None:
                answer.error.CopyFrom(to_status(operation.error))
            else:
                answer.response.Pack(
                    types_pb2.OperationResult(
                        outputs=operation.outputs, gates=operation.gates, cached=operation.cached
                    )
                )
        answer.metadata.Pack(metadata)
        return answer

    def _of(self, name: str) -> FakeOperation:
        operation = self.operations.get(name)
        if operation is None:
            raise NotFound(f"no operation {name}")
        return operation

    def _release(self, stage: str) -> asyncio.Event:
        return self._released.setdefault(stage, asyncio.Event())

    def _inputs(self, spec: Message) -> list[str]:
        digests: list[str] = []
        for descriptor in spec.DESCRIPTOR.fields:
            options: Any = descriptor.GetOptions()
            if not options.HasExtension(types_pb2.input):
                continue
            value = getattr(spec, descriptor.name)
            for item in [value] if isinstance(value, str) else value:
                if not item and descriptor.has_presence:
                    continue
                if not refs.is_digest(item):
                    error = InvalidArgument.field(descriptor.name, f"{item!r} is not a digest")
                    error.reason = NO_DIGEST
                    raise error
                self.store.get(item)
                digests.append(item)
        return digests

    async def _run(self, operation: FakeOperation, inputs: Sequence[str], key: str) -> None:
        if operation.stage in self.held:
            waits = {
                asyncio.create_task(self._release(operation.stage).wait()),
                asyncio.create_task(operation.ended.wait()),
            }
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for task in waits:
                task.cancel()
        if operation.ended.is_set():
            return
        operation.gates = self.gates.get(operation.stage, [])
        operation.error = self.failures.get(operation.stage)
        refused = [g.gate for g in operation.gates if g.verdict == types_pb2.GATE_VERDICT_FAILED]
        if refused and operation.error is None:
            operation.outputs = self._publish(operation, inputs)
            operation.error = GateFailed(f"{', '.join(refused)} failed")
        elif operation.error is None:
            operation.outputs = self._publish(operation, inputs)
            self._results[key] = operation.outputs
        operation.ended.set()

    def _publish(
        self, operation: FakeOperation, inputs: Sequence[str]
    ) -> list[types_pb2.StageOutput]:
        made: list[types_pb2.StageOutput] = []
        golden = getattr(operation.spec, "golden", "") or None
        for name, kind in _outputs(operation.kind, operation.spec):
            if operation.kind == "evaluate" and name == "chosen":
                spec: Any = operation.spec
                artifact = self.store.get(spec.models[-1])
            else:
                artifact = self._artifact(operation, name, kind, inputs, golden)
            made.append(
                types_pb2.StageOutput(
                    name=name,
                    digest=artifact.digest,
                    kind=artifact.manifest.kind,
                    size_bytes=artifact.manifest.size,
                    quarantined=artifact.quarantined,
                )
            )
        return made

    def _artifact(
        self,
        operation: FakeOperation,
        name: str,
        kind: str,
        inputs: Sequence[str],
        golden: str | None,
    ) -> Artifact:
        directory = self.store.staging("fake", f"{operation.name.rpartition('/')[2]}-{name}")
        (directory / "content.txt").write_text(f"{operation.request_id} {name}\n")
        return self.store.publish(
            directory,
            ManifestDraft(
                kind=kind,
                name=operation.stage.replace("_", "-"),
                parents=inputs,
                golden=golden if kind == "gguf" else None,
                labels={"stage": operation.stage, "output": name},
                gates=[_result(gate) for gate in operation.gates],
            ),
        )


def _result(message: types_pb2.GateResult) -> GateResult:
    name = types_pb2.GateVerdict.Name(message.verdict).removeprefix("GATE_VERDICT_").lower()
    return GateResult(message.gate, Mode.ENFORCE, Verdict(name), detail=message.detail)


def _outputs(kind: str, spec: Any) -> list[tuple[str, str]]:
    match kind:
        case "import":
            wanted = str(getattr(spec, "as")) or "model"
            return [(wanted, wanted)]
        case "dataset":
            val = [("val", "dataset")] if spec.val_set_size else []
            return [("train", "dataset"), *val, ("report", "report")]
        case "extend_tokenizer":
            return [("model", "model"), ("report", "report")]
        case "transform":
            return [("rows", "dataset"), ("report", "report")]
        case "train":
            tuned = "model" if spec.method == "full" else "adapter"
            return [(tuned, tuned), ("golden", "report")]
        case "merge" | "export":
            return [("model", "model")]
        case "quantize":
            return [(name.upper(), "gguf") for name in spec.types]
        case _:
            return [("chosen", "gguf"), ("report", "report")]


def _register(server: Server, room: str, fake: FakeRooms) -> None:
    """Add the room's own service, Operations and JobService."""

    def method(kind: str) -> Any:
        async def start(_: Any, request: Any, __: Any) -> operations_pb2.Operation:
            return await fake.accept(room, kind, request)

        return start

    rooms: dict[str, tuple[Any, Any, str, dict[str, str]]] = {
        "dataset": (
            dataset_pb2_grpc.DatasetServiceServicer,
            dataset_pb2_grpc.add_DatasetServiceServicer_to_server,
            "arriero.v1.DatasetService",
            {
                "PrepareDataset": "dataset",
                "ExtendTokenizer": "extend_tokenizer",
                "Transform": "transform",
            },
        ),
        "training": (
            training_pb2_grpc.TrainingServiceServicer,
            training_pb2_grpc.add_TrainingServiceServicer_to_server,
            "arriero.v1.TrainingService",
            {"Train": "train"},
        ),
        "merging": (
            merging_pb2_grpc.MergingServiceServicer,
            merging_pb2_grpc.add_MergingServiceServicer_to_server,
            "arriero.v1.MergingService",
            {"Import": "import", "Merge": "merge", "Export": "export"},
        ),
        "quantization": (
            quantization_pb2_grpc.QuantizationServiceServicer,
            quantization_pb2_grpc.add_QuantizationServiceServicer_to_server,
            "arriero.v1.QuantizationService",
            {"Quantize": "quantize", "Evaluate": "evaluate"},
        ),
    }
    base, add, service, methods = rooms[room]
    servicer = type("Fake" + base.__name__, (base,), {n: method(k) for n, k in methods.items()})()
    server.add(servicer, add, service)
    server.add(
        _Operations(fake),
        operations_pb2_grpc.add_OperationsServicer_to_server,
        "google.longrunning.Operations",
    )
    server.add(_Jobs(fake), job_pb2_grpc.add_JobServiceServicer_to_server, "arriero.v1.JobService")


class _Operations(operations_pb2_grpc.OperationsServicer):  # type: ignore[misc]
    def __init__(self, fake: FakeRooms) -> None:
        self._fake = fake

    async def WaitOperation(self, request: Any, _: Any) -> operations_pb2.Operation:
        seconds = request.timeout.ToTimedelta().total_seconds()
        return await self._fake.wait(request.name, seconds)

    async def GetOperation(self, request: Any, _: Any) -> operations_pb2.Operation:
        return await self._fake.wait(request.name, 0)

    async def CancelOperation(self, request: Any, _: Any) -> empty_pb2.Empty:
        self._fake.cancel(request.name)
        return empty_pb2.Empty()


class _Jobs(job_pb2_grpc.JobServiceServicer):
    def __init__(self, fake: FakeRooms) -> None:
        self._fake = fake

    async def ReportProgress(self, request: Any, _: Any) -> job_pb2.ReportProgressResponse:
        return job_pb2.ReportProgressResponse()

    async def AppendLogs(self, request: Any, _: Any) -> job_pb2.AppendLogsResponse:
        return job_pb2.AppendLogsResponse()

    async def PauseOperation(self, request: Any, _: Any) -> job_pb2.PauseOperationResponse:
        self._fake.pause(request.operation, paused=True)
        return job_pb2.PauseOperationResponse()

    async def ResumeOperation(self, request: Any, _: Any) -> job_pb2.ResumeOperationResponse:
        self._fake.pause(request.operation, paused=False)
        return job_pb2.ResumeOperationResponse()

    async def ReadLogs(self, request: Any, _: Any) -> AsyncIterator[job_pb2.ReadLogsResponse]:
        lines = [
            line for line in self._fake.lines(request.operation) if line.number > request.after
        ]
        yield job_pb2.ReadLogsResponse(lines=lines)
        if request.follow:
            await self._fake.wait(request.operation, None)
