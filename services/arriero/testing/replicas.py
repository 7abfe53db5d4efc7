"""A supervisor and its replicas as fakes.

Responsibility: read what the orchestrator desires and say that it is so, with
one real gRPC server that answers `Score` for every replica. Does not know
models: a test says what each artifact scores.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

from arriero.errors import FailedPrecondition
from arriero.rpc import Server
from arriero.settings import ServerSettings
from arriero.store import write_atomic
from arriero.v1 import inference_pb2, inference_pb2_grpc

HEALTHY = inference_pb2.ScoreResponse(
    kl_divergence=0.05, top1_agreement=0.9, tokens=256, confident_disagreements=0
)
WRONG_MODEL = inference_pb2.ScoreResponse(
    kl_divergence=6.0, top1_agreement=0.05, tokens=256, confident_disagreements=120
)


class FakeSupervisor:
    """Makes every desire true at once.

    Attributes:
        scores: by artifact digest; `HEALTHY` for those that are not named.
        broken: digests whose replicas fail to start.
        stuck: digests whose replicas never become ready.
        scored: goldens that were asked for.
        refused: adapters, by digest, that replicas refuse.
        adapters: that the replicas have, by name.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.scores: dict[str, inference_pb2.ScoreResponse] = {}
        self.broken: set[str] = set()
        self.stuck: set[str] = set()
        self.scored: list[str] = []
        self.refused: set[str] = set()
        self.adapters: dict[str, inference_pb2.AdapterSpec] = {}
        self._server = Server(ServerSettings(), name="replica")
        self._server.add(
            _Replica(self),  # type: ignore[abstract]  # `Score` is all that is asked of it
            inference_pb2_grpc.add_InferenceServiceServicer_to_server,
            "arriero.v1.InferenceService",
        )
        self._task: asyncio.Task[None] | None = None
        self._serving: dict[str, str] = {}

    async def __aenter__(self) -> FakeSupervisor:
        await self._server.start()
        self._task = asyncio.create_task(self._loop())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._server.stop(0)

    def desired(self, name: str) -> dict[str, Any] | None:
        """The endpoint's file, as the orchestrator wrote it."""
        path = self._directory / "desired" / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def answer(self, golden: str) -> inference_pb2.ScoreResponse:
        """What the newest desired artifact scores."""
        self.scored.append(golden)
        digests = [d for d in self._serving.values() if d in self.scores]
        return self.scores[digests[-1]] if digests else HEALTHY

    async def _loop(self) -> None:
        written: dict[str, str] = {}
        while True:
            for path in (self._directory / "desired").glob("*.json"):
                text = path.read_text()
                if written.get(path.name) == text:
                    continue
                written[path.name] = text
                self._make(json.loads(text))
            await asyncio.sleep(0.02)

    def _make(self, want: dict[str, Any]) -> None:
        digest = want["digest"]
        self._serving[want["name"]] = digest
        state, detail = "READY", ""
        if digest in self.broken:
            state, detail = "FAILED", "cannot load the file"
        elif digest in self.stuck:
            state = "STARTING"
        replicas = [
            {
                "name": f"{want['name']}-{digest[7:11]}-{i}",
                "address": self._server.address,
                "state": state,
                "digest": digest,
                "pid": 0,
                "detail": detail,
            }
            for i in range(want["replicas"])
        ]
        actual = self._directory / "actual"
        actual.mkdir(parents=True, exist_ok=True)
        data = {"name": want["name"], "replicas": replicas, "generation": want["generation"]}
        write_atomic(actual / f"{want['name']}.json", json.dumps(data).encode())


class _Replica(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, supervisor: FakeSupervisor) -> None:
        self._supervisor = supervisor

    async def Score(self, request: Any, _: Any) -> inference_pb2.ScoreResponse:
        return self._supervisor.answer(request.golden)

    async def LoadAdapter(self, request: Any, _: Any) -> inference_pb2.LoadAdapterResponse:
        if request.adapter.adapter in self._supervisor.refused:
            raise FailedPrecondition(f"adapter {request.adapter.name} does not fit this model")
        self._supervisor.adapters[request.adapter.name] = request.adapter
        return inference_pb2.LoadAdapterResponse()

    async def UnloadAdapter(self, request: Any, _: Any) -> inference_pb2.UnloadAdapterResponse:
        self._supervisor.adapters.pop(request.name, None)
        return inference_pb2.UnloadAdapterResponse()

    async def ListAdapters(self, _request: Any, _: Any) -> inference_pb2.ListAdaptersResponse:
        return inference_pb2.ListAdaptersResponse(adapters=self._supervisor.adapters.values())
