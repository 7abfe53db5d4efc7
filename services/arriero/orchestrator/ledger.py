"""What is known of runs: in memory, in the database, in pins and in metrics.

Responsibility: every change of a run's or a stage's state goes through here, is
written before anybody hears of it, and keeps the run's artifacts from gc. Does
not know why a state changes, nor what happens next.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import cast

from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2

from arriero import refs
from arriero.errors import ArrieroError, FailedPrecondition, NotFound, Unavailable
from arriero.gates import Verdict, remedy
from arriero.metrics import Metrics
from arriero.orchestrator import graph as graphs
from arriero.orchestrator.figures import gate_pairs, stage_figures, stage_wait
from arriero.orchestrator.inputs import parse_input, pick
from arriero.orchestrator.live import LiveRun, attempt_of
from arriero.orchestrator.outputs import in_order
from arriero.orchestrator.planning import check_deployments, published
from arriero.orchestrator.records import ENDED_STAGE, Records, RunRecord
from arriero.orchestrator.stages import FIRST_BACKOFF, LONGEST_BACKOFF, News, Outcome
from arriero.orchestrator.waiving import Waived, let_through
from arriero.store import Store
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import pipeline_pb2

_log = logging.getLogger(__name__)


class Ledger:
    """The runs' books; used from the event loop alone.

    Args:
        records: the database.
        store: for references, tags and pins.
        metrics: what is counted.
        retention: seconds after its end for which a run's artifacts are kept.
    """

    def __init__(self, records: Records, store: Store, metrics: Metrics, retention: float) -> None:
        self.records = records
        self._store = store
        self._metrics = metrics
        self._retention = retention
        self._live: dict[str, LiveRun] = {}
        # Ids of runs whose last change could not be written.
        self._unwritten: set[str] = set()

    def load(self) -> list[LiveRun]:
        """Every run that a restart has to take up."""
        for record in self.records.active_runs():
            self._live[record.run.id] = LiveRun(record)
            if not record.ended:
                self._metrics.run_state(record.run.id, "RUNNING", ended=False)
        return list(self._live.values())

    def of(self, run_id: str) -> LiveRun:
        """A run.

        Raises:
            NotFound: no such run.
        """
        live = self._live.get(run_id)
        if live is None:
            record = self.records.run(run_id)
            if record is None:
                raise NotFound(f"no run {run_id!r}; `arriero runs list` shows what there is")
            live = LiveRun(record)
            if record.active:
                self._live[run_id] = live
        return live

    def list(self, size: int, before: int | None) -> tuple[list[pb.Run], int | None]:
        """A page of runs, newest first, progress included, and where the next begins."""
        found, following = self.records.list_runs(size, before)
        records = [self._live[r.run.id].record if r.run.id in self._live else r for r in found]
        return [r.seen() for r in records], following

    async def check(self, pipeline: pipeline_pb2.Pipeline) -> tuple[graphs.Graph, dict[str, str]]:
        """The graph, and the digest of every reference in it.

        Raises:
            InvalidArgument: everything that is wrong with the pipeline.
            NotFound: a reference to no artifact. FailedPrecondition: quarantined.
        """
        graph = graphs.build(pipeline)
        check_deployments(graph)

        def look_up(ref: str) -> tuple[str, str]:
            artifact = self._store.get(ref)
            if artifact.quarantined:
                gates = artifact.manifest.failed_gates
                raise FailedPrecondition(
                    f"{ref} is quarantined by {', '.join(gates)}; {remedy(gates)}",
                    reason="QUARANTINED",
                )
            return artifact.digest, artifact.manifest.kind

        def resolve() -> dict[str, str]:
            return graphs.resolve(graph, look_up)

        return graph, await asyncio.to_thread(resolve)

    async def create(self, record: RunRecord) -> LiveRun:
        """Take a new run in.

        Raises:
            AlreadyExists: its `request_id` is taken.
        """
        live = LiveRun(record)
        await self._pin(live)
        try:
            self.records.create_run(record)
        except ArrieroError:
            await asyncio.to_thread(self._store.unpin, "runs", live.id)
            raise
        self._live[live.id] = live
        self._metrics.run_state(live.id, "RUNNING", ended=False)
        return live

    async def begin_round(
        self, live: LiveRun, request_id: str, waived: Waived, who: str
    ) -> LiveRun:
        """Put what did not succeed back to PENDING, under its next try.

        Stages whose failed gates `who` waived succeed as they are.

        Raises:
            Unavailable: the database is away; the run stays as it was.
        """
        record = live.record
        record.cancel_requested = False
        # A new one, with a wish to cancel of its own: steps of the last round may
        # still be on their way out.
        live = self._live[live.id] = LiveRun(record)
        for stage in record.run.stages:
            if stage.name in waived:
                let_through(stage, waived[stage.name], who)
                for gate in waived[stage.name]:
                    self._metrics.gate(gate, Verdict.WAIVED.value)
            elif stage.state != pb.STAGE_STATE_SUCCEEDED:
                fresh = pb.StageStatus(
                    name=stage.name,
                    kind=stage.kind,
                    state=pb.STAGE_STATE_PENDING,
                    depends_on=stage.depends_on,
                )
                setattr(fresh, "try", attempt_of(stage) + 1)
                stage.CopyFrom(fresh)
        record.run.state = pb.RUN_STATE_RUNNING
        record.run.ClearField("end_time")
        record.run.ClearField("error")
        record.run.paused = False
        record.rounds.append(request_id)
        try:
            self.save(live)
        except Unavailable:
            # Nothing began: the next look-up finds the run as it was.
            del self._live[live.id]
            self._unwritten.discard(live.id)
            raise
        await self._pin(live)
        self._metrics.run_state(live.id, "RUNNING", ended=False)
        return live

    def save(self, live: LiveRun) -> None:
        """Write a run, then tell who waits.

        Raises:
            Unavailable: the database is away; `surely` writes it later.
        """
        self._unwritten.add(live.id)
        self.records.save_run(live.record)
        self._unwritten.discard(live.id)
        live.tell()

    async def surely(self, live: LiveRun, change: Callable[[], Awaitable[None]]) -> None:
        """Make a change, and again while the database is away, until it is written.

        Args:
            live: the run.
            change: does nothing for what is changed already.
        """
        pause = FIRST_BACKOFF
        while True:
            try:
                await change()
                if live.id in self._unwritten:
                    self.save(live)
            except Unavailable as error:
                _log.warning("run %s waits: %s", live.id, error.message, extra={"run": live.id})
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_BACKOFF)
            else:
                self.forget(live)
                return

    def begin_stage(self, live: LiveRun, status: pb.StageStatus) -> None:
        """RUNNING from now on, unless it is already."""
        if status.state != pb.STAGE_STATE_RUNNING:
            status.state = pb.STAGE_STATE_RUNNING
            status.start_time.GetCurrentTime()
            self.save(live)

    def report(self, live: LiveRun, status: pb.StageStatus, news: News) -> None:
        """Show progress; only the operation's name is worth a write."""
        if news.waits_for is not None:
            status.error.CopyFrom(news.waits_for)
        elif news.metadata is not None and news.metadata.HasField("waits_for"):
            status.error.CopyFrom(news.metadata.waits_for)
        else:
            status.ClearField("error")
        if news.metadata is not None:
            status.metadata.CopyFrom(news.metadata)
            self._metrics.stage_progress(live.id, status.name, stage_figures(status))
        if news.operation and news.operation != status.operation:
            status.operation = news.operation
            self.save(live)
        live.tell()

    async def end_stage(self, live: LiveRun, stage: str, number: int, outcome: Outcome) -> None:
        """Record how a try ended, unless that is known already."""
        status = live.record.stage(stage)
        if attempt_of(status) != number or status.state in ENDED_STAGE:
            return
        outputs = in_order(live.graph.nodes[stage].stage, outcome.outputs)
        del status.outputs[:]
        status.outputs.extend(outputs)
        if outputs:
            await self._pin(live)
            if status.state in ENDED_STAGE:  # cancelled meanwhile
                return
        status.state = outcome.state
        status.end_time.GetCurrentTime()
        status.ClearField("error")
        if outcome.metadata is not None:
            status.metadata.CopyFrom(outcome.metadata)
        if outcome.error is not None:
            status.error.CopyFrom(outcome.error)
        self._metrics.stage_progress(live.id, stage, stage_figures(status))
        if status.HasField("start_time"):
            self._metrics.stage_ended(
                status.kind,
                pb.StageState.Name(status.state).removeprefix("STAGE_STATE_"),
                seconds=_seconds(status.start_time, status.end_time),
                wait_seconds=stage_wait(status),
                attempts=status.metadata.attempt,
                cached=status.metadata.cached,
                gates=gate_pairs(status.metadata.gates),
            )
        self.save(live)

    async def end_run(
        self, live: LiveRun, state: pb.RunState.ValueType, error: status_pb2.Status | None
    ) -> None:
        """Record how a run ended, unless it has."""
        # Pinned before the state is seen: from then on somebody may retry.
        await self._pin(live, ended=True)
        run = live.record.run
        if live.record.ended:
            return
        run.state = state
        run.end_time.GetCurrentTime()
        if error is not None:
            run.error.CopyFrom(error)
        name = pb.RunState.Name(state).removeprefix("RUN_STATE_")
        self._metrics.run_state(live.id, name, ended=True)
        self.save(live)
        _log.info("run %s %s", live.id, name, extra={"run": live.id})
        self.forget(live)

    def forget(self, live: LiveRun) -> None:
        """Let go of a run that nothing more happens to."""
        if not live.record.active and self._live.get(live.id) is live:
            del self._live[live.id]

    def tag(self, record: RunRecord) -> None:
        """Set the pipeline's tags; those that are set already stay as they are. Blocks.

        Raises:
            FailedPrecondition: quarantined, or nothing to tag.
        """
        for tag, target in sorted(record.run.pipeline.tags.items()):
            source = parse_input(target, every=False, field=f"tags[{tag!r}]")
            outputs = published(record.stage(cast(str, source.stage)).outputs)
            chosen = pick(outputs, source.output)
            if chosen is None:
                raise FailedPrecondition(f"tags[{tag!r}]: {target} published nothing to tag")
            current = {entry.tag: entry.digest for entry in self._store.tags(chosen.kind)}
            if current.get(str(refs.parse(tag))) != chosen.digest:
                self._store.tag(tag, chosen.digest)

    async def _pin(self, live: LiveRun, *, ended: bool = False) -> None:
        """Keep what the run needs and made from gc: until its end, and some days more."""
        digests = list(live.record.references.values())
        digests += [o.digest for s in live.record.run.stages for o in s.outputs]
        expires = time.time() + self._retention if ended else None
        try:
            await asyncio.to_thread(
                self._store.pin, "runs", live.id, list(dict.fromkeys(digests)), expires=expires
            )
        except ArrieroError as error:
            # The artifacts are there; only their protection is late. The next pin repeats it.
            _log.warning("run %s: artifacts are not pinned: %s", live.id, error.message)


def new_record(
    pipeline: pipeline_pb2.Pipeline,
    graph: graphs.Graph,
    references: dict[str, str],
    request_id: str,
    digest: str,
    owner: str,
) -> RunRecord:
    """A run that is about to start, all of its stages PENDING."""
    run = pb.Run(
        id=f"{pipeline.name}-{secrets.token_hex(4)}",
        pipeline=pipeline,
        state=pb.RUN_STATE_RUNNING,
        owner=owner,
    )
    run.create_time.GetCurrentTime()
    for node in graph.nodes.values():
        status = run.stages.add(
            name=node.name,
            kind=node.kind,
            state=pb.STAGE_STATE_PENDING,
            depends_on=node.depends_on,
        )
        setattr(status, "try", 1)
    return RunRecord(run, request_id, digest, references, [request_id])


def _seconds(start: Timestamp, end: Timestamp) -> float:
    return float(end.ToNanoseconds() - start.ToNanoseconds()) / 1e9
