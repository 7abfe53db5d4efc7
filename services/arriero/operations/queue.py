"""Who may start a job now: places, GPUs, priorities, and a share for each owner.

Responsibility: admit jobs in order, each with all that it needs or not at all.
Does not know what a job is, nor where it runs.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from arriero.errors import ArrieroError, InvalidArgument, ResourceExhausted


@dataclass(frozen=True, slots=True)
class Demand:
    """What a job takes; a higher priority goes first."""

    gpus: int = 0
    priority: int = 0


@dataclass(eq=False, slots=True)
class Place:
    """Somebody's place in the queue, or at work."""

    owner: str
    demand: Demand
    number: int
    held: bool = False
    told: Callable[[ArrieroError | None], None] = field(default=lambda error: None)
    admitted: asyncio.Event = field(default_factory=asyncio.Event)


class JobQueue:
    """Places for jobs; used from one event loop.

    Higher priorities first, then whoever came first. Whoever does not fit is not
    overtaken (a large job would wait for ever), but whoever waits for the end of
    its own owner's jobs is.

    Args:
        jobs: that may run at once.
        gpus: of all that run, together; 0: as many as they ask for.
        per_owner: jobs of one owner at once; 0: as many as there are places.
    """

    def __init__(self, jobs: int, *, gpus: int = 0, per_owner: int = 0) -> None:
        self._jobs, self._gpus, self._per_owner = jobs, gpus, per_owner
        self._numbers = itertools.count()
        self._waiting: list[Place] = []
        self._held: list[Place] = []

    def check(self, demand: Demand) -> None:
        """Refuse what would wait for ever.

        Raises:
            InvalidArgument: more GPUs than the budget has.
        """
        if self._gpus and demand.gpus > self._gpus:
            raise InvalidArgument.field(
                "resources",
                f"asks for {demand.gpus} GPUs, and the budget of this service is {self._gpus}; "
                "choose a smaller profile, or raise ARRIERO_GPU_BUDGET",
            )

    def place(
        self, owner: str, demand: Demand, told: Callable[[ArrieroError | None], None]
    ) -> Place:
        """A place that is not taken yet; `told` hears what it waits for, None at its end."""
        return Place(owner, demand, next(self._numbers), told=told)

    async def take(self, place: Place) -> None:
        """Wait for one's turn."""
        place.admitted.clear()
        self._waiting.append(place)
        self._waiting.sort(key=lambda p: (-p.demand.priority, p.number))
        try:
            self._admit()
            await place.admitted.wait()
        except BaseException:
            if place in self._waiting:
                self._waiting.remove(place)
            self.give_back(place)
            raise

    def hold(self, place: Place) -> None:
        """Take a place for a job that runs already, whether there is one or not."""
        if not place.held:
            place.held = True
            self._held.append(place)

    def give_back(self, place: Place) -> None:
        """Let others in; does nothing when it is not held."""
        if place.held:
            place.held = False
            self._held.remove(place)
        self._admit()

    def _admit(self) -> None:
        blocked = ""
        for place in list(self._waiting):
            own = self._short_of_share(place)
            missing = blocked or own or self._short_of(place)
            if not missing:
                self._waiting.remove(place)
                self.hold(place)
                place.told(None)
                place.admitted.set()
                continue
            place.told(ResourceExhausted(f"the job waits: {missing}", reason="QUEUED"))
            blocked = blocked or ("" if own else missing)

    def _short_of_share(self, place: Place) -> str:
        own = sum(p.owner == place.owner for p in self._held)
        if self._per_owner and own >= self._per_owner:
            return f"{place.owner or 'its owner'} has {own} jobs at work, and may have no more"
        return ""

    def _short_of(self, place: Place) -> str:
        if len(self._held) >= self._jobs:
            return f"{len(self._held)} of {self._jobs} jobs are at work"
        used = sum(p.demand.gpus for p in self._held)
        if self._gpus and used + place.demand.gpus > self._gpus:
            return f"{used} of {self._gpus} GPUs are in use, it needs {place.demand.gpus}"
        return ""
