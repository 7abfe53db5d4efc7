"""The two gRPC services that stand beside every room's own.

Responsibility: `google.longrunning.Operations` and `arriero.v1.JobService` over
one engine. Does not know kinds of work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from google.longrunning import operations_pb2, operations_pb2_grpc
from google.protobuf import empty_pb2

from arriero.errors import InvalidArgument, Unimplemented
from arriero.operations.engine import Engine
from arriero.operations.handoff import TOKEN_KEY
from arriero.operations.logs import LogReader
from arriero.v1 import job_pb2, job_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]
_BATCH = 500
_FOLLOW_SECONDS = 0.3


class OperationsServicer(operations_pb2_grpc.OperationsServicer):  # type: ignore[misc]
    """Operations by name: read, wait, cancel."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def GetOperation(
        self, request: operations_pb2.GetOperationRequest, context: _Context
    ) -> operations_pb2.Operation:
        """As it is now."""
        return self._engine.get(request.name)

    async def WaitOperation(
        self, request: operations_pb2.WaitOperationRequest, context: _Context
    ) -> operations_pb2.Operation:
        """When it has ended, or after the timeout; without one, as long as the call lasts."""
        timeout = (
            request.timeout.ToTimedelta().total_seconds() if request.HasField("timeout") else None
        )
        return await self._engine.wait(request.name, timeout)

    async def ListOperations(
        self, request: operations_pb2.ListOperationsRequest, context: _Context
    ) -> operations_pb2.ListOperationsResponse:
        """Newest first; filters are refused."""
        if request.filter:
            raise InvalidArgument.field("filter", "this service lists without filters; leave empty")
        found, more = self._engine.list(request.page_size, request.page_token)
        return operations_pb2.ListOperationsResponse(operations=found, next_page_token=more)

    async def CancelOperation(
        self, request: operations_pb2.CancelOperationRequest, context: _Context
    ) -> empty_pb2.Empty:
        """Detach the caller; see `Engine.cancel`."""
        await self._engine.cancel(request.name)
        return empty_pb2.Empty()

    async def DeleteOperation(
        self, request: operations_pb2.DeleteOperationRequest, context: _Context
    ) -> empty_pb2.Empty:
        """Refused: records are the proof of what was done."""
        raise Unimplemented("operations are not deleted; their records are small and stay")


class JobServicer(job_pb2_grpc.JobServiceServicer):
    """What jobs report, and what they wrote."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def ReportProgress(
        self, request: job_pb2.ReportProgressRequest, context: _Context
    ) -> job_pb2.ReportProgressResponse:
        """Take a job's progress, if the job is who it says."""
        self._engine.reports.progress(
            request.execution, request.attempt, _token(context), request.progress
        )
        return job_pb2.ReportProgressResponse()

    async def AppendLogs(
        self, request: job_pb2.AppendLogsRequest, context: _Context
    ) -> job_pb2.AppendLogsResponse:
        """Keep lines of a job on another machine."""
        received = self._engine.reports.lines(
            request.execution,
            request.attempt,
            _token(context),
            node=request.node,
            first=request.first,
            lines=request.lines,
        )
        return job_pb2.AppendLogsResponse(received=received)

    async def PauseOperation(
        self, request: job_pb2.PauseOperationRequest, context: _Context
    ) -> job_pb2.PauseOperationResponse:
        """Hold an operation's work."""
        await self._engine.pause(request.operation, paused=True)
        return job_pb2.PauseOperationResponse()

    async def ResumeOperation(
        self, request: job_pb2.ResumeOperationRequest, context: _Context
    ) -> job_pb2.ResumeOperationResponse:
        """Let it go on."""
        await self._engine.pause(request.operation, paused=False)
        return job_pb2.ResumeOperationResponse()

    async def ReadLogs(
        self, request: job_pb2.ReadLogsRequest, context: _Context
    ) -> AsyncIterator[job_pb2.ReadLogsResponse]:
        """Log lines, in batches; with `follow` until the operation ends."""
        path = await self._engine.log_path(request.operation)
        if path is None:
            return
        reader = LogReader(path)
        while True:
            # Asked before reading: whatever is written before the end is read after it.
            ended = self._engine.get(request.operation).done
            batch: list[job_pb2.LogLine] = []
            for line in reader.read(ended=ended, after=request.after):
                batch.append(line)
                if len(batch) == _BATCH:
                    yield job_pb2.ReadLogsResponse(lines=batch)
                    batch = []
            if batch:
                yield job_pb2.ReadLogsResponse(lines=batch)
            if ended or not request.follow:
                return
            await asyncio.sleep(_FOLLOW_SECONDS)


def _token(context: _Context) -> str:
    """What a job proves itself with."""
    return str(next((v for k, v in context.invocation_metadata() or () if k == TOKEN_KEY), ""))
