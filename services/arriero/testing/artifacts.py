"""The artifact service in memory, behind real gRPC.

Responsibility: publish, find, tag, send and take artifacts as the real one answers.
Does not know a disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from google.protobuf import json_format

from arriero.errors import (
    Aborted,
    InvalidArgument,
    NotFound,
)
from arriero.v1 import dataset_pb2
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import orchestrator_pb2_grpc as stubs

__all__ = ["FakeArtifacts", "page"]

_CHUNK = 1024 * 1024


class FakeArtifacts(stubs.ArtifactServiceServicer):
    """A store in memory.

    Attributes:
        artifacts: by digest, oldest first.
        files: content by digest and path.
        tagged: digest by `kind/name:tag`.
        corrupt: send other bytes than the digests say, and find them when verifying.
    """

    def __init__(self) -> None:
        self.artifacts: dict[str, pb.Artifact] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.tagged: dict[str, str] = {}
        self.corrupt = False

    def put(
        self,
        kind: str,
        name: str,
        files: dict[str, bytes],
        *,
        tag: str = "",
        parents: Sequence[str] = (),
        golden: str = "",
    ) -> str:
        """Publish; returns the digest."""
        artifact = pb.Artifact(kind=kind, name=name, parents=parents, golden=golden, present=True)
        for path in sorted(files):
            data = files[path]
            artifact.files.add(
                path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
            )
        artifact.size_bytes = sum(map(len, files.values()))
        content = artifact.SerializeToString(deterministic=True)
        artifact.digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.artifacts[artifact.digest] = artifact
        self.files[artifact.digest] = dict(files)
        if tag:
            self.tagged[tag] = artifact.digest
        return artifact.digest

    async def GetArtifact(
        self, request: pb.GetArtifactRequest, context: Any
    ) -> pb.GetArtifactResponse:
        """By reference."""
        return pb.GetArtifactResponse(artifact=self._get(request.ref))

    async def ListArtifacts(
        self, request: pb.ListArtifactsRequest, context: Any
    ) -> pb.ListArtifactsResponse:
        """Newest first, in pages."""
        found = [a for a in self.artifacts.values() if request.kind in ("", a.kind)][::-1]
        items, token = page(found, request.page_size, request.page_token)
        return pb.ListArtifactsResponse(artifacts=items, next_page_token=token)

    async def GetDatasetReport(
        self, request: pb.GetDatasetReportRequest, context: Any
    ) -> pb.GetDatasetReportResponse:
        """As its file has it."""
        text = self.files[self._get(request.ref).digest]["report.json"]
        return pb.GetDatasetReportResponse(
            report=json_format.Parse(text, dataset_pb2.DatasetReport())
        )

    async def GetLineage(
        self, request: pb.GetLineageRequest, context: Any
    ) -> pb.GetLineageResponse:
        """Breadth first."""
        found = [self._get(request.ref)]
        for artifact in found:
            found += [self.artifacts[p] for p in artifact.parents if self.artifacts[p] not in found]
        return pb.GetLineageResponse(artifacts=found)

    async def TagArtifact(
        self, request: pb.TagArtifactRequest, context: Any
    ) -> pb.TagArtifactResponse:
        """Compare and set."""
        artifact = self._get(request.ref)
        now = self.tagged.get(request.tag, "none")
        if request.expected_digest not in ("", now):
            raise Aborted(f"{request.tag} is {now}, expected {request.expected_digest}")
        self.tagged[request.tag] = artifact.digest
        return pb.TagArtifactResponse(tag=request.tag, digest=artifact.digest)

    async def ListTags(self, request: pb.ListTagsRequest, context: Any) -> pb.ListTagsResponse:
        """Sorted by name."""
        return pb.ListTagsResponse(
            tags=[
                pb.Tag(tag=tag, digest=digest)
                for tag, digest in sorted(self.tagged.items())
                if not request.kind or tag.startswith(f"{request.kind}/")
            ]
        )

    async def CollectGarbage(
        self, request: pb.CollectGarbageRequest, context: Any
    ) -> pb.CollectGarbageResponse:
        """Removes what has no tag."""
        answer = pb.CollectGarbageResponse()
        for digest in [d for d in self.artifacts if d not in self.tagged.values()]:
            size = self.artifacts[digest].size_bytes
            answer.removals.add(path=f"artifacts/{digest}", size_bytes=size, reason="no tag")
            answer.freed_bytes += size
            if not request.dry_run:
                del self.artifacts[digest], self.files[digest]
        return answer

    async def PullArtifact(
        self, request: pb.PullArtifactRequest, context: Any
    ) -> AsyncIterator[pb.PullArtifactResponse]:
        """The artifact, then each file in chunks."""
        artifact = self._get(request.ref)
        yield pb.PullArtifactResponse(artifact=artifact)
        for path, data in self.files[artifact.digest].items():
            sent = data[::-1] if self.corrupt else data
            yield pb.PullArtifactResponse(path=path, chunk=sent[:_CHUNK])
            for start in range(_CHUNK, len(sent), _CHUNK):
                yield pb.PullArtifactResponse(chunk=sent[start : start + _CHUNK])

    async def VerifyArtifact(
        self, request: pb.VerifyArtifactRequest, context: Any
    ) -> AsyncIterator[pb.VerifyArtifactResponse]:
        """Half way, then the end."""
        artifact = self._get(request.ref)
        answer = pb.VerifyArtifactResponse(digest=artifact.digest, bytes_total=artifact.size_bytes)
        yield answer
        for file in artifact.files if self.corrupt else ():
            answer.problems.append(f"{file.path} has another sha256")
        answer.bytes_done, answer.done = artifact.size_bytes, True
        yield answer

    async def PushArtifact(
        self, request_iterator: AsyncIterator[pb.PushArtifactRequest], context: Any
    ) -> pb.PushArtifactResponse:
        """A header, then each file in chunks."""
        header = pb.PushHeader()
        files: dict[str, bytes] = {}
        path = ""
        async for request in request_iterator:
            if request.HasField("header"):
                header = request.header
                if header.kind not in (
                    "dataset",
                    "model",
                    "adapter",
                    "gguf",
                    "tokenizer",
                    "report",
                ):
                    raise InvalidArgument.field("header.kind", f"{header.kind!r} cannot be pushed")
            path = request.path or path
            if path:
                files[path] = files.get(path, b"") + request.chunk
        digest = self.put(header.kind, header.name, files, tag=header.tag)
        return pb.PushArtifactResponse(artifact=self.artifacts[digest])

    def _get(self, ref: str) -> pb.Artifact:
        digest = self.tagged.get(ref, ref)
        if digest not in self.artifacts:
            raise NotFound(f"no artifact {ref!r}")
        return self.artifacts[digest]


def page(items: list[Any], size: int, token: str) -> tuple[list[Any], str]:
    """A page of a list, and the token of the next (empty: none)."""
    start = int(token or 0)
    end = start + (size or 50)
    return items[start:end], str(end) if end < len(items) else ""
