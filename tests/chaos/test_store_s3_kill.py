"""SIGKILL of whoever writes to a store in S3, before each request that it makes."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest

from arriero.errors import NotFound
from arriero.store import FileEntry, ManifestDraft, Store
from arriero.store.s3 import S3Backend, transfer

pytestmark = pytest.mark.forks

FILES = {"config.json": b"{}", "sub/weights": bytes(range(256)) * (6 << 12)}
DRAFT = ManifestDraft(
    kind="model",
    name="m",
    files=[
        FileEntry(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in FILES.items()
    ],
    created="2026-01-01T00:00:00Z",
)


def dies_at(n: int, store: Store, work: Callable[[], object]) -> bool:
    """Run `work` in a child that dies before its n-th request; False when it came through."""
    assert isinstance(store._backend, S3Backend)
    bucket = store._backend._bucket
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status, count = 70, itertools.count(1)

        def called(**_: object) -> None:
            if next(count) == n:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            bucket.client.meta.events.register("before-send.s3", called)
            work()
            status = 0
        finally:
            os._exit(status)
    _, how = os.waitpid(child, 0)
    if os.WIFEXITED(how):
        assert os.WEXITSTATUS(how) == 0, "the child failed by itself"
        return False
    assert os.WTERMSIG(how) == signal.SIGKILL
    return True


def fill(store: Store, files: Mapping[str, bytes] = FILES) -> Path:
    source = store.staging("training", "e") / "out"
    for path, data in files.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        if not (source / path).exists():
            (source / path).write_bytes(data)
    return source


def check(store: Store) -> list[str]:
    """What anybody may rely on: all that is there is whole."""
    fresh = Store.open(store.url)
    for artifact in fresh.list():
        with contextlib.suppress(NotFound):  # decided, by a collector that died over it
            fresh.verify(artifact.digest)
    found = [artifact.digest for artifact in fresh.list()]
    for digest in found:
        fresh.verify(digest)
    return found


def test_a_publisher_killed_anywhere_leaves_nothing_or_all(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PART_BYTES", 5 << 20)
    outcomes = []
    for n in itertools.count(1):
        store = Store.open(f"{s3_url}-{n}")
        source = fill(store)
        if not dies_at(n, store, partial(store.publish, source, DRAFT)):
            break
        outcomes.append(len(check(store)))
        # Whoever comes next finishes, whatever was left; then nothing else is.
        again = store.publish(fill(store), DRAFT)
        assert check(store) == [again.digest]
        store.tag("model/m:v1", again.digest)
        for lease in list(store.objects.find("leases/")):  # as after an hour
            store.objects.delete(lease.key)
        store.gc(dry_run=False, grace=0)
        assert check(store) == [again.digest]
        files = [record.key for record in store.objects.find("files/")]
        assert len({key.split("/")[1] for key in files}) == 1
    assert outcomes.count(0) > 8
    assert outcomes == sorted(outcomes)  # one instant divides nothing from all


def test_a_tag_setter_killed_anywhere_leaves_the_old_value_or_the_new(s3_url: str) -> None:
    store = Store.open(s3_url)
    one = store.publish(fill(store), DRAFT).digest
    two = store.publish(fill(store), ManifestDraft("model", "m")).digest
    seen = set()
    for n in itertools.count(1):
        store.tag("model/m:v1", one)
        came = not dies_at(n, store, lambda: store.tag("model/m:v1", two, expected=one))
        value = Store.open(s3_url).resolve("model/m:v1")
        assert value in (one, two)
        seen.add(value)
        if came:
            assert value == two
            break
    assert seen == {one, two}


def test_a_collection_killed_anywhere_leaves_only_whole_artifacts(s3_url: str) -> None:
    store = Store.open(s3_url)
    kept = store.publish(fill(store, {"a": b"kept"}), ManifestDraft("model", "m")).digest
    store.tag("model/m:v1", kept)
    for n in itertools.count(1, 7):
        draft = ManifestDraft("model", "m", labels={"n": str(n)})
        lost = store.publish(fill(store, {"a": b"lost"}), draft).digest
        died = dies_at(n, store, lambda: store.gc(dry_run=False, grace=0))
        found = set(check(store))
        assert kept in found
        assert found <= {kept, lost}
        store.gc(dry_run=False, grace=0)
        assert check(store) == [kept]
        assert len(list(store.objects.find("present/"))) == 1
        if not died:
            break
    assert n > 10
