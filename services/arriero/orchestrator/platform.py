"""Where replicas run: what is wanted of it, and what it says is there.

Responsibility: the `Platform` interface, and the local one, which talks with
the supervisor through files in a shared directory. Does not know artifacts,
gates, or why something is wanted.

    desired/<endpoint>.json   written here
    actual/<endpoint>.json    written by the supervisor
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from arriero import refs
from arriero.errors import DeadlineExceeded, InvalidArgument
from arriero.replica import ReplicaSettings
from arriero.store import write_atomic

_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Desired:
    """What an endpoint is to be.

    Attributes:
        name: of the endpoint.
        digest: of the artifact that it serves.
        replicas: how many.
        generation: counts what was ever desired of this endpoint.
        settings: of each replica.
        artifacts: digests of all that a replica reads; only where they are delivered.
        size: of them together, in bytes.
    """

    name: str
    digest: str
    replicas: int
    generation: int
    settings: ReplicaSettings = field(default_factory=ReplicaSettings)
    artifacts: tuple[str, ...] = ()
    size: int = 0

    def environment(self) -> dict[str, str]:
        """All that a replica is told about itself; where it listens is the platform's.

        Replicas whose environment differs from this one are to be replaced, unless
        `ADAPTERS_VARIABLE` alone differs: those are told while they run.
        """
        return {
            "ARRIERO_MODEL": self.digest,
            "ARRIERO_MODEL_NAME": self.name,
            **self.settings.environment(),
        }


@dataclass(frozen=True, slots=True)
class ObservedReplica:
    """One replica; `state` is STARTING, READY, DRAINING or FAILED.

    `metrics` is the `host:port` of its Prometheus page, where it is known. `final`
    says of a FAILED one that waiting is in vain, `current` whether it is made of the
    newest desire.
    """

    name: str
    address: str
    state: str
    digest: str
    detail: str = ""
    metrics: str = ""
    final: bool = True
    current: bool = True


@dataclass(frozen=True, slots=True)
class Observed:
    """What the platform says; `generation` is the newest desire that it has read.

    `elastic`: an autoscaler may want more replicas than are desired, `scaled_to`.
    """

    name: str
    replicas: tuple[ObservedReplica, ...] = ()
    generation: int = 0
    elastic: bool = False
    scaled_to: int = 0

    def ready(self, digest: str) -> list[ObservedReplica]:
        """The replicas that serve this artifact now, as it is desired."""
        return [r for r in self.replicas if r.state == "READY" and r.digest == digest and r.current]

    def complete(self, digest: str, count: int) -> bool:
        """Whether just `count` replicas are there, all serving this artifact.

        Those that drain are gone already. Others must be: with other settings
        the same artifact may be served by old replicas for a while.
        """
        staying = [r for r in self.replicas if r.state != "DRAINING"]
        if self.elastic:
            return count <= len(self.ready(digest)) and all(r.current for r in staying)
        return len(staying) == count == len(self.ready(digest))

    def failed(self, digest: str) -> list[ObservedReplica]:
        """The replicas of this artifact that gave up."""
        return [r for r in self.replicas if r.state == "FAILED" and r.digest == digest and r.final]


class Platform(Protocol):
    """What runs replicas.

    `delivers` says that replicas have the artifacts that they were started with, and
    reach no others: whoever wants others of them wants other replicas.
    """

    @property
    def delivers(self) -> bool:
        """See above."""
        ...

    def check(self, name: str, replicas: int) -> None:
        """Refuse a number of replicas that it would not make.

        Raises:
            FailedPrecondition: an autoscaler has other bounds.
        """
        ...

    def apply(self, desired: Desired) -> None:
        """Make it so, in time; replicas are replaced one after the other."""
        ...

    def remove(self, name: str) -> None:
        """Drain and remove all replicas; fine when there are none."""
        ...

    def observe(self, name: str) -> Observed:
        """What is there now; quick."""
        ...

    async def wait(
        self, name: str, until: Callable[[Observed], bool], *, timeout: float
    ) -> Observed:
        """The first observation that `until` accepts.

        Raises:
            DeadlineExceeded: none within `timeout` seconds.
        """
        ...


async def until_observed(
    platform: Platform, name: str, until: Callable[[Observed], bool], *, timeout: float
) -> Observed:
    """`Platform.wait`, by looking again and again."""
    clock = asyncio.get_running_loop()
    deadline = clock.time() + timeout
    while True:
        observed = platform.observe(name)
        if until(observed):
            return observed
        left = deadline - clock.time()
        if left <= 0:
            raise DeadlineExceeded(f"endpoint {name}: not there after {timeout:g} s")
        await asyncio.sleep(min(_POLL_SECONDS, left))


class LocalPlatform:
    """Replicas are processes of the supervisor that shares `directory` with us."""

    delivers = False

    def __init__(self, directory: Path) -> None:
        self._desired = directory / "desired"
        self._actual = directory / "actual"
        self._desired.mkdir(parents=True, exist_ok=True)
        self._actual.mkdir(parents=True, exist_ok=True)

    def check(self, name: str, replicas: int) -> None:
        """Any number goes."""

    def apply(self, desired: Desired) -> None:
        """See `Platform`."""
        data = {
            "name": desired.name,
            "digest": desired.digest,
            "replicas": desired.replicas,
            "generation": desired.generation,
            "environment": desired.environment(),
        }
        body = json.dumps(data, indent=1, sort_keys=True).encode()
        write_atomic(self._file(self._desired, desired.name), body)

    def remove(self, name: str) -> None:
        """See `Platform`."""
        self._file(self._desired, name).unlink(missing_ok=True)

    def observe(self, name: str) -> Observed:
        """See `Platform`; nothing is there while the supervisor has not spoken."""
        try:
            data = json.loads(self._file(self._actual, name).read_bytes())
            return Observed(
                name,
                tuple(_replica(item) for item in data["replicas"]),
                int(data.get("generation", 0)),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return Observed(name)

    async def wait(
        self, name: str, until: Callable[[Observed], bool], *, timeout: float
    ) -> Observed:
        """See `Platform`."""
        return await until_observed(self, name, until, timeout=timeout)

    @staticmethod
    def _file(directory: Path, name: str) -> Path:
        if not refs.is_name(name):
            raise InvalidArgument.field("name", f"{name!r} is not an endpoint name")
        return directory / f"{name}.json"


def _replica(item: dict[str, Any]) -> ObservedReplica:
    return ObservedReplica(
        name=str(item["name"]),
        address=str(item.get("address") or ""),
        state=str(item["state"]),
        digest=str(item.get("digest") or ""),
        detail=str(item.get("detail") or ""),
        metrics=str(item.get("metrics") or ""),
    )
