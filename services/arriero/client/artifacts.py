"""Artifacts, asyncio: look up, tag, pull, push, verify, collect.

Responsibility: one method per thing that a caller may ask of the store, by the
orchestrator. Does not know how files travel, nor what is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from arriero import rpc
from arriero.client import transfer
from arriero.client.connection import TRANSFER_SECONDS, Connection
from arriero.v1 import dataset_pb2
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import orchestrator_pb2_grpc as stubs

__all__ = ["AsyncArtifacts"]

# Inside of the class `list` means its method.
_Artifacts: TypeAlias = list[pb.Artifact]
_Problems: TypeAlias = list[str]
_Tags: TypeAlias = list[pb.Tag]

_PAGE = 100


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
