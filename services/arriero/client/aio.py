"""The asyncio client: runs, artifacts, endpoints.

Responsibility: one method per thing that a caller may ask of the platform, with
deadlines, idempotent starts and errors of Arriero's own. Does not know how the
platform does it. Docs with runnable examples are on the sync face, `Client`.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from arriero import rpc
from arriero.client import transfer
from arriero.client.connection import FOLLOW_SECONDS, TRANSFER_SECONDS, Connection
from arriero.client.endpoint import AsyncEndpoint
from arriero.client.pipeline import PipelineFile, load_pipeline
from arriero.client.reading import word_for
from arriero.errors import ArrieroError, DeadlineExceeded, InvalidArgument, Unavailable
from arriero.settings import ClientSettings
from arriero.v1 import dataset_pb2, inference_pb2, pipeline_pb2
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import orchestrator_pb2_grpc as stubs

__all__ = ["ENDED", "AsyncArtifacts", "AsyncClient", "AsyncEndpoints", "Pipelines"]

Pipelines = pipeline_pb2.Pipeline | PipelineFile | str | PathLike[str]

ENDED = frozenset({pb.RUN_STATE_SUCCEEDED, pb.RUN_STATE_FAILED, pb.RUN_STATE_CANCELLED})

# Inside of classes with a method `list` that word means the method.
_Artifacts: TypeAlias = list[pb.Artifact]
_Problems: TypeAlias = list[str]
_Tags: TypeAlias = list[pb.Tag]
_Endpoints: TypeAlias = list[pb.Endpoint]

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


def _deploy_spec(
    name: str, model: str, replicas: int, settings: Mapping[str, Any]
) -> pipeline_pb2.DeploySpec:
    words = {
        field.name: {word: settings[field.name]}
        for field in pipeline_pb2.DeploySpec.DESCRIPTOR.fields
        if (word := word_for(field)) and isinstance(settings.get(field.name), str)
    }
    fields = {**settings, **words}
    try:
        return pipeline_pb2.DeploySpec(endpoint=name, model=model, replicas=replicas, **fields)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"no deployment can be set like that: {error}") from None


class AsyncArtifacts:
    """What the store holds; `AsyncClient.artifacts`.

    A `ref` is a digest, a unique prefix of one, or `kind/name:tag`.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def get(self, ref: str) -> pb.Artifact:
        """An artifact."""
        with rpc.translated():
            return (await self._stub.GetArtifact(pb.GetArtifactRequest(ref=ref))).artifact

    async def list(self, kind: str = "", limit: int = 1000) -> _Artifacts:
        """The newest artifacts, of one kind or of all."""
        found: list[pb.Artifact] = []
        token = ""
        while len(found) < limit:
            size = min(_PAGE, limit - len(found))
            request = pb.ListArtifactsRequest(kind=kind, page_size=size, page_token=token)
            with rpc.translated():
                page = await self._stub.ListArtifacts(request)
            found.extend(page.artifacts)
            token = page.next_page_token
            if not token:
                break
        return found[:limit]

    async def dataset_report(self, ref: str) -> dataset_pb2.DatasetReport:
        """What a stage `dataset` did to its rows: counts, lengths, samples, what was left out.

        Args:
            ref: the stage's output `report`.

        Raises:
            InvalidArgument: an artifact of another kind, or another stage's report.
        """
        request = pb.GetDatasetReportRequest(ref=ref)
        with rpc.translated():
            return (await self._stub.GetDatasetReport(request)).report

    async def lineage(self, ref: str) -> _Artifacts:
        """The artifact itself, then all that it was made from, nearest first."""
        with rpc.translated():
            return [*(await self._stub.GetLineage(pb.GetLineageRequest(ref=ref))).artifacts]

    async def tag(self, ref: str, tag: str, *, expected: str = "") -> str:
        """Point `kind/name:tag` at an artifact; returns its digest.

        Args:
            ref: what to tag.
            tag: `kind/name:tag`.
            expected: the digest that the tag must have now, `none` for a new tag;
                anything when empty.

        Raises:
            Aborted: the tag has another digest than `expected`.
            FailedPrecondition: the artifact is quarantined.
        """
        request = pb.TagArtifactRequest(ref=ref, tag=tag, expected_digest=expected)
        with rpc.translated():
            return (await self._stub.TagArtifact(request)).digest

    async def tags(self, kind: str = "") -> _Tags:
        """Tags, of one kind or of all."""
        with rpc.translated():
            return [*(await self._stub.ListTags(pb.ListTagsRequest(kind=kind))).tags]

    async def pull(
        self, ref: str, directory: Path, *, on_bytes: Callable[[int, int], None] | None = None
    ) -> pb.Artifact:
        """Copy an artifact's files into a new (or empty) directory, all or nothing.

        Every file's size and sha256 is verified.

        Args:
            ref: what to copy.
            directory: where to.
            on_bytes: called with bytes done and in all.

        Raises:
            FailedPrecondition: the directory has something in it.
            DataLoss: what arrived is not what the digests say.
        """
        return await transfer.pull(self._stub, ref, Path(directory), on_bytes)

    async def push(
        self,
        source: Path,
        *,
        kind: str,
        name: str,
        labels: Mapping[str, str] | None = None,
        tag: str = "",
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> pb.Artifact:
        """Publish a directory's files, or one file, as an artifact.

        Hidden files and directories stay behind.

        Args:
            source: directory or file.
            kind: `dataset`, `model`, `adapter`, `gguf` or `tokenizer`.
            name: recorded in the artifact.
            labels: recorded in the artifact.
            tag: `kind/name:tag` to set; none when empty.
            on_bytes: called with bytes done and in all.

        Raises:
            NotFound: there is no such directory or file.
            InvalidArgument: there is nothing in it.
        """
        header = pb.PushHeader(kind=kind, name=name, labels=labels, tag=tag)
        return await transfer.push(self._stub, Path(source), header, on_bytes)

    async def verify(
        self, ref: str, *, on_bytes: Callable[[int, int], None] | None = None
    ) -> _Problems:
        """Let the platform read every byte of an artifact again.

        Args:
            ref: what to verify.
            on_bytes: called with bytes done and in all.

        Returns:
            What differs from the manifest, a file each; empty when all is well.

        Raises:
            NotFound: no such artifact, or its files were collected.
            DataLoss: the manifest itself is damaged.
        """
        problems: _Problems = []
        request = pb.VerifyArtifactRequest(ref=ref)
        call = self._stub.VerifyArtifact(request, timeout=TRANSFER_SECONDS)
        try:
            with rpc.translated():
                async for message in call:
                    problems += message.problems
                    if on_bytes is not None:
                        on_bytes(message.bytes_done, message.bytes_total)
        finally:
            call.cancel()
        return problems

    async def gc(self, *, dry_run: bool = False) -> pb.CollectGarbageResponse:
        """Remove what no tag, endpoint or run holds; with `dry_run` list it alone."""
        with rpc.translated():
            return await self._stub.CollectGarbage(pb.CollectGarbageRequest(dry_run=dry_run))

    @property
    def _stub(self) -> stubs.ArtifactServiceAsyncStub:
        return stubs.ArtifactServiceStub(self._connection.channel)


class AsyncEndpoints:
    """What is served; `AsyncClient.endpoints`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def create(
        self, name: str, model: str, *, replicas: int = 1, **settings: Any
    ) -> pb.Endpoint:
        """Serve a gguf artifact under a new name.

        Args:
            name: of the endpoint.
            model: digest or reference of the gguf artifact.
            replicas: processes to serve it with.
            settings: further fields of a deploy stage: `context=8192`, `slots=8`,
                `rope="ntk"`, ...

        Raises:
            AlreadyExists: the name is in use; `update` replaces.
            FailedPrecondition: the artifact is quarantined.
        """
        spec = _deploy_spec(name, model, replicas, settings)
        with rpc.translated():
            answer = await self._stub.CreateEndpoint(pb.CreateEndpointRequest(spec=spec))
            return answer.endpoint

    async def update(
        self, name: str, model: str, *, replicas: int = 1, **settings: Any
    ) -> pb.Endpoint:
        """Replace what an endpoint serves, one replica after the other; as `create`."""
        spec = _deploy_spec(name, model, replicas, settings)
        with rpc.translated():
            answer = await self._stub.UpdateEndpoint(pb.UpdateEndpointRequest(spec=spec))
            return answer.endpoint

    async def get(self, name: str, *, score: bool = False) -> pb.Endpoint:
        """An endpoint; with `score` its live replicas are compared with the golden logits."""
        request = pb.GetEndpointRequest(name=name, score=score)
        with rpc.translated():
            return (await self._stub.GetEndpoint(request)).endpoint

    async def list(self) -> _Endpoints:
        """All endpoints."""
        with rpc.translated():
            return [*(await self._stub.ListEndpoints(pb.ListEndpointsRequest())).endpoints]

    async def scale(self, name: str, replicas: int) -> pb.Endpoint:
        """Set the number of replicas; `get` tells when ready equals desired."""
        request = pb.ScaleEndpointRequest(name=name, replicas=replicas)
        with rpc.translated():
            return (await self._stub.ScaleEndpoint(request)).endpoint

    async def add_adapter(
        self, name: str, adapter: str, *, called: str = "", scale: float = 1.0
    ) -> pb.Endpoint:
        """Load a LoRA adapter into every replica, while it serves.

        Args:
            name: of the endpoint.
            adapter: digest or reference of what `quantize` with `adapter_only` made.
            called: name that requests choose it by; default: the artifact's own.
            scale: its change of the model is multiplied by this.

        Raises:
            AlreadyExists: the name is another adapter's.
            FailedPrecondition: it belongs to another model.
        """
        spec = inference_pb2.AdapterSpec(adapter=adapter, name=called, scale=scale)
        request = pb.AddEndpointAdapterRequest(name=name, adapter=spec)
        with rpc.translated():
            return (await self._stub.AddEndpointAdapter(request)).endpoint

    async def remove_adapter(
        self, name: str, called: str, *, allow_missing: bool = False
    ) -> pb.Endpoint:
        """Take an adapter away from every replica; answers under way are finished."""
        request = pb.RemoveEndpointAdapterRequest(
            name=name, adapter=called, allow_missing=allow_missing
        )
        with rpc.translated():
            return (await self._stub.RemoveEndpointAdapter(request)).endpoint

    async def delete(self, name: str, *, allow_missing: bool = False) -> None:
        """Drain and remove the replicas, and the name."""
        request = pb.DeleteEndpointRequest(name=name, allow_missing=allow_missing)
        with rpc.translated():
            await self._stub.DeleteEndpoint(request)

    @property
    def _stub(self) -> stubs.EndpointServiceAsyncStub:
        return stubs.EndpointServiceStub(self._connection.channel)
