"""Runs as callers see them: planned, previewed, created, listed, cancelled, retried.

Responsibility: what may be asked of runs, and when it is refused. Does not know
how a run gets from one state to the next (`driving`, `cancelling`).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from arriero.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from arriero.metrics import Metrics
from arriero.orchestrator import previews, waiving
from arriero.orchestrator.clients import Rooms
from arriero.orchestrator.driving import Driver
from arriero.orchestrator.endpoints import Endpoints
from arriero.orchestrator.ledger import Ledger, new_record
from arriero.orchestrator.live import LiveRun
from arriero.orchestrator.logs import read_logs
from arriero.orchestrator.planning import Planner
from arriero.orchestrator.records import Records
from arriero.store import Store
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import pipeline_pb2

RETENTION_SECONDS = 7 * 24 * 3600.0
_DEFAULT_PAGE, _MAX_PAGE = 50, 500


class Runs:
    """The runs of one orchestrator; used from its event loop alone.

    Args:
        records: where runs are remembered.
        database_url: DBOS's database.
        store: for references, tags and pins.
        rooms: who does the stages.
        endpoints: where deploy stages deploy to.
        metrics: what is counted.
        retention: seconds after its end for which a run's artifacts are kept.
    """

    def __init__(
        self,
        records: Records,
        database_url: str,
        store: Store,
        rooms: Rooms,
        endpoints: Endpoints,
        metrics: Metrics,
        *,
        retention: float = RETENTION_SECONDS,
    ) -> None:
        self._ledger = Ledger(records, store, metrics, retention)
        self._store = store
        self._rooms = rooms
        self._planner = Planner(rooms, endpoints.check)
        self._driver = Driver(self._ledger, database_url, rooms, endpoints)

    async def open(self) -> None:
        """Recover: every active run goes on where it was.

        Raises:
            FailedPrecondition: the database cannot be used.
        """
        await self._driver.open()

    async def close(self) -> None:
        """Stop waiting; operations go on, and `open` attaches to them again."""
        await self._driver.close()

    async def plan(self, pipeline: pipeline_pb2.Pipeline, *, owner: str) -> pb.Run:
        """What `create` would start: no id, and each stage as far as it is known.

        Raises:
            InvalidArgument, NotFound, FailedPrecondition: as `create`.
            Unavailable: a service is away, so that its stages are not known.
        """
        graph, references = await self._ledger.check(pipeline)
        stages = await self._planner.plan(graph, references, owner=owner, strict=True)
        return pb.Run(pipeline=pipeline, stages=stages, owner=owner)

    async def preview(
        self, request: pb.PreviewStageRequest, *, owner: str
    ) -> pb.PreviewStageResponse:
        """What a dataset stage would make of its first rows; see `previews.preview`."""
        graph, references = await self._ledger.check(request.pipeline)
        return await previews.preview(
            request, graph, references, self._planner, self._rooms, owner=owner
        )

    async def create(
        self, pipeline: pipeline_pb2.Pipeline, *, request_id: str, owner: str
    ) -> pb.Run:
        """Check a pipeline and start it; the same `request_id` gives the same run.

        Raises:
            InvalidArgument: everything that is wrong, by field path.
            NotFound: a reference to no artifact.
            FailedPrecondition: a quarantined artifact.
            AlreadyExists: `request_id` was used for another pipeline.
        """
        digest = hashlib.sha256(pipeline.SerializeToString(deterministic=True)).hexdigest()
        known = self._by_request(request_id, digest)
        if known is not None:
            return known
        graph, references = await self._ledger.check(pipeline)
        # What a room would refuse is refused now; one that is away is asked later.
        await self._planner.plan(graph, references, owner=owner, strict=False)
        record = new_record(pipeline, graph, references, request_id, digest, owner)
        try:
            live = await self._ledger.create(record)
        except AlreadyExists:
            known = self._by_request(request_id, digest)
            if known is None:
                raise
            return known
        await self._driver.start(live)
        return live.record.seen()

    def _by_request(self, request_id: str, digest: str) -> pb.Run | None:
        known = self._ledger.records.run_by_request(request_id) if request_id else None
        if known is None:
            return None
        if known.request_digest != digest:
            raise AlreadyExists(
                f"request_id {request_id!r} started run {known.run.id} of another pipeline; "
                "take a new request_id"
            )
        return self.get(known.run.id)

    def get(self, run_id: str) -> pb.Run:
        """A run as it is now.

        Raises:
            NotFound: no such run.
        """
        return self._ledger.of(run_id).record.seen()

    def list(self, size: int, token: str) -> tuple[list[pb.Run], str]:
        """A page of runs, newest first, and the next page's token (empty: none).

        Raises:
            InvalidArgument: not a token of ours, or a negative size.
        """
        if size < 0:
            raise InvalidArgument.field("page_size", f"{size} is below 0")
        if token and not token.isdigit():
            raise InvalidArgument.field("page_token", f"{token!r} is not a page token")
        found, following = self._ledger.list(
            min(size or _DEFAULT_PAGE, _MAX_PAGE), int(token) if token else None
        )
        return found, str(following) if following is not None else ""

    def live(self, run_id: str) -> LiveRun:
        """A run to be watched.

        Raises:
            NotFound: no such run.
        """
        return self._ledger.of(run_id)

    async def cancel(self, run_id: str) -> pb.Run:
        """Stop what runs, start no more; CANCELLED within seconds.

        Raises:
            NotFound: no such run.
        """
        live = self._ledger.of(run_id)
        self._driver.cancellations.request(live)
        return live.record.seen()

    async def pause(self, run_id: str, *, paused: bool) -> pb.Run:
        """Hold a run, or let it go on; operations follow as they are heard of.

        Raises:
            NotFound: no such run.
            FailedPrecondition: it has ended.
        """
        live = self._ledger.of(run_id)
        self._driver.pauses.request(live, paused=paused)
        return live.record.seen()

    async def retry(
        self,
        run_id: str,
        *,
        request_id: str,
        waivers: Sequence[pb.GateWaiver] = (),
        who: str = "local",
    ) -> pb.Run:
        """Start again what did not succeed; of waived stages the verdict alone is repeated.

        Raises:
            NotFound: no such run.
            FailedPrecondition: it is active, or nothing is left to do, or a gate
                that is waived did not fail.
            InvalidArgument: a waiver without a reason, of no such gate or stage.
        """
        live = self._ledger.of(run_id)
        record = live.record
        if request_id and request_id in record.rounds[1:]:
            return record.seen()
        if not record.ended:
            raise FailedPrecondition(
                f"run {run_id} is active; cancel it first, or wait for its end"
            )
        if record.run.state == pb.RUN_STATE_SUCCEEDED:
            raise FailedPrecondition(f"run {run_id} succeeded; there is nothing to retry")
        waived = waiving.check(record.run, waivers)
        if waived:
            await asyncio.to_thread(waiving.waive, self._store, record.run, waived, who)
            if not record.ended:  # somebody else was faster
                raise FailedPrecondition(f"run {run_id} was started again meanwhile; watch it")
        live = await self._ledger.begin_round(live, request_id, waived, who)
        await self._driver.start(live)
        return record.seen()

    async def logs(
        self, run_id: str, stage: str, *, follow: bool
    ) -> AsyncIterator[tuple[str, Any]]:
        """Log lines of a run's stages, each with its stage's name.

        Raises:
            NotFound: no such run, or no such stage in it.
        """
        live = self._ledger.of(run_id)
        names = [s.name for s in live.record.run.stages]
        if stage and stage not in names:
            raise NotFound(f"run {run_id} has no stage {stage!r}; stages: {', '.join(names)}")
        async for name, line in read_logs(
            self._rooms, live, [stage] if stage else names, follow=follow
        ):
            yield name, line
