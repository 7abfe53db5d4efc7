"""Wiring of one replica: settings, store, engine, server.

Responsibility: start them and end them together. Does not know what they do.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry

from arriero import metrics, rpc
from arriero.errors import ArrieroError, InvalidArgument
from arriero.inference.frontend import EngineOptions, Frontend
from arriero.inference.service import InferenceServicer
from arriero.settings import ServerSettings, StoreSettings
from arriero.store import Artifact, Store
from arriero.v1 import inference_pb2_grpc

logger = logging.getLogger(__name__)

# A digest that a finished operation named may take this long to appear on NFS.
_STORE_WAIT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """What a replica serves, read from `ARRIERO_MODEL` and its neighbours."""

    model: str
    """Reference or digest of a gguf artifact."""
    name: str
    """The endpoint's name."""
    context: int = 0
    """Tokens per slot; 0 for the model's own."""
    slots: int = 4
    """Streams that run at the same time."""
    threads: int = 0
    """0 for what the machine grants, less one."""
    gpu_layers: int = 0
    """Layers to put on a GPU; -1 for all."""
    queue: int = 64
    """Requests that may wait for a slot; further ones are refused."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> ReplicaSettings:
        """Read the settings.

        Raises:
            InvalidArgument: no model, or a figure that is none.
        """
        env = os.environ if env is None else env
        if not env.get("ARRIERO_MODEL"):
            raise InvalidArgument.field("ARRIERO_MODEL", "is not set; expected a gguf artifact")

        def number(name: str, default: int) -> int:
            text = env.get(name) or str(default)
            try:
                return int(text)
            except ValueError:
                raise InvalidArgument.field(name, f"{text!r} is not a whole number") from None

        return cls(
            model=env["ARRIERO_MODEL"],
            name=env.get("ARRIERO_MODEL_NAME") or "model",
            context=number("ARRIERO_CONTEXT", 0),
            slots=number("ARRIERO_SLOTS", 4),
            threads=number("ARRIERO_THREADS", 0),
            gpu_layers=number("ARRIERO_GPU_LAYERS", 0),
            queue=number("ARRIERO_QUEUE", 64),
        )


async def serve() -> None:
    """Serve until SIGTERM.

    Raises:
        ArrieroError: the settings, the artifact or the model are not usable.
    """
    settings = ReplicaSettings.from_env()
    store = Store.open(StoreSettings.from_env().url)
    artifact = store.get(settings.model, wait=_STORE_WAIT_SECONDS)
    server = rpc.Server(ServerSettings.from_env(), name=settings.name)
    options = EngineOptions(
        path=gguf_file(artifact),
        context=settings.context,
        slots=settings.slots,
        threads=settings.threads,
        gpu_layers=settings.gpu_layers,
        queue=settings.queue,
    )
    frontend = Frontend(options, on_ready=server.set_ready)
    page = metrics.ReplicaMetrics(CollectorRegistry(), settings.name, lambda: frontend.load)
    server.add(
        InferenceServicer(frontend, store, artifact, settings.name, page),
        inference_pb2_grpc.add_InferenceServiceServicer_to_server,
        "arriero.v1.InferenceService",
    )
    shown, stop_metrics = metrics.serve(page.registry)
    address = await server.start()
    logger.info("serving %s at %s, metrics at http://%s/metrics", artifact.digest, address, shown)
    engine = asyncio.create_task(frontend.run())
    signal = asyncio.create_task(server.run_until_signal())
    try:
        await asyncio.wait({engine, signal}, return_when=asyncio.FIRST_COMPLETED)
        if engine.done():
            engine.result()
    finally:
        frontend.close()
        server.stop_soon()
        await asyncio.gather(signal, engine, return_exceptions=True)
        stop_metrics()


def gguf_file(artifact: Artifact) -> Path:
    """The GGUF file of an artifact.

    Raises:
        InvalidArgument: the artifact holds no such file.
    """
    files = [f.path for f in artifact.manifest.files if f.path.endswith(".gguf")]
    if artifact.manifest.kind != "gguf" or len(files) != 1:
        raise InvalidArgument.field(
            "ARRIERO_MODEL",
            f"{artifact.digest} is a {artifact.manifest.kind} with {len(files)} .gguf files; "
            "expected a gguf artifact with one",
        )
    return artifact.file(files[0])


def main() -> None:
    """Exit 1 with one line when the replica cannot serve."""
    rpc.logs.configure("inference")
    try:
        asyncio.run(serve())
    except ArrieroError as error:
        logger.error("%s", error.message)
        sys.exit(1)


if __name__ == "__main__":
    main()
