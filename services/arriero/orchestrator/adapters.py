"""The adapters that an endpoint's replicas have: what is wanted, given to those that live.

Responsibility: change an endpoint's set of adapters, and bring live replicas to it.
Does not know roll-outs, nor what an adapter is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from arriero.errors import AlreadyExists, NotFound
from arriero.orchestrator.clients import Caller
from arriero.orchestrator.platform import ObservedReplica, Platform
from arriero.orchestrator.records import EndpointRecord
from arriero.v1 import inference_pb2, pipeline_pb2

_SECONDS = 120.0
_Specs = Sequence[inference_pb2.AdapterSpec]


def with_adapter(spec: pipeline_pb2.DeploySpec, adapter: inference_pb2.AdapterSpec) -> _Specs:
    """An endpoint's adapters and one more; by that name there may be the same one.

    Raises:
        AlreadyExists: the name is another adapter's.
    """
    for other in spec.adapters:
        if other.name == adapter.name and other != adapter:
            raise AlreadyExists(
                f"endpoint {spec.endpoint} has another adapter {other.name} ({other.adapter}, "
                f"scale {other.scale:g}); remove it first, or take another name"
            )
    return [*(item for item in spec.adapters if item.name != adapter.name), adapter]


def without_adapter(
    spec: pipeline_pb2.DeploySpec, name: str, *, allow_missing: bool = False
) -> _Specs:
    """An endpoint's adapters without one.

    Raises:
        NotFound: there is none of that name, unless `allow_missing`.
    """
    there = sorted(item.name for item in spec.adapters)
    if name not in there and not allow_missing:
        raise NotFound(
            f"endpoint {spec.endpoint} has no adapter named {name!r}; adapters: "
            f"{', '.join(there) or 'none'}"
        )
    return [item for item in spec.adapters if item.name != name]


class AdapterSets:
    """Gives live replicas the adapters of their endpoint."""

    def __init__(self, platform: Platform, caller: Caller) -> None:
        self._platform = platform
        self._caller = caller
        # (endpoint, replica): has the endpoint's adapters.
        self._given: set[tuple[str, str]] = set()

    async def give(self, record: EndpointRecord, adapters: _Specs) -> None:
        """Let all replicas that are ready have these adapters and no others.

        Where files are delivered, replicas are started with them instead.

        Raises:
            ArrieroError: what one of them refuses, or UNAVAILABLE when it went away.
        """
        if not self._platform.delivers:
            await self._give(self._ready(record), adapters)

    async def give_new(self, record: EndpointRecord) -> None:
        """As `give`, to those alone that became ready since they were last looked at.

        They may have been started with an older set.
        """
        name = record.endpoint.name
        if self._platform.delivers:
            return
        ready = self._ready(record)
        names = {replica.name for replica in ready}
        # Who comes back may be another process with the same name.
        self._given = {key for key in self._given if key[0] != name or key[1] in names}
        new = [replica for replica in ready if (name, replica.name) not in self._given]
        if new:
            await self._give(new, record.endpoint.spec.adapters)
            self._given.update((name, replica.name) for replica in new)

    def forget(self, name: str) -> None:
        """Look at all replicas of an endpoint again."""
        self._given = {key for key in self._given if key[0] != name}

    def _ready(self, record: EndpointRecord) -> list[ObservedReplica]:
        observed = self._platform.observe(record.endpoint.name)
        return observed.ready(record.endpoint.spec.model)

    async def _give(self, replicas: Sequence[ObservedReplica], adapters: _Specs) -> None:
        await asyncio.gather(
            *(self._caller.equip(r.address, adapters, timeout=_SECONDS) for r in replicas)
        )
