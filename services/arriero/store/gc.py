"""Garbage collection: remove what no root holds.

Responsibility: find what is held, plan, and remove in an order that loses
nothing that somebody comes to need meanwhile. Does not know why anything is
held.

Nothing is stopped while it runs. What is to go is marked (see the backend), then
every root is read again, and what is held by now is spared. So whoever first
writes a root (tag, pin, lease, operation record) and then gets the artifact can
rely on what it gets.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from arriero.errors import DataLoss, NotFound
from arriero.store.artifacts import Artifacts
from arriero.store.backend import Backend
from arriero.store.manifest import check_digest
from arriero.store.roots import Roots
from arriero.store.tags import Tags

log = logging.getLogger(__name__)

_DIGEST = re.compile(rb"sha256:[0-9a-f]{64}")
_WORD = re.compile(r"[A-Za-z0-9._-]+")
_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")


@dataclass(frozen=True, slots=True)
class Removal:
    """What goes: path in the store, bytes, and why."""

    path: str
    size: int
    reason: str


@dataclass
class _Held:
    """What roots hold: digests, and paths relative to the store's root."""

    digests: set[str] = field(default_factory=set)
    paths: set[str] = field(default_factory=set)
    # Staging directories whose work succeeded, and is held by nobody else.
    succeeded: set[str] = field(default_factory=set)

    def holds(self, path: str) -> bool:
        """Whether a path, or anything above or below it, is held."""
        return any(
            path == other or path.startswith(other + "/") or other.startswith(path + "/")
            for other in self.paths
        )


@dataclass(frozen=True, slots=True)
class _Plan:
    removal: Removal
    digest: str | None  # None: a staging directory
    seen_ns: int | None  # when it was last published or touched


def collect(
    backend: Backend,
    artifacts: Artifacts,
    tags: Tags,
    roots: Roots,
    *,
    dry_run: bool,
    grace: float,
) -> list[Removal]:
    """Remove artifacts and staging directories that nothing holds.

    Held are: what tags point at, pins and leases that have not expired, what
    the records of operations that have not ended name (with their staging
    directories), what was published, used from the cache or written less than
    `grace` seconds ago, and the golden logits of whatever is held. Manifests
    and operation records stay. Staging of succeeded work goes first, and needs
    no grace.

    Returns:
        What was removed, or with `dry_run` what would be.

    Raises:
        DataLoss, FailedPrecondition: a root that can't be read, or was written
            by a newer version: nothing is removed; or another gc is at work.
    """
    with backend.remover():
        if not dry_run:
            backend.settle()
        now = time.time()
        ages = {digest: artifacts.age_ns(digest) for digest in artifacts.digests()}
        held = _held(backend, artifacts, tags, roots, now, grace)
        plans = [*_staging(backend, held, now, grace), *_artifacts(backend, ages, held)]
        if dry_run:
            removed = [plan.removal for plan in plans]
        else:
            removed = _remove(backend, artifacts, tags, roots, plans, grace)
        going = {plan.digest for plan in plans if dry_run}
        for remove, removal in list(_small(backend, artifacts, roots, going, held, now, grace)):
            if not dry_run:
                remove()
            removed.append(removal)
        return removed


def _held(
    backend: Backend, artifacts: Artifacts, tags: Tags, roots: Roots, now: float, grace: float
) -> _Held:
    held = _Held()
    # Records before tags and pins: work that ends meanwhile moves its digests that way.
    _operations(backend, held)
    for _, lease in roots.leases():
        if lease.expires > now:
            held.digests.update(lease.digests)
            held.paths.update(lease.paths)
    held.digests.update(entry.digest for entry in tags.all())
    for pin in roots.pins():
        if pin.expires is None or pin.expires > now:
            held.digests.update(pin.digests)
    for digest in artifacts.digests():
        age = artifacts.age_ns(digest)
        if age is None or age / 1e9 > now - grace:  # without a manifest: not ours to judge
            held.digests.add(digest)
    _add_golden(artifacts, held)
    return held


def _add_golden(artifacts: Artifacts, held: _Held) -> None:
    queue = list(held.digests)
    while queue:
        digest = queue.pop()
        try:
            golden = artifacts.manifest(digest).golden
        except NotFound:
            continue
        except DataLoss as error:  # unreadable to everyone; what it needs is not known
            log.warning("gc keeps %s as it is: %s", digest, error)
            continue
        if golden is not None and golden not in held.digests:
            held.digests.add(golden)
            queue.append(golden)


def _operations(backend: Backend, held: _Held) -> None:
    """Whatever a record of unended work names is held, by digest or by directory name."""
    staged: dict[str, set[str]] = defaultdict(set)
    for directory in backend.staged():
        staged[directory.key.rpartition("/")[2]].add(directory.key)
    succeeded: set[str] = set()
    for record in backend.objects.find("operations/"):
        if not record.key.endswith(("/operation.json", "/execution.json")):
            continue
        with contextlib.suppress(FileNotFoundError):
            text = backend.objects.read(record.key)
            state, value = _state(text)
            if state == "SUCCEEDED":
                succeeded.update(_own(record.key, value))
            if state in _ENDED:
                continue
            held.digests.update(match.decode() for match in _DIGEST.findall(text))
            name = record.key.split("/")[-2]
            words = {name, *_WORD.findall(text.decode(errors="replace"))}
            for word in words & staged.keys():
                held.paths.update(staged[word])
    held.succeeded = {path for path in succeeded if not held.holds(path)}


def _state(text: bytes) -> tuple[str, dict[str, Any]]:
    """The state that a record says, empty where it can't be told: then it counts as running."""
    try:
        value = json.loads(text)
        return str(value["state"]).removeprefix("OPERATION_STATE_"), value
    except (ValueError, TypeError, KeyError):
        return "", {}


def _own(key: str, value: dict[str, Any]) -> Iterator[str]:
    """The staging directories that a record calls its own, relative to the root."""
    named = value.get("staging")
    if isinstance(named, str) and named:
        yield named
    parts = key.split("/")
    yield f"staging/{parts[1]}/{parts[-2]}"


def _staging(backend: Backend, held: _Held, now: float, grace: float) -> list[_Plan]:
    done: list[_Plan] = []
    stale: list[_Plan] = []
    for directory in backend.staged():
        if held.holds(directory.key):
            continue
        if directory.key in held.succeeded:
            reason, plans = "staging of work that succeeded", done
        elif directory.newest <= now - grace:
            reason, plans = f"staging that nothing wrote to for {grace:.0f} s", stale
        else:
            continue
        plans.append(_Plan(Removal(directory.key, directory.size, reason), None, None))
    return done + stale


def _artifacts(backend: Backend, ages: Mapping[str, int | None], held: _Held) -> list[_Plan]:
    plans = []
    for digest in sorted(ages):
        if digest in held.digests:
            continue
        removal = Removal(
            f"artifacts/{check_digest(digest)}",
            backend.size(digest),
            "no tag, endpoint, run, operation or lease holds it",
        )
        plans.append(_Plan(removal, digest, ages[digest]))
    return plans


def _small(
    backend: Backend,
    artifacts: Artifacts,
    roots: Roots,
    going: set[str | None],
    held: _Held,
    now: float,
    grace: float,
) -> Iterator[tuple[Callable[[], object], Removal]]:
    """Records that have lost their meaning: files of some hundred bytes each.

    What expired has no effect from then on; its file gets the grace as well, since
    its owner may be renewing it just now.
    """
    objects = backend.objects
    gone: dict[str, str] = {}
    for key, lease in roots.leases():
        if lease.expires <= now - grace:
            gone[key] = "lease that expired"
    for pin in roots.pins():
        if pin.expires is not None and pin.expires <= now - grace:
            gone[f"roots/{pin.owner}/{pin.name}.json"] = "pin that expired"
    there = set(artifacts.digests()) - going
    for record in objects.find("results/"):
        with contextlib.suppress(FileNotFoundError):
            text = objects.read(record.key)
            if not {match.decode() for match in _DIGEST.findall(text)} <= there:
                gone[record.key] = "result of artifacts that are gone"
    for prefix in ("leases/", "roots/", "results/"):
        for record in objects.find(prefix):
            if record.key in gone:
                removal = Removal(record.key, record.size, gone[record.key])
                yield partial(objects.delete, record.key), removal
    for left in backend.leftovers(grace):
        if not held.holds(left.key):
            yield left.remove, Removal(left.key, left.size, left.reason)


def _remove(
    backend: Backend,
    artifacts: Artifacts,
    tags: Tags,
    roots: Roots,
    plans: list[_Plan],
    grace: float,
) -> list[Removal]:
    for plan in plans:
        backend.doom(plan.removal.path)
    held = _held(backend, artifacts, tags, roots, time.time(), grace)
    for plan in plans:
        if plan.digest is not None and artifacts.age_ns(plan.digest) != plan.seen_ns:
            held.digests.add(plan.digest)  # published again, or used from the cache
    _add_golden(artifacts, held)
    removed = []
    for plan in plans:
        if plan.digest in held.digests or held.holds(plan.removal.path):
            backend.spare(plan.removal.path)
        elif backend.take(plan.removal.path):
            removed.append(plan.removal)
            continue
        log.info("gc leaves %s: it came to be needed", plan.removal.path)
    return removed
