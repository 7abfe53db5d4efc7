"""The proof of a roll-out: every replica is there, and says what the trained model said.

Responsibility: wait for an endpoint's replicas, give them their adapters, and judge
them by `serve.smoke`. Does not know what follows from the verdict.
"""

from __future__ import annotations

import asyncio
import logging

from arriero.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from arriero.gates import GateResult, Gates, Mode, Verdict
from arriero.operations.defaults import with_defaults
from arriero.operations.job import gate_modes
from arriero.orchestrator import smoke
from arriero.orchestrator.adapters import AdapterSets
from arriero.orchestrator.platform import Observed, Platform
from arriero.orchestrator.records import EndpointRecord
from arriero.orchestrator.replicas import shortage
from arriero.orchestrator.scores import Scores
from arriero.replica import ReplicaSettings
from arriero.store import Store
from arriero.v1 import pipeline_pb2

_SCORE_TRIES = 3
# A supervisor may try a replica again; FAILED for this long means that it gave up.
_FAILED_SECONDS = 2.0
_log = logging.getLogger(__name__)


class Proofs:
    """Judges the roll-outs of all endpoints; used from one event loop alone.

    Args:
        platform: says which replicas are ready.
        store: says of what type the file is that they serve.
        sets: gives them their adapters.
        scores: compares them with the golden logits.
    """

    def __init__(self, platform: Platform, store: Store, sets: AdapterSets, scores: Scores) -> None:
        self._platform = platform
        self._store = store
        self._sets = sets
        self._scores = scores

    async def of(self, record: EndpointRecord) -> GateResult:
        """The gate's result; replicas that die while they are asked are waited for again.

        Raises:
            DeadlineExceeded: not all replicas became ready in time.
            FailedPrecondition: some gave up.
            Unavailable: they died again and again.
        """
        for attempt in range(1, _SCORE_TRIES + 1):
            observed = await self._ready(record)
            try:
                await self._sets.give(record, record.endpoint.spec.adapters)
                return await self._prove(record, observed)
            except Unavailable as error:
                if attempt == _SCORE_TRIES:
                    raise
                _log.warning("endpoint %s: %s", record.endpoint.name, error.message)
                await asyncio.sleep(1)
        raise AssertionError("unreachable")

    async def _ready(self, record: EndpointRecord) -> Observed:
        """Wait until every wanted replica is ready; fail early when they gave up."""
        name, spec = record.endpoint.name, record.endpoint.spec
        loop = asyncio.get_running_loop()
        failed_since: float | None = None

        def until(observed: Observed) -> bool:
            nonlocal failed_since
            if observed.generation < record.generation:
                return False
            if observed.complete(spec.model, record.endpoint.desired_replicas):
                return True
            if not observed.failed(spec.model):
                failed_since = None
                return False
            failed_since = failed_since or loop.time()
            return loop.time() - failed_since >= _FAILED_SECONDS

        try:
            observed = await self._platform.wait(name, until, timeout=spec.timeout_seconds)
        except DeadlineExceeded as error:
            observed = self._platform.observe(name)
            raise DeadlineExceeded(
                f"endpoint {name}: {shortage(record, observed)} after {spec.timeout_seconds} s; "
                "raise timeout_seconds, or look at the replicas' logs"
            ) from error
        if not observed.complete(spec.model, record.endpoint.desired_replicas):
            raise FailedPrecondition(
                f"endpoint {name}: {shortage(record, observed)}; look at the replicas' logs"
            )
        return observed

    async def _prove(self, record: EndpointRecord, observed: Observed) -> GateResult:
        spec = record.endpoint.spec
        modes = gate_modes(spec)
        gates = Gates(modes)
        if gates.mode(smoke.GATE) is Mode.SKIP:
            return GateResult(smoke.GATE, Mode.SKIP, Verdict.SKIPPED)
        reason = ""
        if not spec.golden:
            reason = "the file carries no golden logits, and none are given"
        elif not observed.ready(spec.model):
            reason = "no replicas"
        if reason:
            gates.skip(smoke.GATE, reason)
            return gates.results[0]
        scores = await self._scores.of(record, observed.ready(spec.model))
        return smoke.judge(scores, modes, self._limit(spec))

    def _limit(self, spec: pipeline_pb2.DeploySpec) -> float | None:
        """The KL divergence that the types served explain; None where that is not known."""
        settings = ReplicaSettings.of_spec(with_defaults(spec))
        rope = settings.rope
        if rope.type not in ("", "none") and not rope.native_slots:
            return None  # positions mean something else by intention
        kind = self._store.manifest(spec.model).labels.get("quant_type", "")
        return smoke.limit_of(kind, (settings.cache_type_k, settings.cache_type_v))
