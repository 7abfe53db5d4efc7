"""The platform's services in memory, behind real gRPC.

Responsibility: enough of each service that a client can be tested, and
documented, against it. Does not know how the real ones work: it keeps their
promises alone.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from arriero import rpc
from arriero.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unimplemented,
)
from arriero.settings import ServerSettings
from arriero.testing.artifacts import FakeArtifacts, page
from arriero.testing.replica import FakeInference
from arriero.v1 import inference_pb2_grpc, pipeline_pb2
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import orchestrator_pb2_grpc as stubs

__all__ = [
    "FakeArtifacts",
    "FakeEndpoints",
    "FakePlatform",
    "FakeRuns",
    "running_platform",
]


class FakeRuns(stubs.RunServiceServicer):
    """Runs that succeed as soon as somebody watches.

    Attributes:
        runs: by id, oldest first.
        breaks: how many watches break off with UNAVAILABLE after their first message.
        hold: set it (to an unset event) to keep runs RUNNING.
    """

    def __init__(self) -> None:
        self.runs: dict[str, pb.Run] = {}
        self.breaks = 0
        self.hold: asyncio.Event | None = None
        self._requests: dict[str, str] = {}

    async def CreateRun(self, request: pb.CreateRunRequest, context: Any) -> pb.CreateRunResponse:
        """Checks little: a name, stages, ranks from 1."""
        run = _planned(request.pipeline)
        if request.validate_only:
            return pb.CreateRunResponse(run=run)
        if request.request_id in self._requests:
            return pb.CreateRunResponse(run=self.runs[self._requests[request.request_id]])
        run.id = f"{request.pipeline.name}-{len(self.runs) + 1:08d}"
        run.state, run.etag = pb.RUN_STATE_RUNNING, "1"
        self.runs[run.id] = run
        self._requests[request.request_id] = run.id
        return pb.CreateRunResponse(run=run)

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        """By id."""
        return pb.GetRunResponse(run=self._get(request.id))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:
        """Newest first, in pages."""
        items, token = page([*self.runs.values()][::-1], request.page_size, request.page_token)
        return pb.ListRunsResponse(runs=items, next_page_token=token)

    async def CancelRun(self, request: pb.CancelRunRequest, context: Any) -> pb.CancelRunResponse:
        """At once."""
        run = self._get(request.id)
        if run.state == pb.RUN_STATE_RUNNING:
            _move(run, pb.RUN_STATE_CANCELLED)
        return pb.CancelRunResponse(run=run)

    async def PauseRun(self, request: pb.PauseRunRequest, context: Any) -> pb.PauseRunResponse:
        """At once."""
        run = self._get(request.id)
        run.paused = True
        return pb.PauseRunResponse(run=run)

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: Any) -> pb.ResumeRunResponse:
        """At once."""
        run = self._get(request.id)
        run.paused = False
        return pb.ResumeRunResponse(run=run)

    async def RetryRun(self, request: pb.RetryRunRequest, context: Any) -> pb.RetryRunResponse:
        """Ended runs alone."""
        run = self._get(request.id)
        if run.state == pb.RUN_STATE_RUNNING:
            raise FailedPrecondition(f"run {run.id} is active; cancel it first")
        _move(run, pb.RUN_STATE_RUNNING)
        return pb.RetryRunResponse(run=run)

    async def WatchRun(
        self, request: pb.WatchRunRequest, context: Any
    ) -> AsyncIterator[pb.WatchRunResponse]:
        """As it is, then its end."""
        run = self._get(request.id)
        yield pb.WatchRunResponse(run=run)
        if self.breaks:
            self.breaks -= 1
            raise Unavailable("the fake went away")
        if self.hold is not None:
            await self.hold.wait()
        if run.state == pb.RUN_STATE_RUNNING:
            _move(run, pb.RUN_STATE_SUCCEEDED)
            yield pb.WatchRunResponse(run=run)

    async def ReadRunLogs(
        self, request: pb.ReadRunLogsRequest, context: Any
    ) -> AsyncIterator[pb.ReadRunLogsResponse]:
        """Two lines a stage."""
        for stage in self._get(request.id).stages:
            if request.stage in ("", stage.name):
                for what in ("starts", "is done"):
                    yield pb.ReadRunLogsResponse(
                        stage=stage.name, level="INFO", message=f"{stage.name} {what}", attempt=1
                    )

    async def PreviewStage(
        self, request: pb.PreviewStageRequest, context: Any
    ) -> pb.PreviewStageResponse:
        """Knows no rows."""
        raise Unimplemented("the fake has no rows to preview")

    def _get(self, run: str) -> pb.Run:
        if run not in self.runs:
            raise NotFound(f"no run {run!r}")
        return self.runs[run]


class FakeEndpoints(stubs.EndpointServiceServicer):
    """Endpoints whose replicas are ready at once.

    Attributes:
        endpoints: by name.
        addresses: where replicas are, the first to the first replica.
        look_ups: how often `GetEndpoint` was asked.
        away: answer UNAVAILABLE.
    """

    def __init__(self) -> None:
        self.endpoints: dict[str, pb.Endpoint] = {}
        self.addresses: list[str] = []
        self.look_ups = 0
        self.away = False

    def serve(self, spec: pipeline_pb2.DeploySpec) -> pb.Endpoint:
        """Put an endpoint there as its spec says."""
        endpoint = pb.Endpoint(name=spec.endpoint, spec=spec, desired_replicas=spec.replicas)
        for index, address in enumerate(self.addresses[: spec.replicas]):
            endpoint.replicas.add(
                name=f"{spec.endpoint}-{index}",
                address=address,
                state=pb.REPLICA_STATE_READY,
                digest=spec.model,
            )
        endpoint.ready_replicas = len(endpoint.replicas)
        self.endpoints[spec.endpoint] = endpoint
        return endpoint

    async def CreateEndpoint(
        self, request: pb.CreateEndpointRequest, context: Any
    ) -> pb.CreateEndpointResponse:
        """New names alone."""
        if request.spec.endpoint in self.endpoints:
            raise AlreadyExists(f"endpoint {request.spec.endpoint!r} exists; update it")
        return pb.CreateEndpointResponse(endpoint=self.serve(request.spec))

    async def UpdateEndpoint(
        self, request: pb.UpdateEndpointRequest, context: Any
    ) -> pb.UpdateEndpointResponse:
        """Known names alone."""
        self._get(request.spec.endpoint)
        return pb.UpdateEndpointResponse(endpoint=self.serve(request.spec))

    async def AddEndpointAdapter(
        self, request: pb.AddEndpointAdapterRequest, context: Any
    ) -> pb.AddEndpointAdapterResponse:
        """Takes any."""
        endpoint = self._get(request.name)
        endpoint.spec.adapters.append(request.adapter)
        return pb.AddEndpointAdapterResponse(endpoint=endpoint)

    async def RemoveEndpointAdapter(
        self, request: pb.RemoveEndpointAdapterRequest, context: Any
    ) -> pb.RemoveEndpointAdapterResponse:
        """By name."""
        endpoint = self._get(request.name)
        kept = [item for item in endpoint.spec.adapters if item.name != request.adapter]
        if len(kept) == len(endpoint.spec.adapters) and not request.allow_missing:
            raise NotFound(f"endpoint {request.name!r} has no adapter {request.adapter!r}")
        del endpoint.spec.adapters[:]
        endpoint.spec.adapters.extend(kept)
        return pb.RemoveEndpointAdapterResponse(endpoint=endpoint)

    async def GetEndpoint(
        self, request: pb.GetEndpointRequest, context: Any
    ) -> pb.GetEndpointResponse:
        """By name."""
        self.look_ups += 1
        if self.away:
            raise Unavailable("the fake orchestrator is away")
        answer = pb.GetEndpointResponse(endpoint=self._get(request.name))
        for replica in answer.endpoint.replicas if request.score else ():
            replica.kl_divergence, replica.top1_agreement = 0.01, 0.99
        return answer

    async def ListEndpoints(
        self, request: pb.ListEndpointsRequest, context: Any
    ) -> pb.ListEndpointsResponse:
        """By name."""
        return pb.ListEndpointsResponse(
            endpoints=[self.endpoints[name] for name in sorted(self.endpoints)]
        )

    async def ScaleEndpoint(
        self, request: pb.ScaleEndpointRequest, context: Any
    ) -> pb.ScaleEndpointResponse:
        """At once, as far as there are addresses."""
        spec = self._get(request.name).spec
        spec.replicas = request.replicas
        return pb.ScaleEndpointResponse(endpoint=self.serve(spec))

    async def DeleteEndpoint(
        self, request: pb.DeleteEndpointRequest, context: Any
    ) -> pb.DeleteEndpointResponse:
        """At once."""
        if not request.allow_missing:
            self._get(request.name)
        self.endpoints.pop(request.name, None)
        return pb.DeleteEndpointResponse()

    def _get(self, name: str) -> pb.Endpoint:
        if name not in self.endpoints:
            raise NotFound(f"no endpoint {name!r}; known: {', '.join(self.endpoints) or 'none'}")
        return self.endpoints[name]


class FakePlatform:
    """Orchestrator and one replica behind one address.

    Holds the endpoint `faq`, which serves `gguf/faq:prod`.
    """

    def __init__(self, settings: ServerSettings | None = None) -> None:
        self.runs = FakeRuns()
        self.artifacts = FakeArtifacts()
        self.endpoints = FakeEndpoints()
        self.inference = FakeInference()
        self.address = ""
        self._settings = settings or ServerSettings()
        self._server: rpc.Server | None = None

    async def start(self) -> str:
        """Serve; returns the address."""
        server = rpc.Server(self._settings, name="fake")
        server.add(self.runs, stubs.add_RunServiceServicer_to_server, "arriero.v1.RunService")
        server.add(
            self.artifacts,
            stubs.add_ArtifactServiceServicer_to_server,
            "arriero.v1.ArtifactService",
        )
        server.add(
            self.endpoints,
            stubs.add_EndpointServiceServicer_to_server,
            "arriero.v1.EndpointService",
        )
        server.add(
            self.inference,
            inference_pb2_grpc.add_InferenceServiceServicer_to_server,
            "arriero.v1.InferenceService",
        )
        self.address = await server.start()
        await server.set_ready(True)
        self._server = server
        if not self.artifacts.artifacts:
            golden = self.artifacts.put("report", "faq", {"report.json": b"{}"})
            report = {"rows": {"train": 150}, "encoded": {"truncated_rows": 2}}
            files = {"report.json": json.dumps(report).encode()}
            self.artifacts.put("report", "rows", files, tag="report/rows:v1")
            model = self.artifacts.put(
                "gguf", "faq", {"faq.Q8_0.gguf": b"GGUF"}, tag="gguf/faq:prod", golden=golden
            )
            self.endpoints.addresses = [self.address]
            self.endpoints.serve(pipeline_pb2.DeploySpec(endpoint="faq", model=model, replicas=1))
        return self.address

    async def stop(self) -> None:
        """Stop serving; `start` starts again with what is known."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None


@contextmanager
def running_platform(settings: ServerSettings | None = None) -> Iterator[FakePlatform]:
    """A platform on an event loop in a thread, for blocking tests."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fake-platform", daemon=True)
    thread.start()

    async def make() -> FakePlatform:
        platform = FakePlatform(settings)
        await platform.start()
        return platform

    platform = asyncio.run_coroutine_threadsafe(make(), loop).result(120)
    try:
        yield platform
    finally:
        asyncio.run_coroutine_threadsafe(platform.stop(), loop).result(120)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(120)
        loop.close()


def _planned(pipeline: pipeline_pb2.Pipeline) -> pb.Run:
    if not pipeline.name or not pipeline.stages:
        raise InvalidArgument.field("name", "expected a name and stages")
    run = pb.Run(pipeline=pipeline, owner=rpc.caller())
    for index, stage in enumerate(pipeline.stages):
        kind = stage.WhichOneof("work") or ""
        if kind == "train" and stage.train.lora.HasField("r") and stage.train.lora.r < 1:
            raise InvalidArgument.field(
                f"stages[{index}].train.lora.r", f"{stage.train.lora.r} is below 1"
            )
        run.stages.add(name=stage.name, kind=kind, state=pb.STAGE_STATE_PENDING)
    return run


def _move(run: pb.Run, state: pb.RunState.ValueType) -> None:
    run.state = state
    run.etag = str(int(run.etag or "0") + 1)
