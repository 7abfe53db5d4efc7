"""The orchestrator's three gRPC services.

Responsibility: messages to calls and back. Does not know how anything is done.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any, TypeVar

import grpc.aio

from arriero.errors import ArrieroError, InvalidArgument, NotFound
from arriero.orchestrator.artifacts import Upload, chunks, describe, tags_by_digest
from arriero.orchestrator.endpoints import Endpoints
from arriero.orchestrator.reports import dataset_report
from arriero.orchestrator.runs import Runs
from arriero.orchestrator.verifying import verification
from arriero.orchestrator.waiving import waived_gates
from arriero.refs import KINDS
from arriero.rpc import Server, caller
from arriero.rpc.auth import require
from arriero.rpc.roles import Role
from arriero.store import Manifest, Store
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import orchestrator_pb2_grpc, pipeline_pb2

_Context = grpc.aio.ServicerContext[Any, Any]
_DEFAULT_PAGE, _MAX_PAGE = 100, 1000
# How much a caller whose upload was refused may still send, and for how long.
_DRAIN_BYTES, _DRAIN_SECONDS = 256 * 1024 * 1024, 30
_T = TypeVar("_T")


class RunServicer(orchestrator_pb2_grpc.RunServiceServicer):
    """`arriero.v1.RunService`."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs

    async def CreateRun(self, request: pb.CreateRunRequest, _: _Context) -> pb.CreateRunResponse:
        """Start a run, or plan it."""
        _may_deploy(request.pipeline)
        if request.validate_only:
            return pb.CreateRunResponse(run=await self._runs.plan(request.pipeline, owner=caller()))
        run = await self._runs.create(
            request.pipeline, request_id=request.request_id, owner=caller()
        )
        return pb.CreateRunResponse(run=run)

    async def GetRun(self, request: pb.GetRunRequest, _: _Context) -> pb.GetRunResponse:
        """A run now."""
        return pb.GetRunResponse(run=self._runs.get(request.id))

    async def ListRuns(self, request: pb.ListRunsRequest, _: _Context) -> pb.ListRunsResponse:
        """Newest first."""
        runs, token = self._runs.list(request.page_size, request.page_token)
        return pb.ListRunsResponse(runs=runs, next_page_token=token)

    async def CancelRun(self, request: pb.CancelRunRequest, _: _Context) -> pb.CancelRunResponse:
        """Record the wish; the rest follows."""
        return pb.CancelRunResponse(run=await self._runs.cancel(request.id))

    async def PauseRun(self, request: pb.PauseRunRequest, _: _Context) -> pb.PauseRunResponse:
        """Record the wish; operations follow."""
        return pb.PauseRunResponse(run=await self._runs.pause(request.id, paused=True))

    async def ResumeRun(self, request: pb.ResumeRunRequest, _: _Context) -> pb.ResumeRunResponse:
        """Record the wish; operations follow."""
        return pb.ResumeRunResponse(run=await self._runs.pause(request.id, paused=False))

    async def RetryRun(self, request: pb.RetryRunRequest, _: _Context) -> pb.RetryRunResponse:
        """Again from what did not succeed."""
        if request.waivers:
            require(Role.DEPLOYER, "waiving a gate")
        _may_deploy(self._runs.get(request.id).pipeline)
        run = await self._runs.retry(
            request.id, request_id=request.request_id, waivers=request.waivers, who=caller()
        )
        return pb.RetryRunResponse(run=run)

    async def PreviewStage(
        self, request: pb.PreviewStageRequest, _: _Context
    ) -> pb.PreviewStageResponse:
        """What a dataset stage would make of its first rows."""
        return await self._runs.preview(request, owner=caller())

    async def WatchRun(
        self, request: pb.WatchRunRequest, _: _Context
    ) -> AsyncIterator[pb.WatchRunResponse]:
        """Every change until the end."""
        async for run in self._runs.live(request.id).watch():
            yield pb.WatchRunResponse(run=run)

    async def ReadRunLogs(
        self, request: pb.ReadRunLogsRequest, _: _Context
    ) -> AsyncIterator[pb.ReadRunLogsResponse]:
        """Log lines of the run's stages."""
        async for stage, line in self._runs.logs(request.id, request.stage, follow=request.follow):
            yield pb.ReadRunLogsResponse(
                stage=stage,
                message=line.message,
                level=line.level,
                attempt=line.attempt,
                time=line.time,
            )


class EndpointServicer(orchestrator_pb2_grpc.EndpointServiceServicer):
    """`arriero.v1.EndpointService`."""

    def __init__(self, endpoints: Endpoints, store: Store) -> None:
        self._endpoints = endpoints
        self._store = store

    async def CreateEndpoint(
        self, request: pb.CreateEndpointRequest, _: _Context
    ) -> pb.CreateEndpointResponse:
        """A new endpoint."""
        endpoint = await self._endpoints.create(request.spec, run=request.run, owner=caller())
        return pb.CreateEndpointResponse(endpoint=endpoint)

    async def UpdateEndpoint(
        self, request: pb.UpdateEndpointRequest, _: _Context
    ) -> pb.UpdateEndpointResponse:
        """Another artifact or other settings."""
        endpoint = await self._endpoints.update(request.spec, run=request.run, owner=caller())
        return pb.UpdateEndpointResponse(endpoint=endpoint)

    async def GetEndpoint(
        self, request: pb.GetEndpointRequest, _: _Context
    ) -> pb.GetEndpointResponse:
        """An endpoint now, with the gates that were waived on the way to what it serves."""
        if request.score:
            endpoint = await self._endpoints.score(request.name)
        else:
            endpoint = self._endpoints.get(request.name)
        with contextlib.suppress(NotFound):  # its manifest was lost; the endpoint serves on
            waived = await asyncio.to_thread(waived_gates, self._store, endpoint.spec.model)
            endpoint.gates.extend(waived)
        return pb.GetEndpointResponse(endpoint=endpoint)

    async def ListEndpoints(
        self, request: pb.ListEndpointsRequest, _: _Context
    ) -> pb.ListEndpointsResponse:
        """All of them."""
        return pb.ListEndpointsResponse(endpoints=self._endpoints.all())

    async def ScaleEndpoint(
        self, request: pb.ScaleEndpointRequest, _: _Context
    ) -> pb.ScaleEndpointResponse:
        """Another number of replicas."""
        return pb.ScaleEndpointResponse(
            endpoint=self._endpoints.scale(request.name, request.replicas)
        )

    async def AddEndpointAdapter(
        self, request: pb.AddEndpointAdapterRequest, _: _Context
    ) -> pb.AddEndpointAdapterResponse:
        """One more adapter."""
        endpoint = await self._endpoints.add_adapter(request.name, request.adapter)
        return pb.AddEndpointAdapterResponse(endpoint=endpoint)

    async def RemoveEndpointAdapter(
        self, request: pb.RemoveEndpointAdapterRequest, _: _Context
    ) -> pb.RemoveEndpointAdapterResponse:
        """One adapter less."""
        endpoint = await self._endpoints.remove_adapter(
            request.name, request.adapter, allow_missing=request.allow_missing
        )
        return pb.RemoveEndpointAdapterResponse(endpoint=endpoint)

    async def DeleteEndpoint(
        self, request: pb.DeleteEndpointRequest, _: _Context
    ) -> pb.DeleteEndpointResponse:
        """Drain and remove."""
        self._endpoints.delete(request.name, allow_missing=request.allow_missing)
        return pb.DeleteEndpointResponse()


class ArtifactServicer(orchestrator_pb2_grpc.ArtifactServiceServicer):
    """`arriero.v1.ArtifactService`; the store blocks, so it is asked in threads."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def GetArtifact(
        self, request: pb.GetArtifactRequest, _: _Context
    ) -> pb.GetArtifactResponse:
        """One artifact."""
        artifact = await asyncio.to_thread(lambda: self._describe([self._manifest(request.ref)])[0])
        return pb.GetArtifactResponse(artifact=artifact)

    async def ListArtifacts(
        self, request: pb.ListArtifactsRequest, _: _Context
    ) -> pb.ListArtifactsResponse:
        """A page of artifacts."""
        _check_kind(request.kind)
        size, start = _page(request.page_size, request.page_token)

        def read() -> tuple[list[pb.Artifact], bool]:
            found = self._store.list(request.kind or None)
            page = [a.manifest for a in found[start : start + size]]
            return self._describe(page), len(found) > start + size

        artifacts, more = await asyncio.to_thread(read)
        return pb.ListArtifactsResponse(
            artifacts=artifacts, next_page_token=str(start + size) if more else ""
        )

    async def GetDatasetReport(
        self, request: pb.GetDatasetReportRequest, _: _Context
    ) -> pb.GetDatasetReportResponse:
        """What a dataset stage did to its rows."""
        report = await asyncio.to_thread(dataset_report, self._store, request.ref)
        return pb.GetDatasetReportResponse(report=report)

    async def GetLineage(self, request: pb.GetLineageRequest, _: _Context) -> pb.GetLineageResponse:
        """An artifact and its ancestors."""

        def read() -> list[pb.Artifact]:
            digest = self._store.resolve(request.ref)
            return self._describe(self._store.lineage(digest))

        return pb.GetLineageResponse(artifacts=await asyncio.to_thread(read))

    async def TagArtifact(
        self, request: pb.TagArtifactRequest, _: _Context
    ) -> pb.TagArtifactResponse:
        """Point a tag at an artifact."""

        def tag() -> str:
            digest = self._store.resolve(request.ref)
            self._store.tag(request.tag, digest, expected=request.expected_digest or None)
            return digest

        return pb.TagArtifactResponse(tag=request.tag, digest=await asyncio.to_thread(tag))

    async def ListTags(self, request: pb.ListTagsRequest, _: _Context) -> pb.ListTagsResponse:
        """Every tag."""
        _check_kind(request.kind)
        response = pb.ListTagsResponse()
        for entry in await asyncio.to_thread(self._store.tags, request.kind or None):
            tag = response.tags.add(tag=entry.tag, digest=entry.digest)
            tag.time.FromJsonString(entry.time)
        return response

    async def CollectGarbage(
        self, request: pb.CollectGarbageRequest, _: _Context
    ) -> pb.CollectGarbageResponse:
        """Remove what no root holds."""
        removals = await asyncio.to_thread(self._store.gc, dry_run=request.dry_run)
        return pb.CollectGarbageResponse(
            removals=[
                pb.Removal(path=r.path, size_bytes=r.size, reason=r.reason) for r in removals
            ],
            freed_bytes=sum(r.size for r in removals),
        )

    async def PullArtifact(
        self, request: pb.PullArtifactRequest, _: _Context
    ) -> AsyncIterator[pb.PullArtifactResponse]:
        """The files of an artifact."""
        source: Iterator[pb.PullArtifactResponse] = chunks(self._store, request.ref)
        try:
            while (message := await asyncio.to_thread(next, source, None)) is not None:
                yield message
        finally:
            await asyncio.to_thread(source.close)  # type: ignore[attr-defined]

    async def PushArtifact(
        self, request_iterator: AsyncIterator[pb.PushArtifactRequest], _: _Context
    ) -> pb.PushArtifactResponse:
        """Files become an artifact when the stream ends well."""
        upload: Upload | None = None
        try:
            async for message in request_iterator:
                if message.HasField("header"):
                    if upload is not None:
                        raise InvalidArgument.field("header", "came twice")
                    upload = await asyncio.to_thread(
                        Upload, self._store, message.header, owner=caller()
                    )
                    continue
                if upload is None:
                    raise InvalidArgument.field("header", "is missing in the first message")
                await asyncio.to_thread(upload.write, message.path, message.chunk)
            if upload is None:
                raise InvalidArgument.field("header", "is missing: the stream was empty")
            artifact = await asyncio.to_thread(upload.publish)
        except ArrieroError:
            await _drain(request_iterator)
            raise
        finally:
            if upload is not None:
                await asyncio.to_thread(upload.close)
        described = await asyncio.to_thread(self._describe, [artifact.manifest])
        return pb.PushArtifactResponse(artifact=described[0])

    async def VerifyArtifact(
        self, request: pb.VerifyArtifactRequest, _: _Context
    ) -> AsyncIterator[pb.VerifyArtifactResponse]:
        """Every byte again, against the manifest."""
        async with contextlib.aclosing(verification(self._store, request.ref)) as messages:
            async for message in messages:
                yield message

    def _manifest(self, ref: str) -> Manifest:
        return self._store.manifest(self._store.resolve(ref))

    def _describe(self, manifests: list[Manifest]) -> list[pb.Artifact]:
        tags = tags_by_digest(self._store)
        return [describe(self._store, manifest, tags) for manifest in manifests]


async def _drain(requests: AsyncIterator[pb.PushArtifactRequest]) -> None:
    """Let a caller that was refused finish sending, within reason.

    grpc.aio tells a client that is still sending INTERNAL instead of why.
    """
    left = _DRAIN_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            async for message in requests:
                left -= len(message.chunk) + 1
                if left < 0:
                    return


def register(server: Server, runs: Runs, endpoints: Endpoints, store: Store) -> None:
    """Add the three services to a server."""
    services = pb.DESCRIPTOR.services_by_name
    server.add(
        RunServicer(runs),
        orchestrator_pb2_grpc.add_RunServiceServicer_to_server,
        services["RunService"].full_name,
    )
    server.add(
        EndpointServicer(endpoints, store),
        orchestrator_pb2_grpc.add_EndpointServiceServicer_to_server,
        services["EndpointService"].full_name,
    )
    server.add(
        ArtifactServicer(store),
        orchestrator_pb2_grpc.add_ArtifactServiceServicer_to_server,
        services["ArtifactService"].full_name,
    )


def _may_deploy(pipeline: pipeline_pb2.Pipeline) -> None:
    if any(stage.HasField("deploy") for stage in pipeline.stages):
        require(Role.DEPLOYER, "a pipeline with a deploy stage")


def _check_kind(kind: str) -> None:
    if kind and kind not in KINDS:
        raise InvalidArgument.field("kind", f"{kind!r} is not one of {', '.join(KINDS)}")


def _page(size: int, token: str) -> tuple[int, int]:
    if size < 0:
        raise InvalidArgument.field("page_size", f"{size} is below 0")
    if token and not token.isdigit():
        raise InvalidArgument.field("page_token", f"{token!r} is not a page token")
    return min(size or _DEFAULT_PAGE, _MAX_PAGE), int(token or 0)
