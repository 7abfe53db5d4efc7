"""What garbage collection removes, and above all what it does not."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arriero.errors import Aborted, DataLoss, FailedPrecondition, InvalidArgument, NotFound
from arriero.store import Artifact, ManifestDraft, Store, trash


def removed(store: Store, grace: float = 3600) -> set[str]:
    return {removal.path for removal in store.gc(dry_run=False, grace=grace)}


def place(store: Store, artifact: Artifact) -> str:
    return f"artifacts/{artifact.digest.removeprefix('sha256:')}"


def record(store: Store, path: str, **fields: Any) -> None:
    store.objects.write(f"operations/training/{path}", json.dumps(fields).encode())


@pytest.mark.backends
def test_what_nothing_holds_goes_and_its_manifest_stays(
    store: Store, publish: Callable[..., Artifact], age: Callable[..., None]
) -> None:
    kept, lost = publish(1), publish(2)
    store.tag("model/m:v1", kept.digest)
    age(kept, lost)
    planned = store.gc(dry_run=True)
    assert (planned[-1].path, planned[-1].size) == (place(store, lost), lost.manifest.size)
    assert lost.path.is_dir()
    assert store.gc(dry_run=False) == planned
    assert store.gc(dry_run=False) == []
    assert not any((store.root / "trash").iterdir())
    assert store.manifest(lost.digest) == lost.manifest
    assert store.lineage(lost.digest) == [lost.manifest]
    with pytest.raises(NotFound, match="its manifest is kept"):
        store.get(lost.digest)
    store.verify(kept.digest)


@pytest.mark.backends
def test_a_collected_artifact_can_be_made_again(
    store: Store, publish: Callable[..., Artifact]
) -> None:
    first = publish(created="2026-01-01T00:00:00Z")
    assert place(store, first) in removed(store, grace=0)
    assert publish(created="2026-01-01T00:00:00Z") == first
    store.verify(first.digest)


@pytest.mark.backends
def test_young_artifacts_are_kept(store: Store, publish: Callable[..., Artifact]) -> None:
    publish()
    assert removed(store) == set()


@pytest.mark.backends
def test_every_root_holds(
    store: Store, publish: Callable[..., Artifact], age: Callable[..., None]
) -> None:
    tagged, endpoint, run, leased, used, loose = (publish(n) for n in range(6))
    age(tagged, endpoint, run, leased, used, loose)
    store.tag("model/m:v1", tagged.digest)
    store.pin("endpoints", "live", [endpoint.digest])
    store.pin("runs", "pipeline-1", [run.digest], expires=time.time() + 60)
    record(store, "op1/operation.json", state="RUNNING", inputs={"model": [used.digest]})
    with store.lease("pull", [leased.digest], 60):
        assert removed(store) - {"staging"} == {place(store, loose)} | stale(store)
    assert removed(store) == {place(store, leased)}
    record(store, "op1/operation.json", state="FAILED", inputs={"model": [used.digest]})
    assert removed(store) == {place(store, used)}
    store.unpin("endpoints", "live")
    store.unpin("endpoints", "live")
    assert removed(store) == {place(store, endpoint)}
    store.pin("runs", "pipeline-1", [run.digest], expires=time.time() - 7200)
    assert removed(store) == {place(store, run), "roots/runs/pipeline-1.json"}
    assert store.list() == [tagged]


def stale(store: Store) -> set[str]:
    return {f"staging/dataset/execution-{n}" for n in range(6)}


@pytest.mark.backends
def test_a_pinned_model_that_has_no_tag_keeps_all_that_serving_needs(
    store: Store, publish: Callable[..., Artifact], age: Callable[..., None]
) -> None:
    golden = publish(1, kind="report")
    base = publish(2)
    served = publish(3, kind="gguf", parents=[base.digest], golden=golden.digest)
    other = publish(4, kind="gguf", golden=golden.digest)
    store.pin("endpoints", "live", [served.digest])
    age(golden, base, served, other)
    gone = removed(store)
    assert {place(store, base), place(store, other)} <= gone
    for digest in (served.digest, golden.digest):
        store.verify(digest)
    assert [m.digest for m in store.lineage(served.digest)] == [served.digest, base.digest]
    store.unpin("endpoints", "live")
    assert removed(store) == {place(store, served), place(store, golden)}


@pytest.mark.backends
@pytest.mark.parametrize(
    "state", ["PENDING", "RUNNING", "OPERATION_STATE_RUNNING", "something new", ""]
)
def test_unended_work_keeps_inputs_and_staging(
    store: Store, publish: Callable[..., Artifact], age: Callable[..., None], state: str
) -> None:
    one, two = publish(1), publish(2)
    for name in ("exec-1", "exec-2", "exec-3"):
        (store.staging("training", name) / "checkpoint").write_text("x")
    age(one, two)
    record(store, "op1/operation.json", state=state, execution="exec-1", model=one.digest)
    record(store, "executions/exec-2/execution.json", state=state, spec={"model": two.digest})
    gone = removed(store, grace=0)
    assert "staging/training/exec-3" in gone
    assert not {"staging/training/exec-1", "staging/training/exec-2"} & gone
    store.verify(one.digest)
    store.verify(two.digest)


@pytest.mark.backends
def test_a_record_that_cannot_be_read_counts_as_unended(
    store: Store, publish: Callable[..., Artifact]
) -> None:
    artifact = publish()
    torn = f'{{"state": "SUCCEEDED", "model": "{artifact.digest}", '
    store.objects.write("operations/training/op1/operation.json", torn.encode())
    removed(store, grace=0)
    store.verify(artifact.digest)


@pytest.mark.backends
def test_staging_of_succeeded_work_goes_first_and_needs_no_grace(
    store: Store, publish: Callable[..., Artifact], age: Callable[..., None]
) -> None:
    lost = publish()
    age(lost)
    for name in ("done", "failed", "shared"):
        (store.staging("training", name) / "checkpoint").write_text("xx")
    for name in ("done", "shared"):
        record(store, f"executions/{name}/execution.json", state="SUCCEEDED")
    record(store, "executions/failed/execution.json", state="FAILED")
    record(store, "op1/operation.json", state="SUCCEEDED", staging="staging/training/done")
    record(store, "op2/operation.json", state="RUNNING", execution="shared")
    found = store.gc(dry_run=False)
    assert [removal.path for removal in found] == [
        "staging/training/done",
        "staging/dataset/execution-0",
        place(store, lost),
    ]
    assert found[0].size == 2
    assert sorted(os.listdir(store.root / "staging/training")) == ["failed", "shared"]


@pytest.mark.backends
def test_a_lease_holds_staging_and_can_be_renewed(store: Store, fill: Callable[..., Path]) -> None:
    source = fill()
    lease = store.lease("push", [source], 60)
    assert removed(store, grace=0) == set()
    lease.renew(120)
    assert lease.expires > time.time() + 100
    lease.renew(-1)
    assert removed(store, grace=0) == {
        "staging/dataset/execution-0",
        lease.key,
    }
    with pytest.raises(Aborted, match="expired"):
        lease.renew()
    lease.release()
    with pytest.raises(InvalidArgument, match="outside of the store"):
        store.lease("push", [Path("/etc")], 60)
    with pytest.raises(InvalidArgument, match="climbs out"):
        store.lease("push", ["staging/../../x"], 60)


@pytest.mark.backends
def test_results_of_collected_artifacts_go(store: Store, publish: Callable[..., Artifact]) -> None:
    kept, lost = publish(1), publish(2)
    store.tag("model/m:v1", kept.digest)
    store.put_result("merging", "one", {"model": kept.digest})
    store.put_result("merging", "two", {"model": kept.digest, "golden": lost.digest})
    planned = {removal.path for removal in store.gc(dry_run=True, grace=0)}
    assert planned == removed(store, grace=0)
    assert planned >= {"results/merging/two.json"}
    assert "results/merging/one.json" not in planned
    assert store.get_result("merging", "one") is not None


@pytest.mark.backends
def test_what_a_cached_result_names_is_young_again(
    store: Store, publish: Callable[..., Artifact], age: Callable[..., None]
) -> None:
    artifact = publish()
    store.put_result("merging", "key", {"model": artifact.digest})
    age(artifact)
    assert store.get_result("merging", "key") is not None
    assert place(store, artifact) not in removed(store)


def test_temporary_files_of_killed_writers_go(store: Store) -> None:
    left = store.root / "manifests" / ".abc.json.0123456789ab.tmp"
    left.write_text("{")
    assert removed(store, grace=0) == set()
    os.utime(left, (time.time() - 900,) * 2)
    assert removed(store) == set()
    assert removed(store, grace=0) == {"manifests/.abc.json.0123456789ab.tmp"}


@pytest.mark.backends
def test_roots_that_cannot_be_read_stop_the_collection(
    store: Store, publish: Callable[..., Artifact]
) -> None:
    artifact = publish()
    store.pin("endpoints", "live", [artifact.digest])
    pin = "roots/endpoints/live.json"
    store.objects.write(pin, b"{")
    with pytest.raises(DataLoss, match="the pin"):
        store.gc(dry_run=False, grace=0)
    store.objects.write(pin, b'{"format": 2}')
    with pytest.raises(FailedPrecondition, match="format 2"):
        store.gc(dry_run=False, grace=0)
    store.verify(artifact.digest)


@pytest.mark.backends
def test_a_damaged_manifest_does_not_stop_the_collection(
    store: Store, publish: Callable[..., Artifact]
) -> None:
    damaged, lost = publish(1), publish(2)
    store.pin("runs", "r", [damaged.digest])
    manifest = place(store, damaged).replace("artifacts", "manifests") + ".json"
    store.objects.write(manifest, store.objects.read(manifest)[:50])
    fresh = Store.open(store.url)
    assert place(store, lost) in removed(fresh, grace=0)
    assert damaged.path.is_dir()


@pytest.mark.backends
def test_files_without_a_manifest_are_left_alone(
    store: Store, publish: Callable[..., Artifact]
) -> None:
    artifact = publish()
    store.objects.delete(place(store, artifact).replace("artifacts", "manifests") + ".json")
    assert place(store, artifact) not in removed(store, grace=0)


@pytest.mark.backends
def test_one_collection_at_a_time(store: Store) -> None:
    with store.lock("gc"), pytest.raises(FailedPrecondition, match=str(os.getpid())):
        store.gc(dry_run=False)
    assert store.gc(dry_run=False) == []


@pytest.fixture
def need(
    store: Store, publish: Callable[..., Artifact], age: Callable[..., None]
) -> dict[str, Callable[[], object]]:
    """Ways in which an artifact, the first here, comes to be needed; the other is lost."""
    golden = publish(1, kind="report")
    artifact = publish(2, golden=golden.digest, created="2026-01-01T00:00:00Z")
    lost = publish(3)
    age(artifact, golden, lost)
    digests = [artifact.digest, golden.digest]

    def check() -> None:
        assert place(store, artifact) not in [r.path for r in store.gc(dry_run=False)]
        for digest in digests:
            store.verify(digest)
        assert artifact.path.stat().st_mode & 0o222 == 0
        assert store.list() == [artifact, golden] or store.list() == [golden, artifact]
        assert list((store.root / "trash").iterdir()) == []

    return {
        "tag": lambda: store.tag("model/m:v1", artifact.digest),
        "pin": lambda: store.pin("runs", "r", digests),
        "lease": lambda: store.lease("pull", digests, 60),
        "record": lambda: record(store, "op/operation.json", state="RUNNING", models=digests),
        "publish": lambda: publish(2, golden=golden.digest, created="2026-01-01T00:00:00Z"),
        "get": lambda: [store.get(digest) for digest in digests],
        "check": check,
    }


@pytest.mark.parametrize("root", ["tag", "pin", "lease", "record", "publish", "get"])
def test_what_comes_to_be_needed_before_the_second_look_stays_in_place(
    store: Store,
    need: dict[str, Callable[[], object]],
    monkeypatch: pytest.MonkeyPatch,
    root: str,
) -> None:
    doom = trash.Trash.doom
    doomed: list[Path] = []

    def then_needed(self: trash.Trash, path: Path) -> None:
        doom(self, path)
        doomed.append(path)
        if len(doomed) == 6:  # three staging directories, three artifacts
            need[root]()

    monkeypatch.setattr(trash.Trash, "doom", then_needed)
    assert len(removed(store)) == 4  # the staging directories, and what is lost
    monkeypatch.undo()
    if root == "get":  # keeps from this collection, not from the next
        need["pin"]()
    need["check"]()


@pytest.mark.parametrize("root", ["tag", "pin", "lease", "record"])
def test_who_roots_and_then_gets_after_the_second_look_gets_it_for_good(
    store: Store,
    need: dict[str, Callable[[], object]],
    monkeypatch: pytest.MonkeyPatch,
    root: str,
) -> None:
    take = trash.Trash.take

    def needed_first(self: trash.Trash, path: Path) -> bool:
        monkeypatch.setattr(trash.Trash, "take", take)
        need[root]()
        need["get"]()
        return take(self, path)

    monkeypatch.setattr(trash.Trash, "take", needed_first)
    removed(store)
    need["check"]()


def test_who_comes_after_the_decision_learns_that_it_is_gone(
    store: Store,
    publish: Callable[..., Artifact],
    age: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifact = publish(created="2026-01-01T00:00:00Z")
    age(artifact)
    chmod, claim = Path.chmod, trash.Trash.claim
    asking = threading.Event()
    answers: list[str] = []

    def seen_asking(self: trash.Trash, path: Path) -> bool:
        asking.set()
        return claim(self, path)

    def user() -> None:
        try:
            store.tag("model/m:v1", artifact.digest)
            answers.append("tagged")
        except NotFound:
            answers.append("gone")

    thread = threading.Thread(target=user)

    def asked_now(self: Path, mode: int) -> None:
        if self == artifact.path and not thread.ident:  # decided, not yet moved
            thread.start()
            assert asking.wait(120)
        chmod(self, mode)

    monkeypatch.setattr(trash.Trash, "claim", seen_asking)
    monkeypatch.setattr(Path, "chmod", asked_now)
    assert place(store, artifact) in removed(store)
    thread.join(120)
    assert answers == ["gone"]
    assert store.tags() == []
    assert publish(created="2026-01-01T00:00:00Z") == artifact


def test_a_collection_that_died_over_a_decision_is_settled_by_the_next_user(
    store: Store, publish: Callable[..., Artifact]
) -> None:
    artifact = publish()
    (store.root / "trash" / f"artifacts+{artifact.path.name}.taken").touch()
    half = store.root / "trash" / f"artifacts+{'0' * 64}.dead-0123456789ab"
    half.mkdir()
    assert store.get(artifact.digest) == artifact
    assert list((store.root / "trash").iterdir()) == []
    store.verify(artifact.digest)


def test_a_staging_directory_that_is_asked_for_meanwhile_stays(
    store: Store, age: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (store.staging("training", name) / "checkpoint").write_text("x")
    age()
    take = trash.Trash.take

    def needed_first(self: trash.Trash, path: Path) -> bool:
        if path.name == "a":
            assert (store.staging("training", "a") / "checkpoint").exists()
        return take(self, path)

    monkeypatch.setattr(trash.Trash, "take", needed_first)
    assert removed(store) == {"staging/training/b"}


def test_tagging_and_publishing_race_with_collecting(
    store: Store, publish: Callable[..., Artifact], age: Callable[..., None]
) -> None:
    """Whoever was told that a tag is set finds the artifact under it."""
    fork = multiprocessing.get_context("fork")
    stop = fork.Event()

    def collector() -> None:
        while not stop.is_set():
            store.gc(dry_run=False, grace=60)

    child = fork.Process(target=collector)
    child.start()
    tagged = 0
    try:
        other = publish(0)
        store.tag("model/m:keep", other.digest)
        for n in range(1, 40):
            artifact = publish(n)
            store.tag("model/m:v", other.digest)
            age(artifact, seconds=3600)
            try:
                store.tag("model/m:v", artifact.digest)
            except NotFound:
                assert store.resolve("model/m:v") == other.digest
                continue
            tagged += 1
            for _ in range(3):
                store.verify(artifact.digest)
    finally:
        stop.set()
        child.join(120)
    assert child.exitcode == 0
    assert list((store.root / "trash").iterdir()) == []
    assert tagged > 0


@pytest.mark.backends
def test_publishing_goes_on_beside_a_merciless_collection(
    store: Store, fill: Callable[..., Path]
) -> None:
    """Publications hold leases: even without grace nothing goes while they last."""
    fork = multiprocessing.get_context("fork")
    stop = fork.Event()

    def collector() -> None:
        while not stop.is_set():
            store.gc(dry_run=False, grace=0)

    child = fork.Process(target=collector)
    child.start()
    try:
        for n in range(10 if store.remote else 30):
            source = store.root.parent / f"source-{n}"  # no staging, which would be stale
            source.mkdir()
            (source / "a").write_bytes(str(n).encode())
            artifact = store.publish(source, ManifestDraft(kind="dataset", name="d"))
            assert [entry.path for entry in artifact.manifest.files] == ["a"]
    finally:
        stop.set()
        child.join(120)
    assert child.exitcode == 0
    removed(store, grace=0)
    assert store.list() == []
