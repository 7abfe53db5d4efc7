"""Garbage collection: remove what no root holds.

Responsibility: find what is held, plan, and remove in an order that loses
nothing that somebody comes to need meanwhile. Does not know why anything is
held.

Nothing is stopped while it runs. What is to go is marked (see `trash`), then
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arriero.errors import DataLoss, NotFound
from arriero.store.artifacts import Artifacts
from arriero.store.files import (
    is_temporary,
    tree_newest,
    tree_size,
)
from arriero.store.layout import Layout
from arriero.store.roots import Roots
from arriero.store.tags import Tags
from arriero.store.trash import Trash

log = logging.getLogger(__name__)

_DIGEST = re.compile(rb"sha256:[0-9a-f]{64}")
_WORD = re.compile(r"[A-Za-z0-9._-]+")
# No writer of a small file takes so long between its first byte and its rename.
_WRITING_SECONDS = 600.0
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
    path: Path
    digest: str | None  # None: a staging directory
    seen_ns: int | None  # when it was last published or touched


def collect(
    layout: Layout,
    artifacts: Artifacts,
    tags: Tags,
    roots: Roots,
    trash: Trash,
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
    with trash.remover():
        if not dry_run:
            trash.settle()
        now = time.time()
        ages = {digest: artifacts.age_ns(digest) for digest in artifacts.digests()}
        held = _held(layout, artifacts, tags, roots, now, grace)
        plans = [*_staging(layout, held, now, grace), *_artifacts(layout, ages, held)]
        if dry_run:
            removed = [plan.removal for plan in plans]
        else:
            removed = _remove(layout, artifacts, tags, roots, trash, plans, grace)
        going = {plan.digest for plan in plans if dry_run}
        for path, removal in list(_small(layout, artifacts, roots, going, now, grace)):
            if not dry_run:
                path.unlink(missing_ok=True)
            removed.append(removal)
        return removed


def _held(
    layout: Layout, artifacts: Artifacts, tags: Tags, roots: Roots, now: float, grace: float
) -> _Held:
    held = _Held()
    # Records before tags and pins: work that ends meanwhile moves its digests that way.
    _operations(layout, held)
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


def _operations(layout: Layout, held: _Held) -> None:
    """Whatever a record of unended work names is held, by digest or by directory name."""
    staged: dict[str, set[str]] = defaultdict(set)
    for path in (layout.root / "staging").glob("*/*"):
        staged[path.name].add(layout.relative(path))
    succeeded: set[str] = set()
    records = layout.root / "operations"
    for pattern in ("*/*/operation.json", "*/executions/*/execution.json"):
        for path in records.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                text = path.read_bytes()
                state, value = _state(text)
                if state == "SUCCEEDED":
                    succeeded.update(_own(layout, path, value))
                if state in _ENDED:
                    continue
                held.digests.update(match.decode() for match in _DIGEST.findall(text))
                words = {path.parent.name, *_WORD.findall(text.decode(errors="replace"))}
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


def _own(layout: Layout, record: Path, value: dict[str, Any]) -> Iterator[str]:
    """The staging directories that a record calls its own, relative to the root."""
    named = value.get("staging")
    if isinstance(named, str) and named:
        yield named
    service = record.relative_to(layout.root / "operations").parts[0]
    yield f"staging/{service}/{record.parent.name}"


def _staging(layout: Layout, held: _Held, now: float, grace: float) -> list[_Plan]:
    done: list[_Plan] = []
    stale: list[_Plan] = []
    for path in sorted((layout.root / "staging").glob("*/*")):
        relative = layout.relative(path)
        if held.holds(relative):
            continue
        if relative in held.succeeded:
            reason, plans = "staging of work that succeeded", done
        elif tree_newest(path) <= now - grace:
            reason, plans = f"staging that nothing wrote to for {grace:.0f} s", stale
        else:
            continue
        removal = Removal(relative, tree_size(path), reason)
        plans.append(_Plan(removal, path, None, None))
    return done + stale


def _artifacts(layout: Layout, ages: Mapping[str, int | None], held: _Held) -> list[_Plan]:
    plans = []
    for digest in sorted(ages):
        if digest in held.digests:
            continue
        path = layout.artifact(digest)
        removal = Removal(
            layout.relative(path),
            tree_size(path),
            "no tag, endpoint, run, operation or lease holds it",
        )
        plans.append(_Plan(removal, path, digest, ages[digest]))
    return plans


def _small(
    layout: Layout,
    artifacts: Artifacts,
    roots: Roots,
    going: set[str | None],
    now: float,
    grace: float,
) -> Iterator[tuple[Path, Removal]]:
    """Records that have lost their meaning: files of some hundred bytes each.

    What expired has no effect from then on; its file gets the grace as well, since
    its owner may be renewing it just now.
    """
    for path, lease in roots.leases():
        if lease.expires <= now - grace:
            yield _file(layout, path, "lease that expired")
    for pin in roots.pins():
        if pin.expires is not None and pin.expires <= now - grace:
            path = layout.root / "roots" / pin.owner / f"{pin.name}.json"
            yield _file(layout, path, "pin that expired")
    there = set(artifacts.digests()) - going
    for path in sorted((layout.root / "results").glob("*/[!.]*.json")):
        with contextlib.suppress(FileNotFoundError):
            text = path.read_bytes()
            if not {match.decode() for match in _DIGEST.findall(text)} <= there:
                yield _file(layout, path, "result of artifacts that are gone")
    for name in ("manifests", "results", "roots", "leases", "waivers", "operations"):
        for path in (layout.root / name).rglob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                age = now - path.lstat().st_mtime
                if is_temporary(path.name) and age >= max(grace, _WRITING_SECONDS):
                    yield _file(layout, path, "left by a writer that was killed")


def _file(layout: Layout, path: Path, reason: str) -> tuple[Path, Removal]:
    size = 0
    with contextlib.suppress(FileNotFoundError):
        size = path.lstat().st_size
    return path, Removal(layout.relative(path), size, reason)


def _remove(
    layout: Layout,
    artifacts: Artifacts,
    tags: Tags,
    roots: Roots,
    trash: Trash,
    plans: list[_Plan],
    grace: float,
) -> list[Removal]:
    for plan in plans:
        trash.doom(plan.path)
    held = _held(layout, artifacts, tags, roots, time.time(), grace)
    for plan in plans:
        if plan.digest is not None and artifacts.age_ns(plan.digest) != plan.seen_ns:
            held.digests.add(plan.digest)  # published again, or used from the cache
    _add_golden(artifacts, held)
    removed = []
    for plan in plans:
        if plan.digest in held.digests or held.holds(plan.removal.path):
            trash.spare(plan.path)
        elif trash.take(plan.path):
            removed.append(plan.removal)
            continue
        log.info("gc leaves %s: it came to be needed", plan.removal.path)
    return removed
