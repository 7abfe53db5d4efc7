"""Verifying: every byte of an artifact against its manifest, with progress.

Responsibility: run the store's check in a thread and tell how far it is. Does
not know gRPC calls, nor how the store keeps things.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator

from arriero.errors import Cancelled
from arriero.store import Store
from arriero.v1 import orchestrator_pb2 as pb

__all__ = ["verification"]

# How often it is told how far it is.
SECONDS = 0.5


async def verification(store: Store, ref: str) -> AsyncGenerator[pb.VerifyArtifactResponse, None]:
    """Progress twice a second, then the last message with every problem.

    A lease keeps the files from gc meanwhile. Closing the generator ends the
    reading at its next chunk.

    Raises:
        NotFound: no such artifact, or its files were collected.
        DataLoss: the manifest itself is damaged.
    """
    digest = await asyncio.to_thread(store.resolve, ref)
    manifest = await asyncio.to_thread(store.manifest, digest)
    gone = threading.Event()
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done = count
        if gone.is_set():
            raise Cancelled("nobody waits for the verification any more")

    def read() -> list[str]:
        with store.lease("verify", [digest]):
            return store.problems(digest, on_bytes)

    task = asyncio.create_task(asyncio.to_thread(read))
    try:
        while not (await asyncio.wait({task}, timeout=SECONDS))[0]:
            yield pb.VerifyArtifactResponse(
                digest=digest, bytes_done=done, bytes_total=manifest.size
            )
        yield pb.VerifyArtifactResponse(
            digest=digest,
            bytes_done=done,
            bytes_total=manifest.size,
            problems=await task,
            done=True,
        )
    finally:
        gone.set()
        await asyncio.gather(task, return_exceptions=True)
