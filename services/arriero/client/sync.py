"""The blocking client: the asyncio client on a loop of its own, in a thread.

Responsibility: a sync face for each method, no logic. Does not know gRPC: one
implementation serves both faces, so that retries, reconnects and the choice of
replicas behave alike, and a blocked caller can still be interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from arriero.client.aio import AsyncClient, Pipelines
from arriero.client.artifacts import AsyncArtifacts
from arriero.client.endpoints import AsyncEndpoints
from arriero.client.loop import LoopThread
from arriero.client.sync_endpoint import Endpoint
from arriero.settings import ClientSettings
from arriero.v1 import dataset_pb2
from arriero.v1 import orchestrator_pb2 as pb

__all__ = ["Artifacts", "Client", "Endpoints"]

_Artifacts: TypeAlias = list[pb.Artifact]
_Problems: TypeAlias = list[str]
_Tags: TypeAlias = list[pb.Tag]
_Endpoints: TypeAlias = list[pb.Endpoint]
OnBytes = Callable[[int, int], None]


class Client:
    """The platform, for blocking code. Safe to share between threads.

    Args:
        address: `host:port` of the orchestrator; default: `ARRIERO_ADDRESS`, else
            the platform that `arriero up` runs on this machine.
        settings: credentials and default deadline; default: the environment's.

    Attributes:
        artifacts: what the store holds.
        endpoints: what is served.

    Every method raises `arriero.errors.ArrieroError`.

    Examples:
        >>> from arriero.client import Client
        >>> client = Client()
        >>> run = client.create_run("faq.yaml")
        >>> for update in client.watch_run(run.id):
        ...     print(RunState.Name(update.state))
        RUN_STATE_RUNNING
        RUN_STATE_SUCCEEDED
        >>> for delta in client.endpoint("faq").chat("What is an arriero?", max_tokens=6):
        ...     print(delta, end="")
        A driver of pack llamas.
        >>> client.close()
    """

    def __init__(self, address: str | None = None, settings: ClientSettings | None = None) -> None:
        self._thread = LoopThread()
        self._client = AsyncClient(address, settings)
        self.artifacts = Artifacts(self._client.artifacts, self._thread)
        self.endpoints = Endpoints(self._client.endpoints, self._thread)

    @property
    def address(self) -> str:
        """The orchestrator's address."""
        return self._client.address

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection; calls in other threads end with an error."""
        if self._thread.used:
            self._thread.run(self._client.close())
        self._thread.stop()

    def create_run(
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

        Examples:
            >>> with Client() as client:
            ...     plan = client.create_run("faq.yaml", validate_only=True)
            >>> [stage.name for stage in plan.stages]
            ['base', 'rows', 'sft']

            With overrides:

            >>> file = load_pipeline("faq.yaml", overrides=["stages.sft.lora.r=16"])
            >>> with Client() as client:
            ...     run = client.create_run(file, request_id="nightly-2026-02-01")
            >>> run.pipeline.stages[2].train.lora.r
            16
        """
        return self._thread.run(
            self._client.create_run(pipeline, request_id=request_id, validate_only=validate_only)
        )

    def preview_stage(
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
        return self._thread.run(
            self._client.preview_stage(pipeline, stage=stage, samples=samples, rows=rows)
        )

    def get_run(self, run: str) -> pb.Run:
        """A run by its id."""
        return self._thread.run(self._client.get_run(run))

    def list_runs(self, limit: int = 100) -> list[pb.Run]:
        """The newest runs, at most `limit`."""
        return self._thread.run(self._client.list_runs(limit))

    def cancel_run(self, run: str) -> pb.Run:
        """Stop a run; it is CANCELLED within seconds of the answer."""
        return self._thread.run(self._client.cancel_run(run))

    def pause_run(self, run: str) -> pb.Run:
        """Hold a run: what runs saves and gives its resources back, no more starts."""
        return self._thread.run(self._client.pause_run(run))

    def resume_run(self, run: str) -> pb.Run:
        """Let a paused run go on from where it was held."""
        return self._thread.run(self._client.resume_run(run))

    def retry_run(
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
            waivers: gates that failed and may be passed, each with its reason:
                of their stages the verdict alone is repeated.

        Raises:
            FailedPrecondition: it is active, or succeeded; no stage failed by a
                waived gate, or one failed by others too.
            InvalidArgument: a waiver without a reason, or of an unknown gate.
        """
        return self._thread.run(self._client.retry_run(run, request_id=request_id, waivers=waivers))

    def watch_run(self, run: str) -> Iterator[pb.Run]:
        """The run as it is, then again whenever it changed, until it has ended.

        Goes on after the platform was away for at most two minutes.

        Raises:
            NotFound: no such run.
            Unavailable: the platform is away, and stays away.
        """
        return self._thread.each(self._client.watch_run(run))

    def wait(self, run: str, *, timeout: float | None = None) -> pb.Run:
        """The run once it has ended, however it did: look at `state` and `error`.

        Raises:
            DeadlineExceeded: it has not within `timeout` seconds.

        Examples:
            >>> with Client() as client:
            ...     run = client.wait(client.create_run("faq.yaml").id, timeout=60)
            >>> RunState.Name(run.state)
            'RUN_STATE_SUCCEEDED'
        """
        return self._thread.run(self._client.wait(run, timeout=timeout))

    def logs(
        self, run: str, *, stage: str = "", follow: bool = False
    ) -> Iterator[pb.ReadRunLogsResponse]:
        """Log lines of a run, or of one stage of it; with `follow` until it ends.

        Examples:
            >>> with Client() as client:
            ...     run = client.create_run("faq.yaml")
            ...     for line in client.logs(run.id, stage="sft"):
            ...         print(line.level, line.message)
            INFO sft starts
            INFO sft is done
        """
        return self._thread.each(self._client.logs(run, stage=stage, follow=follow))

    def endpoint(self, name: str) -> Endpoint:
        """An endpoint to generate with; its replicas are looked up at the first request."""
        return Endpoint(self._client.endpoint(name), self._thread)


class Artifacts:
    """What the store holds; `Client.artifacts`.

    A `ref` is a digest, a unique prefix of one, or `kind/name:tag`.

    Examples:
        >>> with Client() as client:
        ...     pushed = client.artifacts.push("rows", kind="dataset", name="faq")
        ...     client.artifacts.tag(pushed.digest, "dataset/faq:v1", expected="none")
        ...     again = client.artifacts.pull("dataset/faq:v1", "copy")
        'sha256:...'
        >>> again.digest == pushed.digest
        True
    """

    def __init__(self, artifacts: AsyncArtifacts, thread: LoopThread) -> None:
        self._artifacts = artifacts
        self._thread = thread

    def get(self, ref: str) -> pb.Artifact:
        """An artifact."""
        return self._thread.run(self._artifacts.get(ref))

    def list(self, kind: str = "", limit: int = 1000) -> _Artifacts:
        """The newest artifacts, of one kind or of all."""
        return self._thread.run(self._artifacts.list(kind, limit))

    def dataset_report(self, ref: str) -> dataset_pb2.DatasetReport:
        """What a stage `dataset` did to its rows: counts, lengths, samples, what was left out.

        Args:
            ref: the stage's output `report`.

        Raises:
            InvalidArgument: an artifact of another kind, or another stage's report.

        Examples:
            >>> with Client() as client:
            ...     report = client.artifacts.dataset_report("report/rows:v1")
            >>> report.rows.train, report.encoded.truncated_rows
            (150, 2)
        """
        return self._thread.run(self._artifacts.dataset_report(ref))

    def lineage(self, ref: str) -> _Artifacts:
        """The artifact itself, then all that it was made from, nearest first."""
        return self._thread.run(self._artifacts.lineage(ref))

    def tag(self, ref: str, tag: str, *, expected: str = "") -> str:
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
        return self._thread.run(self._artifacts.tag(ref, tag, expected=expected))

    def tags(self, kind: str = "") -> _Tags:
        """Tags, of one kind or of all."""
        return self._thread.run(self._artifacts.tags(kind))

    def pull(
        self, ref: str, directory: str | Path, *, on_bytes: OnBytes | None = None
    ) -> pb.Artifact:
        """Copy an artifact's files into a new (or empty) directory, all or nothing.

        Every file's size and sha256 is verified.

        Args:
            ref: what to copy.
            directory: where to.
            on_bytes: called with bytes done and in all, from another thread.

        Raises:
            FailedPrecondition: the directory has something in it.
            DataLoss: what arrived is not what the digests say.
        """
        return self._thread.run(self._artifacts.pull(ref, Path(directory), on_bytes=on_bytes))

    def push(
        self,
        source: str | Path,
        *,
        kind: str,
        name: str,
        labels: Mapping[str, str] | None = None,
        tag: str = "",
        on_bytes: OnBytes | None = None,
    ) -> pb.Artifact:
        """Publish a directory's files, or one file, as an artifact.

        Hidden files and directories stay behind.

        Args:
            source: directory or file.
            kind: `dataset`, `model`, `adapter`, `gguf` or `tokenizer`.
            name: recorded in the artifact.
            labels: recorded in the artifact.
            tag: `kind/name:tag` to set; none when empty.
            on_bytes: called with bytes done and in all, from another thread.

        Raises:
            NotFound: there is no such directory or file.
            InvalidArgument: there is nothing in it.
        """
        return self._thread.run(
            self._artifacts.push(
                Path(source), kind=kind, name=name, labels=labels, tag=tag, on_bytes=on_bytes
            )
        )

    def verify(self, ref: str, *, on_bytes: OnBytes | None = None) -> _Problems:
        """Let the platform read every byte of an artifact again.

        Args:
            ref: what to verify.
            on_bytes: called with bytes done and in all, from another thread.

        Returns:
            What differs from the manifest, a file each; empty when all is well.

        Raises:
            NotFound: no such artifact, or its files were collected.
            DataLoss: the manifest itself is damaged.
        """
        return self._thread.run(self._artifacts.verify(ref, on_bytes=on_bytes))

    def gc(self, *, dry_run: bool = False) -> pb.CollectGarbageResponse:
        """Remove what no tag, endpoint or run holds; with `dry_run` list it alone."""
        return self._thread.run(self._artifacts.gc(dry_run=dry_run))


class Endpoints:
    """What is served; `Client.endpoints`.

    Examples:
        >>> with Client() as client:
        ...     made = client.endpoints.create("small", "gguf/faq:prod")
        ...     client.endpoints.scale("small", 2).desired_replicas
        ...     [endpoint.name for endpoint in client.endpoints.list()]
        ...     client.endpoints.delete("small")
        2
        ['faq', 'small']
    """

    def __init__(self, endpoints: AsyncEndpoints, thread: LoopThread) -> None:
        self._endpoints = endpoints
        self._thread = thread

    def create(self, name: str, model: str, *, replicas: int = 1, **settings: Any) -> pb.Endpoint:
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
        return self._thread.run(self._endpoints.create(name, model, replicas=replicas, **settings))

    def update(self, name: str, model: str, *, replicas: int = 1, **settings: Any) -> pb.Endpoint:
        """Replace what an endpoint serves, one replica after the other; as `create`.

        Replicas and settings that are not given take their defaults, not what they were.
        """
        return self._thread.run(self._endpoints.update(name, model, replicas=replicas, **settings))

    def get(self, name: str, *, score: bool = False) -> pb.Endpoint:
        """An endpoint; with `score` its live replicas are compared with the golden logits."""
        return self._thread.run(self._endpoints.get(name, score=score))

    def list(self) -> _Endpoints:
        """All endpoints."""
        return self._thread.run(self._endpoints.list())

    def scale(self, name: str, replicas: int) -> pb.Endpoint:
        """Set the number of replicas; `get` tells when ready equals desired."""
        return self._thread.run(self._endpoints.scale(name, replicas))

    def add_adapter(
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
        return self._thread.run(
            self._endpoints.add_adapter(name, adapter, called=called, scale=scale)
        )

    def remove_adapter(self, name: str, called: str, *, allow_missing: bool = False) -> pb.Endpoint:
        """Take an adapter away from every replica; answers under way are finished."""
        return self._thread.run(
            self._endpoints.remove_adapter(name, called, allow_missing=allow_missing)
        )

    def delete(self, name: str, *, allow_missing: bool = False) -> None:
        """Drain and remove the replicas, and the name."""
        self._thread.run(self._endpoints.delete(name, allow_missing=allow_missing))
