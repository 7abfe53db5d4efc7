"""The asyncio client: runs, and the way to artifacts and endpoints.

Responsibility: one method per thing that a caller may ask of the platform, with
deadlines, idempotent starts and errors of Arriero's own. Does not know how the
platform does it. Docs with runnable examples are on the sync face, `Client`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from os import PathLike
from types import TracebackType

from arriero import rpc
from arriero.client.artifacts import AsyncArtifacts
from arriero.client.connection import FOLLOW_SECONDS, Connection
from arriero.client.endpoint import AsyncEndpoint
from arriero.client.endpoints import AsyncEndpoints
from arriero.client.pipeline import PipelineFile, load_pipeline
from arriero.errors import ArrieroError, DeadlineExceeded, Unavailable
from arriero.settings import ClientSettings
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import orchestrator_pb2_grpc as stubs
from arriero.v1 import pipeline_pb2

__all__ = ["ENDED", "AsyncClient", "Pipelines"]

Pipelines = pipeline_pb2.Pipeline | PipelineFile | str | PathLike[str]

ENDED = frozenset({pb.RUN_STATE_SUCCEEDED, pb.RUN_STATE_FAILED, pb.RUN_STATE_CANCELLED})

# How long a watch looks for a platform that went away while it watched.
PATIENCE_SECONDS = 120.0
PREVIEW_SECONDS = 120.0
_PAGE = 100


class AsyncClient:
    """The platform, for asyncio.

    Belongs to the event loop that uses it first. Every method raises
    `arriero.errors.ArrieroError`; calls that may be sent again are, after
    UNAVAILABLE, for about three seconds.

    Args:
        address: `host:port` of the orchestrator; default: `ARRIERO_ADDRESS`, else
            the platform that `arriero up` runs on this machine.
        settings: credentials and default deadline; default: the environment's.

    Attributes:
        artifacts: what the store holds.
        endpoints: what is served.
    """

    def __init__(self, address: str | None = None, settings: ClientSettings | None = None) -> None:
        self._connection = Connection(address, settings)
        self.artifacts = AsyncArtifacts(self._connection)
        self.endpoints = AsyncEndpoints(self._connection)
        self._served: dict[str, AsyncEndpoint] = {}

    @property
    def address(self) -> str:
        """The orchestrator's address."""
        return self._connection.address

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection."""
        for served in self._served.values():
            await served.close()
        await self._connection.close()

    async def create_run(
        self,
        pipeline: Pipelines,
        *,
        request_id: str | None = None,
        validate_only: bool = False,
    ) -> pb.Run:
        """Start a run, or with `validate_only` get its plan.

        Args:
            pipeline: a message, a read file, or the path of a file.
            request_id: a second call with the same one gives the first one's run.
            validate_only: check, resolve and price; start nothing.

        Raises:
            InvalidArgument: the pipeline is wrong; for a file each violation says
                at which line and column.
            NotFound: a reference to no artifact, a source that does not exist.
            FailedPrecondition: an artifact that is quarantined.
        """
        file = _pipeline_file(pipeline)
        request = pb.CreateRunRequest(
            pipeline=file.pipeline,
            request_id=request_id or uuid.uuid4().hex,
            validate_only=validate_only,
        )
        try:
            with rpc.translated():
                return (await self._runs.CreateRun(request)).run
        except ArrieroError as error:
            raise file.explain(error) from None

    async def preview_stage(
        self, pipeline: Pipelines, *, stage: str = "", samples: int = 3, rows: int = 1000
    ) -> pb.PreviewStageResponse:
        """What a dataset stage would make of its first rows; nothing is stored.

        Args:
            pipeline: a message, a read file, or the path of a file.
            stage: its name; may be empty where there is only one.
            samples: rows to give token by token, at most 20.
            rows: to count over, at most 10,000, as many of each source.

        Raises:
            InvalidArgument: the pipeline is wrong, or has no such stage.
            FailedPrecondition: a stage before it has not run yet; says what to run.
        """
        file = _pipeline_file(pipeline)
        request = pb.PreviewStageRequest(
            pipeline=file.pipeline, stage=stage, samples=samples, rows=rows
        )
        try:
            with rpc.translated():
                return await self._runs.PreviewStage(request, timeout=PREVIEW_SECONDS)
        except ArrieroError as error:
            raise file.explain(error) from None

    async def get_run(self, run: str) -> pb.Run:
        """A run by its id."""
        with rpc.translated():
            return (await self._runs.GetRun(pb.GetRunRequest(id=run))).run

    async def list_runs(self, limit: int = 100) -> list[pb.Run]:
        """The newest runs, at most `limit`."""
        found: list[pb.Run] = []
        token = ""
        while len(found) < limit:
            size = min(_PAGE, limit - len(found))
            request = pb.ListRunsRequest(page_size=size, page_token=token)
            with rpc.translated():
                page = await self._runs.ListRuns(request)
            found.extend(page.runs)
            token = page.next_page_token
            if not token:
                break
        return found[:limit]

    async def cancel_run(self, run: str) -> pb.Run:
        """Stop a run; it is CANCELLED within seconds of the answer."""
        with rpc.translated():
            return (await self._runs.CancelRun(pb.CancelRunRequest(id=run))).run

    async def pause_run(self, run: str) -> pb.Run:
        """Hold a run: what runs saves and gives its resources back, no more starts."""
        with rpc.translated():
            return (await self._runs.PauseRun(pb.PauseRunRequest(id=run))).run

    async def resume_run(self, run: str) -> pb.Run:
        """Let a paused run go on from where it was held."""
        with rpc.translated():
            return (await self._runs.ResumeRun(pb.ResumeRunRequest(id=run))).run

    async def retry_run(
        self,
        run: str,
        *,
        request_id: str | None = None,
        waivers: Sequence[pb.GateWaiver] = (),
    ) -> pb.Run:
        """Start an ended run again from what failed or was cancelled.

        Args:
            run: its id.
            request_id: a second call with the same one starts nothing more.
            waivers: gates that failed and may be passed: of their stages the
                verdict alone is repeated.

        Raises:
            FailedPrecondition: it is active, or succeeded; no stage failed by a
                waived gate, or one failed by others too.
            InvalidArgument: a waiver without a reason, or of an unknown gate.
        """
        request = pb.RetryRunRequest(
            id=run, request_id=request_id or uuid.uuid4().hex, waivers=waivers
        )
        with rpc.translated():
            return (await self._runs.RetryRun(request)).run

    async def watch_run(self, run: str) -> AsyncGenerator[pb.Run, None]:
        """The run as it is, then again whenever it changed, until it has ended.

        Goes on after the platform was away for at most two minutes.

        Raises:
            NotFound: no such run.
            Unavailable: the platform is away, and stays away.
        """
        etag, state = "", pb.RUN_STATE_UNSPECIFIED
        heard, seen = time.monotonic(), False
        delay = 0.2
        while state not in ENDED:
            call = self._runs.WatchRun(pb.WatchRunRequest(id=run), timeout=FOLLOW_SECONDS)
            try:
                with rpc.translated():
                    async for answer in call:
                        seen, heard, delay = True, time.monotonic(), 0.2
                        state = answer.run.state
                        if not etag or answer.run.etag != etag:
                            etag = answer.run.etag
                            yield answer.run
                        if state in ENDED:
                            return
            except DeadlineExceeded:
                pass  # ours, after an hour: a healthy watch is opened anew
            except Unavailable:
                # What never answered is told at once: the caller may have the
                # address wrong, and gRPC has tried for three seconds.
                if not seen or time.monotonic() - heard > PATIENCE_SECONDS:
                    raise
            finally:
                call.cancel()
            if state not in ENDED:
                await asyncio.sleep(delay)
                delay = min(2 * delay, 2.0)

    async def wait(self, run: str, *, timeout: float | None = None) -> pb.Run:
        """The run once it has ended, however it did: look at `state` and `error`.

        Raises:
            DeadlineExceeded: it has not within `timeout` seconds.
        """
        last = pb.Run()
        try:
            async with asyncio.timeout(timeout), aclosing(self.watch_run(run)) as runs:
                async for update in runs:
                    last = update
        except TimeoutError:
            raise DeadlineExceeded(
                f"run {run} has not ended within {timeout} s; it goes on"
            ) from None
        return last

    async def logs(
        self, run: str, *, stage: str = "", follow: bool = False
    ) -> AsyncGenerator[pb.ReadRunLogsResponse, None]:
        """Log lines of a run, or of one stage of it; with `follow` until it ends."""
        request = pb.ReadRunLogsRequest(id=run, stage=stage, follow=follow)
        call = self._runs.ReadRunLogs(request, timeout=24 * FOLLOW_SECONDS)
        try:
            with rpc.translated():
                async for line in call:
                    yield line
        finally:
            call.cancel()

    def endpoint(self, name: str) -> AsyncEndpoint:
        """An endpoint to generate with; its replicas are looked up at the first request."""
        if name not in self._served:
            self._served[name] = AsyncEndpoint(name, self._connection)
        return self._served[name]

    @property
    def _runs(self) -> stubs.RunServiceAsyncStub:
        return stubs.RunServiceStub(self._connection.channel)


def _pipeline_file(pipeline: Pipelines) -> PipelineFile:
    if isinstance(pipeline, pipeline_pb2.Pipeline):
        return PipelineFile(pipeline, "pipeline")
    return pipeline if isinstance(pipeline, PipelineFile) else load_pipeline(pipeline)
