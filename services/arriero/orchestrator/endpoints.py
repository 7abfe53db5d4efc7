"""Endpoints: artifacts served by name, and their roll-outs.

Responsibility: what an endpoint is to serve, whether it does, and whether that
is proved (`serve.smoke`); a roll-out that fails gives the endpoint back what it
served before. Does not know how replicas are run, nor stages and runs beyond
their names.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace

from google.protobuf.timestamp_pb2 import Timestamp

from arriero.errors import (
    Aborted,
    AlreadyExists,
    ArrieroError,
    Cancelled,
    FailedPrecondition,
    GateFailed,
    NotFound,
    Unavailable,
)
from arriero.gates import GateResult, Verdict
from arriero.metrics import EndpointFigures
from arriero.operations.defaults import with_defaults
from arriero.operations.views import gate_message
from arriero.orchestrator.adapters import AdapterSets, with_adapter, without_adapter
from arriero.orchestrator.clients import Caller
from arriero.orchestrator.deployments import Deployments, check_replicas, check_spec
from arriero.orchestrator.platform import Desired, Platform
from arriero.orchestrator.proofs import Proofs
from arriero.orchestrator.records import EndpointRecord, Records
from arriero.orchestrator.replicas import endpoint_figures, endpoint_message
from arriero.orchestrator.scores import Scores
from arriero.replica import ReplicaSettings
from arriero.store import Store
from arriero.v1 import inference_pb2, pipeline_pb2, types_pb2
from arriero.v1 import orchestrator_pb2 as pb

_log = logging.getLogger(__name__)


class Endpoints:
    """The endpoints of one orchestrator; used from its event loop alone."""

    def __init__(self, records: Records, store: Store, platform: Platform, caller: Caller) -> None:
        self._records = records
        self._store = store
        self._platform = platform
        self._caller = caller
        self._deployments = Deployments(store)
        self._sets = AdapterSets(platform, caller)
        self._known: dict[str, EndpointRecord] = {}
        self._rollouts: dict[str, asyncio.Task[None]] = {}
        self._scores = Scores(platform, caller, self._sets, self._known, self._save)
        self._proofs = Proofs(platform, store, self._sets, self._scores)
        self._measuring: asyncio.Task[None] | None = None

    def load(self) -> None:
        """Take up what an earlier process left: desires, and unsettled roll-outs."""
        for record in self._records.endpoints():
            self._known[record.endpoint.name] = record
            self._want(record)
            if not record.settled:
                self._roll(record)
        self._measuring = asyncio.get_running_loop().create_task(self._scores.run())

    async def close(self) -> None:
        """Stop watching roll-outs; the next `load` goes on with them."""
        tasks = [*self._rollouts.values(), *([self._measuring] if self._measuring else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # What callers see

    def get(self, name: str) -> pb.Endpoint:
        """An endpoint with its replicas as they are now.

        Raises:
            NotFound: no such endpoint.
        """
        return self._seen(self._record(name))

    def all(self) -> list[pb.Endpoint]:
        """Every endpoint, by name."""
        return [self._seen(self._known[name]) for name in sorted(self._known)]

    async def score(self, name: str) -> pb.Endpoint:
        """As `get`, with every live replica compared with golden logits now.

        Raises:
            NotFound: no such endpoint.
            FailedPrecondition: it has no golden logits.
        """
        record = self._record(name)
        if not record.endpoint.spec.golden:
            raise FailedPrecondition(
                f"endpoint {name} has no golden logits to compare with; deploy it with `golden`"
            )
        ready = self._platform.observe(name).ready(record.endpoint.spec.model)
        await self._scores.of(record, ready)
        return self._seen(record)

    def figures(self) -> list[EndpointFigures]:
        """What metrics show; safe to call from another thread."""
        return [endpoint_figures(self._seen(record)) for record in [*self._known.values()]]

    def check(self, spec: pipeline_pb2.DeploySpec) -> None:
        """Refuse what `deploy` would refuse at once; reads the store.

        Raises:
            InvalidArgument, NotFound, FailedPrecondition: as `deploy`.
        """
        check_spec(spec)
        self._deployments.resolve(spec)

    # Changes

    async def create(
        self, spec: pipeline_pb2.DeploySpec, *, run: str = "", owner: str = ""
    ) -> pb.Endpoint:
        """Serve an artifact under a new name; returns before replicas are ready.

        Raises:
            AlreadyExists: the name is in use.
            InvalidArgument, NotFound, FailedPrecondition: as `deploy`.
        """
        check_spec(spec)
        if spec.endpoint in self._known:
            raise AlreadyExists(f"endpoint {spec.endpoint} exists; update it, or take another name")
        return self._seen(await self._apply(spec, run, owner, secrets.token_hex(8)))

    async def update(
        self, spec: pipeline_pb2.DeploySpec, *, run: str = "", owner: str = ""
    ) -> pb.Endpoint:
        """Replace what an endpoint serves; returns before replicas are ready.

        Raises:
            NotFound: no such endpoint, or no such artifact.
            InvalidArgument, FailedPrecondition: as `deploy`.
        """
        check_spec(spec)
        self._record(spec.endpoint)
        return self._seen(await self._apply(spec, run, owner, secrets.token_hex(8)))

    async def deploy(
        self,
        rollout: str,
        spec: pipeline_pb2.DeploySpec,
        *,
        run: str,
        owner: str,
        cancelled: asyncio.Event,
    ) -> list[types_pb2.GateResult]:
        """Roll an artifact out and wait until it is served and proved.

        Args:
            rollout: names this roll-out: asked again (after a crash), the same
                one is followed, not a second one started.
            spec: model and golden as digests or references.
            run: that deploys.
            owner: of the endpoint.
            cancelled: set when the caller no longer wants it; the endpoint then
                serves what it served before, or is removed.

        Returns:
            The gates that were judged.

        Raises:
            InvalidArgument, NotFound: the model is none, or no GGUF file.
            FailedPrecondition: the model is quarantined, or not every replica
                became ready in time.
            GateFailed: a live replica is not the model that was trained.
            Aborted: another roll-out or a deletion came in between.
            Cancelled: `cancelled` was set.
        """
        check_spec(spec)
        record = self._known.get(spec.endpoint)
        if record is None or record.rollout != rollout:
            record = await self._apply(spec, run, owner, rollout)
        await self._follow(record, rollout, cancelled)
        if record.error:
            failed = any(g.verdict == types_pb2.GATE_VERDICT_FAILED for g in record.endpoint.gates)
            raise (GateFailed if failed else FailedPrecondition)(record.error)
        return list(record.endpoint.gates)

    def scale(self, name: str, replicas: int) -> pb.Endpoint:
        """Set the number of replicas.

        Raises:
            NotFound: no such endpoint. InvalidArgument: not a number of replicas.
            FailedPrecondition: an autoscaler has other bounds.
        """
        record = self._record(name)
        check_replicas(replicas)
        self._platform.check(name, replicas)
        record.endpoint.desired_replicas = record.endpoint.spec.replicas = replicas
        self._save(record)
        self._want(record)
        return self._seen(record)

    async def add_adapter(self, name: str, adapter: inference_pb2.AdapterSpec) -> pb.Endpoint:
        """Let every replica have one more adapter, while it serves.

        Raises:
            NotFound: no such endpoint or adapter.
            AlreadyExists: the name is another adapter's.
            InvalidArgument, FailedPrecondition: it cannot be served, or a roll-out is on.
        """
        record = self._settled(name)
        spec = record.endpoint.spec
        resolved = await asyncio.to_thread(
            lambda: self._deployments.resolve_adapter(
                adapter, self._deployments.model(spec.model), "adapter"
            )
        )
        return await self._change_adapters(record, with_adapter(spec, resolved))

    async def remove_adapter(
        self, name: str, adapter: str, *, allow_missing: bool = False
    ) -> pb.Endpoint:
        """Take an adapter away from every replica.

        Raises:
            NotFound: no such endpoint, or (unless `allow_missing`) adapter.
            FailedPrecondition: a roll-out is on.
        """
        record = self._settled(name)
        kept = without_adapter(record.endpoint.spec, adapter, allow_missing=allow_missing)
        return await self._change_adapters(record, kept)

    def delete(self, name: str, *, allow_missing: bool = False) -> None:
        """Drain and remove.

        Raises:
            NotFound: no such endpoint, unless `allow_missing`.
        """
        if name not in self._known:
            if allow_missing:
                return
            self._record(name)
        self._stop(name)
        self._platform.remove(name)
        self._records.delete_endpoint(name)
        del self._known[name]
        self._store.unpin("endpoints", name)

    # Adapters

    def _settled(self, name: str) -> EndpointRecord:
        record = self._record(name)
        if not record.settled:
            raise FailedPrecondition(
                f"endpoint {name} is being rolled out; change its adapters when that is done"
            )
        return record

    async def _change_adapters(
        self, record: EndpointRecord, adapters: Sequence[inference_pb2.AdapterSpec]
    ) -> pb.Endpoint:
        """Those that serve first: what one of them refuses is not recorded."""
        endpoint = record.endpoint
        try:
            await self._sets.give(record, adapters)
        except Unavailable:
            pass  # whoever comes back is given them then
        except ArrieroError:
            with contextlib.suppress(ArrieroError):
                await self._sets.give(record, endpoint.spec.adapters)
            raise
        if self._known.get(endpoint.name) is not record or not record.settled:
            raise Aborted(f"endpoint {endpoint.name} was changed by somebody else meanwhile")
        del endpoint.spec.adapters[:]
        endpoint.spec.adapters.extend(adapters)
        endpoint.update_time.GetCurrentTime()
        self._sets.forget(endpoint.name)
        self._save(record)
        self._want(record)
        return self._seen(record)

    # Roll-outs

    async def _apply(
        self, spec: pipeline_pb2.DeploySpec, run: str, owner: str, rollout: str
    ) -> EndpointRecord:
        resolved = await asyncio.to_thread(self._deployments.resolve, spec)
        name = spec.endpoint
        self._platform.check(name, resolved.replicas)
        now = Timestamp()
        now.GetCurrentTime()
        old = self._known.get(name)
        endpoint = pb.Endpoint(
            name=name,
            spec=resolved,
            desired_replicas=resolved.replicas,
            run=run,
            owner=owner,
            create_time=old.endpoint.create_time if old else now,
            update_time=now,
        )
        previous: pb.Endpoint | None = None
        if old is not None:
            # What never was proved is nothing to go back to.
            previous = (None if old.error else old.endpoint) if old.settled else old.previous
            if old.restored:
                previous = old.endpoint
        record = EndpointRecord(
            endpoint,
            generation=old.generation if old else 0,
            rollout=rollout,
            settled=False,
            previous=previous,
        )
        self._stop(name)
        self._known[name] = record
        self._save(record)
        self._want(record)
        self._roll(record)
        return record

    def _roll(self, record: EndpointRecord) -> None:
        name = record.endpoint.name
        self._rollouts[name] = asyncio.get_running_loop().create_task(self._settle(record))

    def _stop(self, name: str) -> None:
        task = self._rollouts.pop(name, None)
        if task is not None:
            task.cancel()

    async def _follow(self, record: EndpointRecord, rollout: str, cancelled: asyncio.Event) -> None:
        """Until the roll-out is settled, superseded, or no longer wanted."""
        name = record.endpoint.name
        wish = asyncio.ensure_future(cancelled.wait())
        try:
            task = self._rollouts.get(name)
            if task is not None and not record.settled:
                await asyncio.wait({task, wish}, return_when=asyncio.FIRST_COMPLETED)
            if self._known.get(name) is not record:
                raise Aborted(f"endpoint {name} was deployed or deleted by somebody else meanwhile")
            if record.settled:
                return
            if cancelled.is_set():
                self._stop(name)
                if record.previous is None:
                    self.delete(name)
                else:
                    self._restore(record, "")
                raise Cancelled(f"the deployment of endpoint {name} was cancelled")
            raise Unavailable("the orchestrator is stopping")
        finally:
            wish.cancel()

    async def _settle(self, record: EndpointRecord) -> None:
        """Wait, prove, and either keep what is served now or go back."""
        error = ""
        gates: list[GateResult] = []
        try:
            gates = [await self._proofs.of(record)]
            error = "; ".join(
                f"{g.gate} failed: {g.detail}" for g in gates if g.verdict is Verdict.FAILED
            )
        except ArrieroError as problem:
            error = problem.message
        except Exception:
            _log.exception("the roll-out of endpoint %s failed", record.endpoint.name)
            error = "the roll-out failed by a defect; the orchestrator's log has the details"
        if error and record.previous is not None:
            refused = record.endpoint.spec.model
            gates = [replace(g, detail=f"{refused} was refused: {g.detail}") for g in gates]
            self._restore(record, f"{error}; the endpoint serves what it served before", gates)
            return
        record.settled = True
        record.previous = None
        record.error = error
        del record.endpoint.gates[:]
        record.endpoint.gates.extend(gate_message(g) for g in gates)
        self._save(record)

    def _restore(
        self, record: EndpointRecord, error: str, gates: list[GateResult] | None = None
    ) -> None:
        assert record.previous is not None
        record.endpoint.CopyFrom(record.previous)
        for gate in gates or ():
            record.endpoint.gates.append(gate_message(gate))
        self._sets.forget(record.endpoint.name)
        record.settled = record.restored = True
        record.previous = None
        record.error = error
        self._save(record)
        self._want(record)

    # Bookkeeping

    def _record(self, name: str) -> EndpointRecord:
        record = self._known.get(name)
        if record is None:
            known = ", ".join(sorted(self._known)) or "none"
            raise NotFound(f"no endpoint named {name!r}; endpoints: {known}")
        return record

    def _save(self, record: EndpointRecord) -> None:
        held: list[str] = []
        for endpoint in filter(None, (record.endpoint, record.previous)):
            held += _read_by(endpoint.spec)
        name = record.endpoint.name
        self._store.pin("endpoints", name, list(dict.fromkeys(held)))
        self._records.save_endpoint(record)

    def _want(self, record: EndpointRecord) -> None:
        """Tell the platform; each time under a new generation."""
        record.generation += 1
        self._records.save_endpoint(record)
        spec = record.endpoint.spec
        read = _read_by(spec) if self._platform.delivers else ()
        self._platform.apply(
            Desired(
                record.endpoint.name,
                spec.model,
                record.endpoint.desired_replicas,
                record.generation,
                ReplicaSettings.of_spec(with_defaults(spec)),
                read,
                sum(self._store.manifest(digest).size for digest in read),
            )
        )

    def _seen(self, record: EndpointRecord) -> pb.Endpoint:
        return endpoint_message(record, self._platform.observe(record.endpoint.name))


def _read_by(spec: pipeline_pb2.DeploySpec) -> tuple[str, ...]:
    """Digests of all that a replica reads."""
    found = [spec.model, spec.golden, *(item.adapter for item in spec.adapters)]
    return tuple(dict.fromkeys(filter(None, found)))
