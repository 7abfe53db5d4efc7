"""Artifacts' files over the wire, whole and verified.

Responsibility: pull into a directory and push from one. Does not know the store.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from arriero import rpc
from arriero.client.aside import Aside, check_room, explained
from arriero.client.connection import TRANSFER_SECONDS
from arriero.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from arriero.v1 import orchestrator_pb2 as pb

if TYPE_CHECKING:
    from arriero.v1.orchestrator_pb2_grpc import ArtifactServiceAsyncStub

__all__ = ["pull", "push"]

_CHUNK = 1024 * 1024

OnBytes = Callable[[int, int], None] | None


async def pull(
    stub: ArtifactServiceAsyncStub, ref: str, directory: Path, on_bytes: OnBytes
) -> pb.Artifact:
    """See `AsyncArtifacts.pull`."""
    directory = directory.resolve()
    with explained(directory):
        aside = await asyncio.to_thread(Aside, directory)
        try:
            call = stub.PullArtifact(pb.PullArtifactRequest(ref=ref), timeout=TRANSFER_SECONDS)
            try:
                receiver = _Receiver(aside.path, on_bytes)
                with rpc.translated():
                    async for message in call:
                        await asyncio.to_thread(receiver.take, message)
            finally:
                call.cancel()
            artifact = await asyncio.to_thread(receiver.finish)
            aside.arrive()
        finally:
            await asyncio.to_thread(aside.remove)
    return artifact


class _Receiver:
    """Writes what arrives; refuses what the artifact does not list."""

    def __init__(self, root: Path, on_bytes: OnBytes) -> None:
        self._root = root
        self._on_bytes = on_bytes
        self._artifact: pb.Artifact | None = None
        self._expected: dict[str, pb.ArtifactFile] = {}
        self._path = ""
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._done = 0

    def take(self, message: pb.PullArtifactResponse) -> None:
        """One message of the stream."""
        if message.HasField("artifact"):
            self._artifact = message.artifact
            self._expected = {file.path: file for file in message.artifact.files}
            check_room(self._root, message.artifact.size_bytes)
        if message.path:
            self._close()
            if message.path not in self._expected or not _is_safe(message.path):
                raise DataLoss(f"file {message.path!r} is none of the artifact's")
            path = self._root / message.path
            path.parent.mkdir(parents=True, exist_ok=True)
            self._path, self._file, self._hash = message.path, path.open("xb"), hashlib.sha256()
        if message.chunk:
            if self._file is None:
                raise DataLoss("bytes arrived before the name of their file")
            self._file.write(message.chunk)
            self._hash.update(message.chunk)
            self._done += len(message.chunk)
            if self._on_bytes and self._artifact:
                self._on_bytes(self._done, self._artifact.size_bytes)

    def finish(self) -> pb.Artifact:
        """Everything has arrived, or DataLoss."""
        self._close()
        if self._artifact is None or self._expected:
            missing = ", ".join(self._expected) or "everything"
            raise DataLoss(f"the transfer ended early; missing: {missing}")
        return self._artifact

    def _close(self) -> None:
        if self._file is None:
            return
        size = self._file.tell()
        self._file.close()
        self._file = None
        expected = self._expected.pop(self._path)
        if size != expected.size_bytes or self._hash.hexdigest() != expected.sha256:
            raise DataLoss(
                f"{self._path} arrived with {size} bytes and sha256 {self._hash.hexdigest()}; "
                f"expected {expected.size_bytes} bytes and {expected.sha256}"
            )


async def push(
    stub: ArtifactServiceAsyncStub, source: Path, header: pb.PushHeader, on_bytes: OnBytes
) -> pb.Artifact:
    """See `AsyncArtifacts.push`."""
    files = await asyncio.to_thread(_files, source)
    header.size_bytes = sum(path.stat().st_size for _, path in files)
    failure: list[OSError] = []

    async def requests() -> AsyncIterator[pb.PushArtifactRequest]:
        done = 0
        yield pb.PushArtifactRequest(header=header)
        try:
            for name, path in files:
                with path.open("rb") as file:
                    chunk = await asyncio.to_thread(file.read, _CHUNK)
                    yield pb.PushArtifactRequest(path=name, chunk=chunk)
                    while chunk:
                        done += len(chunk)
                        if on_bytes:
                            on_bytes(done, header.size_bytes)
                        chunk = await asyncio.to_thread(file.read, _CHUNK)
                        if chunk:
                            yield pb.PushArtifactRequest(chunk=chunk)
        except OSError as error:
            # gRPC would cancel the call and swallow why.
            failure.append(error)
            call.cancel()

    call = stub.PushArtifact(requests(), timeout=TRANSFER_SECONDS)
    try:
        with rpc.translated():
            return (await call).artifact
    except BaseException:
        call.cancel()
        if failure:
            raise FailedPrecondition(f"{source} cannot be read: {failure[0]}") from failure[0]
        raise


def _files(source: Path) -> list[tuple[str, Path]]:
    """Relative names and paths, sorted; links to files are followed."""
    if source.is_file():
        return [(source.name, source)]
    if not source.is_dir():
        raise NotFound(f"{source} is neither a directory nor a file")
    found = [
        (path.relative_to(source).as_posix(), path)
        for path in sorted(source.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(source).parts)
    ]
    if not found:
        raise InvalidArgument.field("source", f"{source} holds no files (hidden ones left out)")
    return found


def _is_safe(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name
