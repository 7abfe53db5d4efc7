"""SIGKILL of whoever writes to the store, at every operation that it does.

A child process counts its calls of the operating system (audit events of the
interpreter, and fsync and write, which have none) and kills itself at the n-th,
for every n until it comes through.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from arriero.store import FileEntry, ManifestDraft, Store, tags
from arriero.store.files import remove_tree

pytestmark = pytest.mark.forks

EVENTS = frozenset(
    {
        "open",
        "os.chmod",
        "os.listdir",
        "os.mkdir",
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.scandir",
        "os.utime",
    }
)
FILES = {"config.json": b"{}", "sub/model.safetensors": bytes(range(256)) * 64, "z": b""}
DRAFT = ManifestDraft(
    kind="model",
    name="m",
    files=[
        FileEntry(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in FILES.items()
    ],
    created="2026-01-01T00:00:00Z",
)


def kill_at(n: int) -> None:
    """From now on, die at the n-th call."""
    count = itertools.count(1)

    def called() -> None:
        if next(count) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            called()
            return function(*args)

        return call

    os.fsync = counted(os.fsync)  # type: ignore[assignment]
    os.write = counted(os.write)  # type: ignore[assignment]
    sys.addaudithook(lambda event, args: called() if event in EVENTS else None)


def killed_everywhere(work: Callable[[], object]) -> Iterator[int]:
    """Run `work` in children that die at their 1st, 2nd, ... call; yield after each death."""
    for n in itertools.count(1):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            status = 70
            try:
                kill_at(n)
                work()
                status = 0
            finally:
                os._exit(status)
        _, how = os.waitpid(child, 0)
        if os.WIFEXITED(how):
            assert os.WEXITSTATUS(how) == 0, "the child failed by itself"
            return
        assert os.WTERMSIG(how) == signal.SIGKILL
        yield n


def fill(store: Store, name: str) -> Path:
    source = store.staging("dataset", name) / "out"
    for path, data in FILES.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(data)
    return source


def check(root: Path) -> Store:
    """What anybody who opens the store now may rely on."""
    store = Store.open(root)
    there = sorted(os.listdir(root / "artifacts"))
    assert sorted(a.digest.removeprefix("sha256:") for a in store.list()) == there
    for artifact in store.list():
        store.verify(artifact.digest)
        assert store.get(artifact.digest).path.stat().st_mode & 0o222 == 0
    return store


@pytest.mark.parametrize("announced", [True, False])
def test_a_publisher_killed_anywhere_leaves_nothing_or_all(tmp_path: Path, announced: bool) -> None:
    draft = DRAFT if announced else ManifestDraft("model", "m", created=DRAFT.created)
    root = tmp_path / "store"
    store = Store.open(root)
    source = fill(store, "e")
    outcomes = []
    for _ in killed_everywhere(partial(store.publish, source, draft)):
        found = check(root).list()
        assert len(found) <= 1
        outcomes.append(len(found))
        if found:
            assert not source.exists()
        # Whoever comes next finishes, whatever was left.
        if source.exists() or announced:
            again = Store.open(root).publish(source, draft)
        else:
            again = found[0]
        assert not found or again == found[0]
        assert check(root).list() == [again]
        # Clear the stage for the next death.
        remove_tree(root)
        Store.open(root)
        fill(store, "e")
    assert outcomes.count(0) > 20
    assert outcomes.count(1) > 2
    assert outcomes == sorted(outcomes)  # one instant divides nothing from all


def test_a_second_publisher_killed_anywhere_leaves_the_first_ones_artifact(
    tmp_path: Path,
) -> None:
    root = tmp_path / "store"
    store = Store.open(root)
    first = store.publish(fill(store, "first"), DRAFT)
    unannounced = ManifestDraft("model", "m", created=DRAFT.created)
    for draft in (DRAFT, unannounced):
        source = fill(store, "second")
        for _ in killed_everywhere(partial(store.publish, source, draft)):
            assert check(root).list() == [first]
            remove_tree(source)
            fill(store, "second")
        assert check(root).list() == [first]


def test_a_tag_setter_killed_anywhere_leaves_the_old_value_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tags, "UNWRITTEN_SECONDS", 0.02)
    root = tmp_path / "store"
    store = Store.open(root)
    one = store.publish(fill(store, "1"), DRAFT)
    two = store.publish(fill(store, "2"), ManifestDraft("model", "m"))
    store.tag("model/m:v1", one.digest)
    seen = set()
    for _ in killed_everywhere(lambda: store.tag("model/m:v1", two.digest, expected=one.digest)):
        value = check(root).resolve("model/m:v1")
        assert value in (one.digest, two.digest)
        seen.add(value)
        # The next setter is not hindered.
        for digest in (one.digest, two.digest):
            store.tag("model/m:v1", digest, expected=value)
            assert store.resolve("model/m:v1") == digest
            value = digest
        remove_tree(root / "tags" / "model")
        store.tag("model/m:v1", one.digest)
    assert seen == {one.digest, two.digest}


def test_a_collection_killed_anywhere_leaves_only_whole_artifacts(tmp_path: Path) -> None:
    root = tmp_path / "store"
    store = Store.open(root)
    kept = store.publish(fill(store, "kept"), DRAFT)
    store.tag("model/m:v1", kept.digest)

    def litter() -> str:
        digest = store.publish(fill(store, "lost"), ManifestDraft("model", "m")).digest
        (store.staging("training", "stale") / "checkpoint").write_text("x")
        return digest

    lost = litter()
    for _ in killed_everywhere(lambda: store.gc(dry_run=False, grace=0)):
        found = {artifact.digest for artifact in check(root).list()}
        assert kept.digest in found <= {kept.digest, lost}
        assert store.get("model/m:v1") == kept
        # The next one finishes what this one had begun.
        store.gc(dry_run=False, grace=0)
        assert check(root).list() == [kept]
        assert list((root / "trash").iterdir()) == []
        assert not any(path.is_file() for path in (root / "staging").rglob("*"))
        assert store.manifest(lost).digest == lost
        lost = litter()


def test_a_record_writer_killed_anywhere_leaves_the_old_record_or_the_new(
    tmp_path: Path,
) -> None:
    root = tmp_path / "store"
    store = Store.open(root)
    old, new = "sha256:" + "0" * 64, "sha256:" + "1" * 64
    store.pin("endpoints", "live", [old])
    for _ in killed_everywhere(lambda: store.pin("endpoints", "live", [new])):
        (pin,) = Store.open(root).pins()
        assert pin.digests in ((old,), (new,))
        store.pin("endpoints", "live", [old])


def test_a_store_whose_maker_was_killed_anywhere_can_be_opened(tmp_path: Path) -> None:
    root = tmp_path / "store"
    for _ in killed_everywhere(lambda: Store.open(root)):
        store = check(root)
        store.publish(fill(store, "e"), DRAFT)
        remove_tree(root)


def test_a_publisher_killed_from_outside_at_any_moment(tmp_path: Path) -> None:
    """As an operator does it: a process of its own, many files, a signal at a random time."""
    root = tmp_path / "store"
    code = (
        "import sys; from pathlib import Path\n"
        "from arriero.store import ManifestDraft, Store\n"
        "store = Store.open(sys.argv[1]); print('ready', flush=True)\n"
        "for n in range(1000):\n"
        "    source = store.staging('dataset', f'{sys.argv[2]}-{n}') / 'out'\n"
        "    source.mkdir()\n"
        "    for i in range(10): (source / str(i)).write_bytes(bytes(1000 * i))\n"
        "    store.publish(source, ManifestDraft('dataset', 'd', labels={'n': str(n)}))\n"
    )
    moments = random.Random(7)
    for attempt in range(5):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(root), str(attempt)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(moments.uniform(0.0, 0.25))
        child.kill()
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        for artifact in check(root).list():
            assert len(artifact.manifest.files) == 10
