"""The other services, as the orchestrator calls them.

Responsibility: which service does which kind of stage, its address, and calls
that raise `ArrieroError`. Does not know runs.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import grpc.aio
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from arriero.errors import FailedPrecondition, Unauthenticated, Unavailable
from arriero.rpc.channel import connect
from arriero.rpc.status import translated
from arriero.settings import ClientSettings
from arriero.v1 import (
    dataset_pb2,
    dataset_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    merging_pb2,
    merging_pb2_grpc,
    quantization_pb2,
    quantization_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
    types_pb2,
)

START_SECONDS = 30.0
PREVIEW_SECONDS = 110.0
_GRACE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class _Work:
    room: str
    method: str
    stub: Any
    request: Any


# Kind of stage -> who does it, and how it is started.
_WORK: Mapping[str, _Work] = {
    "import": _Work(
        "merging", "Import", merging_pb2_grpc.MergingServiceStub, merging_pb2.ImportRequest
    ),
    "dataset": _Work(
        "dataset",
        "PrepareDataset",
        dataset_pb2_grpc.DatasetServiceStub,
        dataset_pb2.PrepareDatasetRequest,
    ),
    "extend_tokenizer": _Work(
        "dataset",
        "ExtendTokenizer",
        dataset_pb2_grpc.DatasetServiceStub,
        dataset_pb2.ExtendTokenizerRequest,
    ),
    "transform": _Work(
        "dataset",
        "Transform",
        dataset_pb2_grpc.DatasetServiceStub,
        dataset_pb2.TransformRequest,
    ),
    "train": _Work(
        "training", "Train", training_pb2_grpc.TrainingServiceStub, training_pb2.TrainRequest
    ),
    "merge": _Work(
        "merging", "Merge", merging_pb2_grpc.MergingServiceStub, merging_pb2.MergeRequest
    ),
    "export": _Work(
        "merging", "Export", merging_pb2_grpc.MergingServiceStub, merging_pb2.ExportRequest
    ),
    "quantize": _Work(
        "quantization",
        "Quantize",
        quantization_pb2_grpc.QuantizationServiceStub,
        quantization_pb2.QuantizeRequest,
    ),
    "evaluate": _Work(
        "quantization",
        "Evaluate",
        quantization_pb2_grpc.QuantizationServiceStub,
        quantization_pb2.EvaluateRequest,
    ),
}

ROOMS = tuple(dict.fromkeys(work.room for work in _WORK.values()))


def room_of(kind: str) -> str:
    """The service that does a kind of stage; empty for `deploy`, which is ours."""
    work = _WORK.get(kind)
    return work.room if work else ""


@contextmanager
def _asking(room: str) -> Iterator[None]:
    """Calls made inside raise `ArrieroError`; our own credentials are no fault of our caller's."""
    try:
        with translated():
            yield
    except Unauthenticated as error:
        raise FailedPrecondition(
            f"the {room} service does not accept the orchestrator's own token: {error.message}; "
            "start the services with ARRIERO_TOKEN_FILE naming a token that they accept "
            "(ARRIERO_SERVER_TOKEN_FILE)",
            reason="SERVICE_TOKEN",
        ) from None


def addresses_from_env(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """`ARRIERO_<ROOM>_ADDRESS` of every room that has one."""
    env = os.environ if env is None else env
    found = {room: env.get(f"ARRIERO_{room.upper()}_ADDRESS", "") for room in ROOMS}
    return {room: address for room, address in found.items() if address}


class Rooms:
    """Calls to the rooms; every method raises `ArrieroError`, Unavailable when one is away.

    Args:
        addresses: by room.
        settings: credentials.
    """

    def __init__(self, addresses: Mapping[str, str], settings: ClientSettings) -> None:
        self._addresses = dict(addresses)
        self._settings = settings
        self._channels: dict[str, grpc.aio.Channel] = {}

    def _channel(self, kind: str) -> grpc.aio.Channel:
        room = _WORK[kind].room
        channel = self._channels.get(room)
        if channel is None:
            address = self._addresses.get(room)
            if address is None:
                raise Unavailable(
                    f"the {room} service has no address; set ARRIERO_{room.upper()}_ADDRESS"
                )
            channel = self._channels[room] = connect(address, self._settings)
        return channel

    async def start(
        self,
        kind: str,
        spec: Message,
        context: types_pb2.StageContext,
        *,
        timeout: float = START_SECONDS,
    ) -> operations_pb2.Operation:
        """Start a stage's work, or find what an earlier start with its `request_id` made."""
        work = _WORK[kind]
        stub = work.stub(self._channel(kind))
        request = work.request(context=context, spec=spec)
        with _asking(work.room):
            operation: operations_pb2.Operation = await getattr(stub, work.method)(
                request, timeout=timeout
            )
        return operation

    async def preview(
        self, request: dataset_pb2.PreviewDatasetRequest
    ) -> dataset_pb2.PreviewDatasetResponse:
        """What a dataset stage would make of its first rows."""
        stub = dataset_pb2_grpc.DatasetServiceStub(self._channel("dataset"))
        with _asking("dataset"):
            answer: dataset_pb2.PreviewDatasetResponse = await stub.PreviewDataset(
                request, timeout=PREVIEW_SECONDS
            )
        return answer

    async def wait(self, kind: str, name: str, seconds: float) -> operations_pb2.Operation:
        """The operation when it is done, or as it is after `seconds`."""
        stub = operations_pb2_grpc.OperationsStub(self._channel(kind))
        timeout = Duration()
        timeout.FromNanoseconds(int(seconds * 1e9))
        request = operations_pb2.WaitOperationRequest(name=name, timeout=timeout)
        with _asking(room_of(kind)):
            operation: operations_pb2.Operation = await stub.WaitOperation(
                request, timeout=seconds + _GRACE_SECONDS
            )
        return operation

    async def cancel(self, kind: str, name: str, *, timeout: float = 3.0) -> None:
        """Ask for an operation's end."""
        stub = operations_pb2_grpc.OperationsStub(self._channel(kind))
        with _asking(room_of(kind)):
            await stub.CancelOperation(
                operations_pb2.CancelOperationRequest(name=name), timeout=timeout
            )

    async def pause(self, kind: str, name: str, *, paused: bool, timeout: float = 3.0) -> None:
        """Hold an operation's work, or let it go on."""
        stub = job_pb2_grpc.JobServiceStub(self._channel(kind))
        with _asking(room_of(kind)):
            if paused:
                await stub.PauseOperation(
                    job_pb2.PauseOperationRequest(operation=name), timeout=timeout
                )
            else:
                await stub.ResumeOperation(
                    job_pb2.ResumeOperationRequest(operation=name), timeout=timeout
                )

    async def read_logs(
        self, kind: str, name: str, after: int, *, follow: bool
    ) -> AsyncIterator[job_pb2.LogLine]:
        """Log lines of an operation, from the line after number `after`."""
        stub = job_pb2_grpc.JobServiceStub(self._channel(kind))
        request = job_pb2.ReadLogsRequest(operation=name, after=after, follow=follow)
        with _asking(room_of(kind)):
            async for answer in stub.ReadLogs(request):
                for line in answer.lines:
                    yield line

    async def close(self) -> None:
        """Close all channels."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()


class Caller(Protocol):
    """Asks live replicas; raises `ArrieroError`."""

    async def score(
        self, address: str, golden: str, *, timeout: float
    ) -> inference_pb2.ScoreResponse:
        """KL divergence and top-1 agreement of the replica at `address`."""
        ...

    async def equip(
        self, address: str, adapters: Sequence[inference_pb2.AdapterSpec], *, timeout: float
    ) -> None:
        """Let the replica at `address` have these adapters, by digest, and no others."""
        ...


class Replicas:
    """Calls to live replicas. A channel each time: replicas come and go."""

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings

    async def score(
        self, address: str, golden: str, *, timeout: float
    ) -> inference_pb2.ScoreResponse:
        """See `Caller`."""
        async with connect(address, self._settings) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            with _asking("inference"):
                answer: inference_pb2.ScoreResponse = await stub.Score(
                    inference_pb2.ScoreRequest(golden=golden), timeout=timeout
                )
        return answer

    async def equip(
        self, address: str, adapters: Sequence[inference_pb2.AdapterSpec], *, timeout: float
    ) -> None:
        """See `Caller`."""
        wanted = {item.name: item for item in adapters}
        async with connect(address, self._settings) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            with _asking("inference"):
                listed = await stub.ListAdapters(
                    inference_pb2.ListAdaptersRequest(), timeout=timeout
                )
                there = {item.name: item for item in listed.adapters}
                for name in [n for n, item in there.items() if wanted.get(n) != item]:
                    await stub.UnloadAdapter(
                        inference_pb2.UnloadAdapterRequest(name=name, allow_missing=True),
                        timeout=timeout,
                    )
                for item in [i for n, i in wanted.items() if there.get(n) != i]:
                    await stub.LoadAdapter(
                        inference_pb2.LoadAdapterRequest(adapter=item), timeout=timeout
                    )
