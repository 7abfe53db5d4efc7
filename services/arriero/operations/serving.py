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
from arriero.operations.runner import Runner
from arriero.operations.service import JobServicer, OperationsServicer
from arriero.rpc import Server, logs
from arriero.settings import ClusterSettings, ServerSettings, SourceSettings, StoreSettings
from arriero.store import Store
from arriero.v1 import job_pb2_grpc

_log = logging.getLogger(__name__)

Register = Callable[[Server, Engine], None]


def serve(*, service: str, kinds: Sequence[WorkKind], register: Register) -> None:
    """Run a room's service until SIGTERM; settings come from the environment.

    Besides what the settings classes read: `ARRIERO_MAX_JOBS` (2; 16 on a cluster),
    the jobs that run at once; `ARRIERO_GPU_BUDGET` (0: no limit), the GPUs of all of
    them; `ARRIERO_MAX_JOBS_PER_OWNER` (0: no limit); `ARRIERO_RUNNER` (`local` or
    `kubernetes`), where jobs run, and `ARRIERO_RUNNER_DIR`, its templates.

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
    runner, advertised = _runner(service)
    with store.lock(service):
        engine = Engine(
            service=service,
            store=store,
            kinds=kinds,
            sources=SourceSettings.from_env(),
            runner=runner,
            max_jobs=_number("ARRIERO_MAX_JOBS", 2 if runner is None else 16, least=1),
            gpus=_number("ARRIERO_GPU_BUDGET", 0),
            per_owner=_number("ARRIERO_MAX_JOBS_PER_OWNER", 0),
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
        await engine.recover(_advertised(advertised, address) or _reachable(address))
        server.set_ready(True)
        await server.run_until_signal()
        await engine.close()


def _runner(service: str) -> tuple[Runner | None, str]:
    """Where jobs run (None: on this machine), and the address that they report to.

    Raises:
        InvalidArgument, FailedPrecondition: settings or templates are wrong, or there
            is no cluster.
    """
    where = os.environ.get("ARRIERO_RUNNER") or "local"
    if where == "local":
        return None, ""
    if where != "kubernetes":
        raise InvalidArgument.field("ARRIERO_RUNNER", f"{where!r} is not one of local, kubernetes")
    from arriero.kubernetes import Api
    from arriero.operations.cluster import KubernetesJobs
    from arriero.operations.profiles import Templates

    settings = ClusterSettings.from_env("ARRIERO_RUNNER_DIR")
    if not settings.advertise:
        raise InvalidArgument.field(
            "ARRIERO_ADVERTISE", "is not set; jobs report to the service's address in the cluster"
        )
    templates = Templates.read(settings.directory)
    api = Api.connect(settings.namespace)
    runner = KubernetesJobs(
        api,
        templates,
        room=service,
        owner=api.owner(settings.owner) if settings.owner else None,
        image=settings.image,
        start_seconds=_number("ARRIERO_JOB_START_SECONDS", 300, least=1),
    )
    return runner, settings.advertise


def _number(name: str, default: int, *, least: int = 0) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < least:
        raise InvalidArgument.field(name, f"{text!r} is not a number from {least} up")
    return int(text)


def _advertised(wanted: str, address: str) -> str:
    """Where jobs elsewhere find the server: as it was said, with its own port where none was."""
    return wanted if not wanted or ":" in wanted else f"{wanted}:{address.rpartition(':')[2]}"


def _reachable(address: str) -> str:
    """Where a job on this machine finds the server that listens on all addresses."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in ("0.0.0.0", "[::]") else address
