"""Garbage collection: remove what no root holds.

Responsibility: find what is held, plan, and remove in an order that loses
nothing that somebody comes to need meanwhile. Does not know why anything is
held.

Nothing is stopped while it runs. What is to go is first renamed, whole, into
`trash/`; then every root is read again, and what is held by now goes back; the
rest is renamed once more, so that nobody takes half of it for the whole, and
deleted. A reader that misses an artifact takes it back from `trash/` itself.
So whoever first writes a root (tag, pin, lease, operation record) and then
looks whether the artifact is there can rely on what it sees.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arriero.errors import DataLoss, NotFound
from arriero.store import lock
from arriero.store.artifacts import Artifacts
from arriero.store.files import (
    fsync_directory,
    is_temporary,
    os_errors,
    remove_tree,
    tree_newest,
    tree_size,
)
from arriero.store.layout import Layout
from arriero.store.roots import Roots
from arriero.store.tags import Tags

log = logging.getLogger(__name__)

_DIGEST = re.compile(rb"sha256:[0-9a-f]{64}")
_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED")
_DEAD = ".dead-"


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
    with lock.hold(layout.root / "locks" / "gc.lock", "garbage collector"):
        if not dry_run:
            _settle(layout)
        now = time.time()
        held = _held(layout, artifacts, tags, roots, now, grace)
        plans = [*_staging(layout, held, now, grace), *_artifacts(layout, artifacts, held)]
        small = list(_small(layout, artifacts, roots, plans, now, grace))
        if dry_run:
            return [plan.removal for plan in plans] + [removal for _, removal in small]
        removed = _remove(layout, artifacts, tags, roots, plans, grace)
        for path, removal in small:
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
    staged = {path.name: layout.relative(path) for path in (layout.root / "staging").glob("*/*")}
    succeeded: set[str] = set()
    records = layout.root / "operations"
    for pattern in ("*/*/operation.json", "*/executions/*/execution.json"):
        for path in records.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                text = path.read_bytes()
                state, value = _state(text)
                own = staged.get(path.parent.name) if path.name == "execution.json" else None
                if state == "SUCCEEDED":
                    succeeded.update(filter(None, (own, _text(value, "staging"))))
                if state in _ENDED:
                    continue
                held.digests.update(match.decode() for match in _DIGEST.findall(text))
                if own is not None:
                    held.paths.add(own)
                words = set(re.findall(r"[A-Za-z0-9._-]+", text.decode(errors="replace")))
                held.paths.update(staged[word] for word in words & staged.keys())
    held.succeeded = {path for path in succeeded if not held.holds(path)}


def _state(text: bytes) -> tuple[str, dict[str, Any]]:
    """The state that a record says, empty where it can't be told: then it counts as running."""
    try:
        value = json.loads(text)
        return str(value["state"]).removeprefix("OPERATION_STATE_"), value
    except (ValueError, TypeError, KeyError):
        return "", {}


def _text(value: dict[str, Any], key: str) -> str:
    found = value.get(key)
    return found if isinstance(found, str) else ""


def _staging(layout: Layout, held: _Held, now: float, grace: float) -> list[_Plan]:
    done, stale = [], []
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


def _artifacts(layout: Layout, artifacts: Artifacts, held: _Held) -> list[_Plan]:
    plans = []
    for digest in sorted(artifacts.digests()):
        if digest in held.digests:
            continue
        path = layout.artifact(digest)
        removal = Removal(
            layout.relative(path),
            tree_size(path),
            "no tag, endpoint, run, operation or lease holds it",
        )
        plans.append(_Plan(removal, path, digest, artifacts.age_ns(digest)))
    return plans


def _small(
    layout: Layout,
    artifacts: Artifacts,
    roots: Roots,
    plans: list[_Plan],
    now: float,
    grace: float,
) -> Iterator[tuple[Path, Removal]]:
    """Records that have lost their meaning: files of some hundred bytes each."""
    for path, lease in roots.leases():
        if lease.expires <= now:
            yield _file(layout, path, "lease that expired")
    for pin in roots.pins():
        if pin.expires is not None and pin.expires <= now:
            path = layout.root / "roots" / pin.owner / f"{pin.name}.json"
            yield _file(layout, path, "pin that expired")
    there = set(artifacts.digests()) - {plan.digest for plan in plans}
    for path in sorted((layout.root / "results").glob("*/[!.]*.json")):
        with contextlib.suppress(FileNotFoundError):
            text = path.read_bytes()
            if not {match.decode() for match in _DIGEST.findall(text)} <= there:
                yield _file(layout, path, "result of artifacts that are gone")
    for name in ("manifests", "results", "roots", "leases", "waivers", "operations"):
        for path in (layout.root / name).rglob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if is_temporary(path.name) and path.lstat().st_mtime <= now - grace:
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
    plans: list[_Plan],
    grace: float,
) -> list[Removal]:
    doubtful: list[tuple[_Plan, Path]] = []
    for plan in plans:
        trash = (
            layout.root / "trash" / plan.removal.path.removeprefix("artifacts/").replace("/", "+")
        )
        if _move(plan.path, trash):
            doubtful.append((plan, trash))
    held = _held(layout, artifacts, tags, roots, time.time(), grace)
    removed = []
    for plan, trash in doubtful:
        if plan.digest is None:
            wanted = held.holds(plan.removal.path)
        else:
            touched = artifacts.age_ns(plan.digest) != plan.seen_ns
            wanted = touched or plan.digest in held.digests
        if wanted and _move(trash, plan.path):
            log.info("gc put %s back: it came to be needed", plan.removal.path)
        elif _delete(trash):
            removed.append(plan.removal)
    return removed


def _settle(layout: Layout) -> None:
    """Finish what a gc that was killed had begun: put whole things back, delete the rest."""
    for path in (layout.root / "trash").iterdir():
        if _DEAD in path.name:
            remove_tree(path)
            continue
        home = "artifacts" if "+" not in path.name else ""
        if not _move(path, layout.root / home / path.name.replace("+", "/")):
            _delete(path)


def _delete(path: Path) -> bool:
    """Delete a tree that is whole; False when somebody has taken it back."""
    dead = path.with_name(f"{path.name}{_DEAD}{secrets.token_hex(6)}")
    if not _move(path, dead):
        return False
    remove_tree(dead)
    return True


def _move(source: Path, target: Path) -> bool:
    """Rename a directory; False when it is gone, or something else is there."""
    with os_errors(source):
        try:
            _writable(source)
            source.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
    fsync_directory(target.parent)
    return True


def _writable(directory: Path) -> None:
    """Moving a directory to another rewrites its `..`, which its mode must allow."""
    directory.chmod(0o755)
