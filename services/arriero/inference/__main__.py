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

from prometheus_client import CollectorRegistry

from arriero import metrics, rpc
from arriero.errors import ArrieroError, InvalidArgument
from arriero.inference.files import adapter_file, gguf_file
from arriero.inference.frontend import EngineOptions, Frontend
from arriero.inference.service import InferenceServicer
from arriero.replica import ReplicaSettings
from arriero.settings import ServerSettings, StoreSettings
from arriero.store import Store
from arriero.v1 import inference_pb2_grpc

logger = logging.getLogger(__name__)

# A digest that a finished operation named may take this long to appear on NFS.
_STORE_WAIT_SECONDS = 60.0
_ENGINES = {
    "llama.cpp": "arriero.inference.engine",
    "transformers": "arriero.inference.checkpoint_engine",
}


@dataclass(frozen=True, slots=True)
class Served:
    """What is served under which name, read from `ARRIERO_MODEL` and `ARRIERO_MODEL_NAME`."""

    model: str
    """Reference or digest of a gguf artifact."""
    name: str
    """The endpoint's name."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Served:
        """Read it.

        Raises:
            InvalidArgument: no model.
        """
        env = os.environ if env is None else env
        if not env.get("ARRIERO_MODEL"):
            raise InvalidArgument.field("ARRIERO_MODEL", "is not set; expected a gguf artifact")
        return cls(env["ARRIERO_MODEL"], env.get("ARRIERO_MODEL_NAME") or "model")


async def serve() -> None:
    """Serve until SIGTERM.

    Raises:
        ArrieroError: the settings, the artifact or the model are not usable.
    """
    served, settings = Served.from_env(), ReplicaSettings.from_env()
    store = Store.open(StoreSettings.from_env().url)
    artifact = store.get(served.model, wait=_STORE_WAIT_SECONDS)
    server = rpc.Server(ServerSettings.from_env(), name=served.name)
    backend = settings.backend_of(artifact.manifest.kind)
    options = EngineOptions(
        gguf_file(artifact) if backend == "llama.cpp" else artifact.path,
        settings,
        tuple(
            adapter_file(store, item.adapter, item.name, item.scale, wait=_STORE_WAIT_SECONDS)
            for item in settings.adapters
        ),
        _ENGINES[backend],
    )
    frontend = Frontend(options, on_ready=server.set_ready)
    page = metrics.ReplicaMetrics(CollectorRegistry(), served.name, lambda: frontend.load)
    server.add(
        InferenceServicer(frontend, store, artifact, served.name, page),
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
