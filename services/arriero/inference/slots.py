"""Which slot a request runs in, and which tokens need not be evaluated again.

Responsibility: what lies in each slot's KV cache, with which adapter it was
computed, who uses it, and where a new prompt goes. Does not know llama.cpp, requests
or sampling.

A slot is a sequence of the context. What a finished request leaves behind stays
until the slot is needed, so that a prompt with the same beginning starts there.
Slots in use are kept next to each other: llama.cpp computes streams together
only while their sequence ids have no gaps (eight streams on two cores: 218
tokens a second, 157 with one gap, 76 one by one). For the same reason those of one
adapter are kept next to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

__all__ = ["MIN_COPY", "Move", "Placement", "Slots", "common"]

# Tokens that a copy from another slot must save. Copying a slot's whole cache costs as
# much as evaluating a few dozen.
MIN_COPY = 64

_Ids = npt.NDArray[np.int32]


def common(one: _Ids, other: _Ids) -> int:
    """How many tokens they begin with alike."""
    count = min(len(one), len(other))
    differs = np.flatnonzero(one[:count] != other[:count])
    return int(differs[0]) if len(differs) else count


@dataclass(frozen=True, slots=True)
class Move:
    """A running request changes its slot."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a prompt goes.

    Attributes:
        slot: to use.
        source: slot to copy from first; the slot itself when nothing is copied.
        reused: tokens at the prompt's beginning that are in the cache then.
        makes_room: what happens before all that.
    """

    slot: int
    source: int
    reused: int
    makes_room: Move | None = None


class Slots:
    """The slots of one context.

    Args:
        count: of sequences.
        capacity: tokens that each holds.
    """

    def __init__(self, count: int, capacity: int) -> None:
        self._ids = np.zeros((count, capacity), np.int32)
        self._lengths = [0] * count
        self._busy = [False] * count
        self._used = [0] * count
        self._keys = [0] * count
        self._clock = 0

    def __len__(self) -> int:
        return len(self._busy)

    @property
    def busy(self) -> int:
        """Slots in use."""
        return sum(self._busy)

    @property
    def usage(self) -> float:
        """Share of the cache that slots in use fill, 0 to 1."""
        used = sum(length for length, busy in zip(self._lengths, self._busy, strict=True) if busy)
        return used / self._ids.size

    def tokens(self, slot: int) -> _Ids:
        """What lies in a slot's cache, a view."""
        view: _Ids = self._ids[slot, : self._lengths[slot]]
        return view

    def place(self, prompt: Sequence[int], key: int = 0) -> Placement | None:
        """A free slot for a prompt, taken from now on; None when all are in use.

        Nothing is reused of what was computed with another adapter. The prompt's last
        token is always evaluated: its logits are needed.

        Args:
            prompt: token ids.
            key: of its adapter.
        """
        candidates = self._candidates()
        if not candidates:
            return None
        wanted = np.asarray(prompt[:-1], np.int32)
        own = {slot: self._shared(slot, wanted, key) for slot in candidates}
        # The one that helps most; of equals the one that was not used for longest.
        slot = max(candidates, key=lambda i: (own[i], -self._used[i]))
        if own[slot] < MIN_COPY:
            # What is lost here should be what nobody needed for longest.
            slot = min(candidates, key=lambda i: self._used[i])
        source, reused = slot, own[slot]
        for other in range(len(self)):
            if other in own:
                continue
            if (found := self._shared(other, wanted, key)) >= reused + MIN_COPY:
                source, reused = other, found
        move = None
        # What its own cache saves is worth more than company.
        if (own[slot] < MIN_COPY or source != slot) and (near := self._near(slot, key)) != slot:
            move = self._move(near, slot)
            if source == slot:
                source, reused = near, 0
            slot = near
        if source != slot:
            self._ids[slot, :reused] = self._ids[source, :reused]
        self._lengths[slot] = reused
        self._busy[slot] = True
        self._keys[slot] = key
        self._touch(slot)
        return Placement(slot, source, reused, move)

    def append(self, slot: int, ids: Sequence[int]) -> None:
        """Tokens were evaluated after what lies in a slot."""
        start = self._lengths[slot]
        self._ids[slot, start : start + len(ids)] = ids
        self._lengths[slot] = start + len(ids)

    def share(self, source: int, target: int, count: int) -> None:
        """A slot in use was given the first tokens of another one."""
        self._ids[target, :count] = self._ids[source, :count]
        self._lengths[target] = count

    def release(self, slot: int) -> None:
        """The request ended; what it evaluated stays for others."""
        self._busy[slot] = False
        self._touch(slot)

    def forget(self, slot: int) -> None:
        """A slot's cache was emptied."""
        self._lengths[slot] = 0

    def idle(self) -> int | None:
        """A free slot whose content is needed least; None when all are in use."""
        free = [i for i, busy in enumerate(self._busy) if not busy]
        return min(free, key=lambda i: (self._lengths[i] > 0, self._used[i]), default=None)

    def unused(self) -> list[int]:
        """Free slots next to each other, those whose content is needed least."""
        runs: list[list[int]] = []
        for i, busy in enumerate(self._busy):
            if busy:
                continue
            if runs and runs[-1][-1] == i - 1:
                runs[-1].append(i)
            else:
                runs.append([i])
        return max(runs, key=len, default=[])

    def compact(self) -> Move | None:
        """The move that closes a gap between slots in use, done in these books; None without."""
        used = [i for i, busy in enumerate(self._busy) if busy]
        if not used or used[-1] - used[0] + 1 == len(used):
            return None
        source = used[-1]
        target = next(i for i in range(used[0], source) if not self._busy[i])
        return self._move(source, target)

    def _move(self, source: int, target: int) -> Move:
        length = self._lengths[source]
        self._ids[target, :length] = self._ids[source, :length]
        self._lengths[target] = length
        self._busy[target], self._busy[source] = True, False
        self._used[target] = self._used[source]
        self._keys[target] = self._keys[source]
        return Move(source, target)

    def _near(self, free: int, key: int) -> int:
        """Where the fewest groups come about when whoever is there moves to the free slot."""
        keys = [key if busy else None for key, busy in zip(self._keys, self._busy, strict=True)]
        if all(other in (None, key) for other in keys):
            return free

        def groups(slot: int) -> int:
            after = keys.copy()
            after[free], after[slot] = after[slot], key
            return sum(k is not None and k != before for before, k in pairwise([None, *after]))

        ends = {i for i in range(len(keys)) if keys[i] is not None and keys[i] != key
                and key in (keys[i - 1 : i] + keys[i + 1 : i + 2])}  # fmt: skip
        return min((free, *sorted(ends)), key=groups)

    def _candidates(self) -> list[int]:
        """Free slots that leave no gap: inside of the used ones, or next to them."""
        used = [i for i, busy in enumerate(self._busy) if busy]
        if not used:
            return list(range(len(self)))
        inside = [i for i in range(used[0], used[-1]) if not self._busy[i]]
        return inside or [i for i in (used[0] - 1, used[-1] + 1) if 0 <= i < len(self)]

    def _shared(self, slot: int, wanted: _Ids, key: int) -> int:
        if self._keys[slot] != key:
            return 0
        return common(self.tokens(slot), wanted)

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._used[slot] = self._clock
