"""Which publications of an artifact are there, and the one decision to remove one.

Responsibility: `present/<hex>/`. Does not know the files of a publication, nor why
one is to go.

A publication is there when its record is. The remover marks it with a round of its
own, reads every root again, and then tries to decide that round (`taken`); a user
who finds the mark tries to decide it as well (`claimed`). A conditional put lets
one of the two succeed. So whoever first writes a root and then claims either has
been seen by the remover, or has met its mark, or learns that the files are gone.
A publication never comes back: the same artifact made again is another one.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from arriero.store.files import to_json
from arriero.store.manifest import FORMAT
from arriero.store.s3.bucket import Bucket

_RECORD, _DOOMED, _DECIDED = ".json", ".doomed-", ".decided-"
_TAKEN, _CLAIMED, _SPARED = b"taken", b"claimed", b"spared"


@dataclass
class _State:
    """What is known of an artifact: publications, and rounds that mean to remove them."""

    there: set[str] = field(default_factory=set)
    doomed: dict[str, set[str]] = field(default_factory=dict)


class Places:
    """The publications of one store."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._rounds: dict[str, list[tuple[str, str]]] = {}

    def add(self, name: str, publication: str) -> None:
        """Make a publication be there, from now on."""
        self._bucket.put(_record(name, publication), to_json({"format": FORMAT}))

    def there(self, name: str) -> list[str]:
        """The publications of an artifact, in a stable order."""
        return sorted(self._state(name).there)

    def all(self) -> dict[str, list[str]]:
        """The publications of every artifact."""
        found: dict[str, list[str]] = {}
        for record in self._bucket.find("present/"):
            _, name, rest = record.key.split("/", 2)
            if rest.endswith(_RECORD):
                found.setdefault(name, []).append(rest.removesuffix(_RECORD))
        return found

    def claim(self, name: str) -> str | None:
        """A publication that is there, and stays if a root was written before; None: none."""
        state = self._state(name)
        decided = False
        for publication in state.there:
            for round_ in state.doomed.get(publication, ()):
                self._bucket.create(_mark(name, publication, _DECIDED, round_), _CLAIMED)
                decided = True
        if decided:  # looked at last: a record goes before the decision about it
            state = self._state(name)
        for publication in sorted(state.there):
            rounds = state.doomed.get(publication, set())
            if all(self._decision(name, publication, round_) != _TAKEN for round_ in rounds):
                return publication
            # Decided for good; its remover may have died over it.
            self._bucket.delete([_record(name, publication)])
        return None

    def doom(self, name: str) -> None:
        """Mark every publication of an artifact."""
        marks = []
        for publication in self._state(name).there:
            round_ = secrets.token_hex(8)
            self._bucket.put(_mark(name, publication, _DOOMED, round_), b"")
            marks.append((publication, round_))
        self._rounds[name] = marks

    def spare(self, name: str) -> None:
        """Take the marks off again."""
        for publication, round_ in self._rounds.pop(name, ()):
            self._clear(name, publication, round_)

    def take(self, name: str) -> list[str]:
        """The marked publications that nobody claimed; they are not there any more.

        Their decisions stay until `settle`, for whoever is about to decide otherwise.
        """
        gone = []
        for publication, round_ in self._rounds.pop(name, ()):
            if self._take(name, publication, round_):
                gone.append(publication)
        return gone

    def _take(self, name: str, publication: str, round_: str) -> bool:
        decided = _mark(name, publication, _DECIDED, round_)
        doomed = _mark(name, publication, _DOOMED, round_)
        # Whoever settled for a remover that slept too long took its mark away.
        mine = self._bucket.create(decided, _TAKEN)
        if not mine or self._bucket.head(doomed) is None:
            self._clear(name, publication, round_)
            return False
        self._bucket.delete([_record(name, publication)])
        self._clear(name, publication, round_)
        return True

    def settle(self) -> None:
        """As the only remover: end the rounds of one that was killed."""
        rounds: set[tuple[str, str, str]] = set()
        for record in self._bucket.find("present/"):
            _, name, rest = record.key.split("/", 2)
            for kind in (_DOOMED, _DECIDED):
                publication, found, round_ = rest.partition(kind)
                if found:
                    rounds.add((name, publication, round_))
        for name, publication, round_ in rounds:
            # Decided first, or a remover that only slept could still take it.
            self._bucket.create(_mark(name, publication, _DECIDED, round_), _SPARED)
            if self._decision(name, publication, round_) == _TAKEN:
                self._bucket.delete([_record(name, publication)])
            self._clear(name, publication, round_)

    def _clear(self, name: str, publication: str, round_: str) -> None:
        self._bucket.delete([_mark(name, publication, _DOOMED, round_)])
        self._bucket.delete([_mark(name, publication, _DECIDED, round_)])

    def _decision(self, name: str, publication: str, round_: str) -> bytes:
        try:
            return self._bucket.get(_mark(name, publication, _DECIDED, round_))
        except FileNotFoundError:
            return b""

    def _state(self, name: str) -> _State:
        state = _State()
        for record in self._bucket.find(f"present/{name}/"):
            rest = record.key.rpartition("/")[2]
            publication, found, round_ = rest.partition(_DOOMED)
            if found:
                state.doomed.setdefault(publication, set()).add(round_)
            elif rest.endswith(_RECORD):
                state.there.add(rest.removesuffix(_RECORD))
        return state


def _record(name: str, publication: str) -> str:
    return f"present/{name}/{publication}{_RECORD}"


def _mark(name: str, publication: str, kind: str, round_: str) -> str:
    return f"present/{name}/{publication}{kind}{round_}"
