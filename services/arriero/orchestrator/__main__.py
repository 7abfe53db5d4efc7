"""The orchestrator's process: wiring alone.

Responsibility: from the environment to a served, recovered orchestrator, and
its orderly end. Does not know any of its parts' business.

Beside what `arriero.settings` reads: `ARRIERO_DATABASE_URL` (default SQLite under
`ARRIERO_HOME`), `ARRIERO_PLATFORM` (`local`), `ARRIERO_PLATFORM_DIR`,
`ARRIERO_<ROOM>_ADDRESS`, `ARRIERO_RETENTION_DAYS` (7), `ARRIERO_METRICS_LISTEN`,
`ARRIERO_METRICS_ADDRESS_FILE`.
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

from arriero import metrics
from arriero.errors import ArrieroError, InvalidArgument
from arriero.kubernetes import Api
from arriero.orchestrator.clients import Replicas, Rooms, addresses_from_env
from arriero.orchestrator.cluster import KubernetesPlatform
from arriero.orchestrator.endpoints import Endpoints
from arriero.orchestrator.platform import LocalPlatform
from arriero.orchestrator.records import Records
from arriero.orchestrator.runs import Runs
from arriero.orchestrator.service import register
from arriero.orchestrator.stamping import Stamp, Templates
from arriero.rpc import Server, logs
from arriero.rpc.certificates import not_after
from arriero.settings import (
    ClientSettings,
    ClusterSettings,
    ServerSettings,
    StoreSettings,
    home,
)
from arriero.store import Store
from arriero.store.disk import quota

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class OrchestratorSettings:
    """What this service alone reads from its environment."""

    database_url: str
    """`sqlite:///path` or a PostgreSQL URL; never on the store's volume."""
    platform: str
    """Where replicas run: `local` or `kubernetes`."""
    platform_dir: Path
    """Directory that is shared with the local supervisor."""
    retention_seconds: float
    """How long after its end a run's artifacts are kept from gc."""
    addresses: Mapping[str, str]
    """Address of each room."""

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> OrchestratorSettings:
        """Read the settings.

        Raises:
            InvalidArgument: a variable does not hold what it should.
        """
        env = os.environ if env is None else env
        platform = env.get("ARRIERO_PLATFORM") or "local"
        if platform not in ("local", "kubernetes"):
            raise InvalidArgument.field(
                "ARRIERO_PLATFORM", f"{platform!r} is not one of local, kubernetes"
            )
        days = env.get("ARRIERO_RETENTION_DAYS") or "7"
        if not days.replace(".", "", 1).isdigit():
            raise InvalidArgument.field("ARRIERO_RETENTION_DAYS", f"{days!r} is no number of days")
        url = env.get("ARRIERO_DATABASE_URL") or f"sqlite:///{home(env) / 'orchestrator.db'}"
        return cls(
            database_url=url,
            platform=platform,
            platform_dir=Path(env.get("ARRIERO_PLATFORM_DIR") or home(env) / "platform"),
            retention_seconds=float(days) * 24 * 3600,
            addresses=addresses_from_env(env),
        )


async def serve() -> None:
    """Run until SIGTERM, SIGINT or the supervisor's death."""
    settings = OrchestratorSettings.from_env()
    clients = ClientSettings.from_env()
    server = Server(ServerSettings.from_env(), name="orchestrator")
    store = Store.open(StoreSettings.from_env().url)
    with store.lock("orchestrator"):
        records = Records(settings.database_url)
        local = settings.platform == "local"
        platform = LocalPlatform(settings.platform_dir) if local else on_kubernetes()
        endpoints = Endpoints(records, store, platform, Replicas(clients))
        certificate = ServerSettings.from_env().tls_cert

        def limits() -> metrics.Limits:
            return metrics.Limits(quota(), not_after(certificate) if certificate else None)

        page = metrics.Metrics(
            CollectorRegistry(),
            endpoints=endpoints.figures,
            store_bytes=store.usage,
            limits=limits,
        )
        rooms = Rooms(settings.addresses, clients)
        runs = Runs(
            records,
            settings.database_url,
            store,
            rooms,
            endpoints,
            page,
            retention=settings.retention_seconds,
        )
        register(server, runs, endpoints, store)
        address, stop_metrics = metrics.serve(page.registry)
        _log.info("metrics at http://%s/metrics", address)
        endpoints.load()
        if isinstance(platform, KubernetesPlatform):
            await platform.start()
        await runs.open()
        try:
            await server.start()
            server.set_ready(True)
            await server.run_until_signal()
        finally:
            await runs.close()
            await endpoints.close()
            if isinstance(platform, KubernetesPlatform):
                await platform.close()
            await rooms.close()
            stop_metrics()
            records.close()


def on_kubernetes() -> KubernetesPlatform:
    """The cluster that this process is in.

    Raises:
        InvalidArgument, FailedPrecondition: settings or templates are wrong, or there
            is no cluster.
    """
    settings = ClusterSettings.from_env("ARRIERO_PLATFORM_DIR")
    templates = Templates.read(settings.directory)
    api = Api.connect(settings.namespace)
    owner = api.owner(settings.owner) if settings.owner else None
    return KubernetesPlatform(api, Stamp(templates, settings.release, owner))


def main() -> None:
    """`python -m arriero.orchestrator`."""
    logs.configure("orchestrator")
    try:
        asyncio.run(serve())
    except ArrieroError as error:
        _log.error("%s", error.message, extra={"reason": error.reason})
        sys.exit(1)


if __name__ == "__main__":
    main()
