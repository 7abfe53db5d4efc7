"""A whole orchestrator in the test's own process, with fakes around it.

Responsibility: wire the real orchestrator to fake rooms and a fake supervisor,
in one directory. Does not know what a test does with it. DBOS allows one per
process at a time.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import TracebackType

from prometheus_client import CollectorRegistry

from arriero.metrics import Metrics
from arriero.orchestrator.clients import Replicas, Rooms
from arriero.orchestrator.endpoints import Endpoints
from arriero.orchestrator.platform import LocalPlatform
from arriero.orchestrator.records import ENDED_RUN, Records
from arriero.orchestrator.runs import Runs
from arriero.orchestrator.service import register
from arriero.rpc import Server
from arriero.settings import ClientSettings, ServerSettings
from arriero.store import Store
from arriero.testing.replicas import FakeSupervisor
from arriero.testing.rooms import FakeRooms
from arriero.v1 import orchestrator_pb2 as pb


class LocalOrchestrator:
    """Everything of one test; a context manager.

    Attributes:
        store, rooms, supervisor: what surrounds the orchestrator.
        runs, endpoints, registry: the orchestrator's own parts.
        address: where its services are.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.store = Store.open(directory / "store")
        self.rooms = FakeRooms(self.store)
        self.supervisor = FakeSupervisor(directory / "platform")
        self.address = ""

    async def __aenter__(self) -> LocalOrchestrator:
        await self.rooms.__aenter__()
        await self.supervisor.__aenter__()
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
        await self.supervisor.__aexit__()
        await self.rooms.__aexit__()

    async def open(self) -> None:
        """Start the orchestrator, as its process does."""
        url = f"sqlite:///{self._directory / 'orchestrator.db'}"
        settings = ClientSettings(timeout_seconds=60)
        self._records = Records(url)
        self.endpoints = Endpoints(
            self._records,
            self.store,
            LocalPlatform(self._directory / "platform"),
            Replicas(settings),
        )
        self.registry = CollectorRegistry()
        page = Metrics(
            self.registry, endpoints=self.endpoints.figures, store_bytes=self.store.usage
        )
        self._clients = Rooms(self.rooms.addresses, settings)
        self.runs = Runs(self._records, url, self.store, self._clients, self.endpoints, page)
        self._server = Server(ServerSettings(), name="orchestrator")
        register(self._server, self.runs, self.endpoints, self.store)
        self.endpoints.load()
        await self.runs.open()
        self.address = await self._server.start()

    async def close(self) -> None:
        """Stop it in order; `open` goes on where it was."""
        await self._server.stop(0)
        await self.runs.close()
        await self.endpoints.close()
        await self._clients.close()
        self._records.close()

    async def ended(self, run_id: str, *, timeout: float = 300) -> pb.Run:
        """The run at its end."""

        async def wait() -> pb.Run:
            run = pb.Run()
            async for run in self.runs.live(run_id).watch():
                if run.state in ENDED_RUN:
                    break
            return run

        return await asyncio.wait_for(wait(), timeout)
