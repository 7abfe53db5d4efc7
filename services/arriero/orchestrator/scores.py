"""What live replicas say of themselves: how far they are from the model that was trained.

Responsibility: compare replicas with the golden logits, when asked and as they become
ready, and remember the answers. Does not know what follows from them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from arriero.errors import ArrieroError, Unavailable
from arriero.orchestrator import smoke
from arriero.orchestrator.adapters import AdapterSets
from arriero.orchestrator.clients import Caller
from arriero.orchestrator.platform import ObservedReplica, Platform
from arriero.orchestrator.records import EndpointRecord
from arriero.v1 import orchestrator_pb2 as pb

_SCORE_SECONDS = 300.0
# How often replicas that became ready since are looked for, to be compared.
_MEASURE_SECONDS = 1.0
_log = logging.getLogger(__name__)


class Scores:
    """The scores of the replicas of all endpoints; used from one event loop alone.

    Args:
        platform: says which replicas are ready.
        caller: asks them.
        sets: gives new replicas the adapters that they were started without.
        known: the endpoints by name, as they are now.
        save: writes an endpoint's record down.
    """

    def __init__(
        self,
        platform: Platform,
        caller: Caller,
        sets: AdapterSets,
        known: Mapping[str, EndpointRecord],
        save: Callable[[EndpointRecord], None],
    ) -> None:
        self._platform = platform
        self._caller = caller
        self._sets = sets
        self._known = known
        self._save = save
        # (endpoint, replica): asked for its score since it became ready.
        self._asked: set[tuple[str, str]] = set()

    async def run(self) -> None:
        """Look after replicas that become ready later: after a scale-up, or a restart.

        They are compared with the golden logits, and get adapters that they were started
        without.
        """
        while True:
            await asyncio.sleep(_MEASURE_SECONDS)
            for record in [*self._known.values()]:
                if not record.settled:
                    continue
                name, new = record.endpoint.name, list[ObservedReplica]()
                try:
                    await self._sets.give_new(record)
                    if record.endpoint.spec.golden and (new := self._new(record)):
                        await self.of(record, new)
                except Unavailable:
                    continue  # it went away again; the next look tells
                except ArrieroError as error:
                    self._asked.update((name, replica.name) for replica in new)
                    _log.warning("endpoint %s cannot be measured: %s", name, error.message)
                except Exception:
                    _log.exception("measuring endpoint %s failed", name)

    async def of(
        self, record: EndpointRecord, ready: Sequence[ObservedReplica]
    ) -> list[smoke.Score]:
        """Ask these replicas, and remember what they said."""
        spec = record.endpoint.spec

        async def ask(replica: str, address: str) -> smoke.Score:
            answer = await self._caller.score(address, spec.golden, timeout=_SCORE_SECONDS)
            return smoke.Score(
                replica,
                answer.kl_divergence,
                answer.top1_agreement,
                answer.confident_disagreements,
                answer.tokens,
                answer.contexts or answer.tokens,
                answer.seconds,
            )

        scores = list(await asyncio.gather(*(ask(r.name, r.address) for r in ready)))
        said = [
            pb.Replica(
                name=replica.name,
                digest=replica.digest,
                kl_divergence=score.kl_divergence,
                top1_agreement=score.top1_agreement,
            )
            for replica, score in zip(ready, scores, strict=True)
        ]
        names = {replica.name for replica in said}
        others = [r for r in record.endpoint.replicas if r.name not in names]
        self._remember(record, [*others, *said])
        return scores

    def _new(self, record: EndpointRecord) -> list[ObservedReplica]:
        name = record.endpoint.name
        ready = self._platform.observe(name).ready(record.endpoint.spec.model)
        names = {replica.name for replica in ready}
        # Who comes back may be another process with the same name.
        self._asked = {key for key in self._asked if key[0] != name or key[1] in names}
        known = [r for r in record.endpoint.replicas if r.name in names]
        if len(known) < len(record.endpoint.replicas):
            self._remember(record, known)
        done = {replica.name for replica in known} | {r for e, r in self._asked if e == name}
        return [replica for replica in ready if replica.name not in done]

    def _remember(self, record: EndpointRecord, scored: Iterable[pb.Replica]) -> None:
        kept = list(scored)
        del record.endpoint.replicas[:]
        record.endpoint.replicas.extend(kept)
        if self._known.get(record.endpoint.name) is record:
            self._save(record)
