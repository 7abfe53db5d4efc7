"""The whole main of a service that runs jobs.

Responsibility: from the environment to a served, recovered engine, and its
orderly end. Does not know what is registered beside it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Sequence

from google.longrunning import operations_pb2_grpc

from arriero.errors import ArrieroError, InvalidArgument
from arriero.operations.engine import Engine
from arriero.operations.kinds import WorkKind
from arriero.operations.service import JobServicer, OperationsServicer
from arriero.rpc import Server, logs
from arriero.settings import ServerSettings, SourceSettings, StoreSettings
from arriero.store import Store
from arriero.v1 import job_pb2_grpc

_log = logging.getLogger(__name__)

Register = Callable[[Server, Engine], None]


def serve(*, service: str, kinds: Sequence[WorkKind], register: Register) -> None:
    """Run a room's service until SIGTERM; settings come from the environment.

    Besides what the settings classes read: `ARRIERO_MAX_JOBS` (2), the jobs that
    run at once.

    Args:
        service: name of the service and of its records in the store.
        kinds: of work that it does.
        register: adds the room's own servicer to the server.
    """
    logs.configure(service)
    try:
        asyncio.run(_serve(service, kinds, register))
    except ArrieroError as error:
        _log.error("%s", error.message, extra={"reason": error.reason})
        sys.exit(1)


async def _serve(service: str, kinds: Sequence[WorkKind], register: Register) -> None:
    settings = ServerSettings.from_env()
    store = Store.open(StoreSettings.from_env().url)
    with store.lock(service):
        engine = Engine(
            service=service,
            store=store,
            kinds=kinds,
            sources=SourceSettings.from_env(),
            max_jobs=_max_jobs(),
            job_grace=settings.drain_seconds,
        )
        server = Server(settings, name=service)
        server.add(
            OperationsServicer(engine),
            operations_pb2_grpc.add_OperationsServicer_to_server,
            "google.longrunning.Operations",
        )
        server.add(
            JobServicer(engine),
            job_pb2_grpc.add_JobServiceServicer_to_server,
            "arriero.v1.JobService",
        )
        register(server, engine)
        address = await server.start()
        await engine.recover(_reachable(address))
        server.set_ready(True)
        await server.run_until_signal()
        await engine.close()


def _max_jobs() -> int:
    text = os.environ.get("ARRIERO_MAX_JOBS", "2")
    if not text.isdecimal() or int(text) < 1:
        raise InvalidArgument.field("ARRIERO_MAX_JOBS", f"{text!r} is not a number from 1 up")
    return int(text)


def _reachable(address: str) -> str:
    """Where a job on this machine finds the server that listens on all addresses."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]") else address
