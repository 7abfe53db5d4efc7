"""Tags, and the races for them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from arriero.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from arriero.gates import GateResult
from arriero.store import Artifact, Store, tags

TAG = "model/m:prod"


def entries(store: Store) -> Path:
    return store.root / "tags" / "model" / "m" / "prod"


@pytest.mark.backends
def test_a_tag_moves_and_remembers(store: Store, publish: Callable[..., Artifact]) -> None:
    one, two = publish(1), publish(2)
    store.tag(TAG, one.digest)
    store.tag(TAG, two.digest)
    store.tag("model/m:old", one.digest)
    assert store.get(TAG) == two
    assert [(e.tag, e.digest) for e in store.tags()] == [
        ("model/m:old", one.digest),
        (TAG, two.digest),
    ]
    assert store.tags("gguf") == []
    assert [e.digest for e in store.tag_history(TAG)] == [two.digest, one.digest]


@pytest.mark.backends
def test_setting_what_is_set_writes_nothing(store: Store, publish: Callable[..., Artifact]) -> None:
    artifact = publish()
    for expected in ("none", artifact.digest, None):
        store.tag(TAG, artifact.digest, expected=expected)
    assert len(list(store.objects.find("tags/"))) == 1


@pytest.mark.backends
def test_an_expectation_that_does_not_hold_aborts(
    store: Store, publish: Callable[..., Artifact]
) -> None:
    one, two = publish(1), publish(2)
    with pytest.raises(Aborted, match=f"points at nothing, expected {two.digest}"):
        store.tag(TAG, one.digest, expected=two.digest)
    store.tag(TAG, one.digest, expected="none")
    with pytest.raises(Aborted, match=f"points at {one.digest}, expected none"):
        store.tag(TAG, two.digest, expected="none")
    store.tag(TAG, two.digest, expected=one.digest)
    assert store.resolve(TAG) == two.digest


@pytest.mark.backends
def test_a_quarantined_artifact_is_not_taggable_until_waived(
    store: Store, publish: Callable[..., Artifact], failed: GateResult
) -> None:
    artifact = publish(gates=[failed])
    assert artifact.quarantined
    with pytest.raises(FailedPrecondition, match=r"quarantined.*merge\.delta"):
        store.tag(TAG, artifact.digest)
    assert store.tags() == []
    store.waive(artifact.digest, "merge.delta", "checked by hand", "me")
    assert not store.get(artifact.digest).quarantined
    assert artifact.manifest.quarantined  # what was found is not rewritten
    store.tag(TAG, artifact.digest)
    (waiver,) = store.waivers(artifact.digest)
    assert (waiver.gate, waiver.reason, waiver.who) == ("merge.delta", "checked by hand", "me")


@pytest.mark.backends
def test_waivers_say_who_and_why_and_are_for_failed_gates(
    store: Store, publish: Callable[..., Artifact], failed: GateResult
) -> None:
    artifact = publish(gates=[failed])
    with pytest.raises(InvalidArgument, match="reason"):
        store.waive(artifact.digest, "merge.delta", " ", "me")
    with pytest.raises(InvalidArgument, match="who"):
        store.waive(artifact.digest, "merge.delta", "because", "")
    with pytest.raises(FailedPrecondition, match=r"failed gates: merge\.delta"):
        store.waive(artifact.digest, "../../up", "because", "me")
    with pytest.raises(NotFound):
        store.waive("sha256:" + "0" * 64, "merge.delta", "because", "me")
    assert store.waivers(artifact.digest) == []


@pytest.mark.backends
def test_wrong_tags_are_refused(store: Store, publish: Callable[..., Artifact]) -> None:
    artifact = publish()
    with pytest.raises(InvalidArgument, match="is for a gguf"):
        store.tag("gguf/m:v1", artifact.digest)
    with pytest.raises(InvalidArgument, match="not a tag"):
        store.tag(f"model/m@{artifact.digest}", artifact.digest)
    with pytest.raises(InvalidArgument, match="expected a digest"):
        store.tag(TAG, artifact.digest, expected="v1")
    with pytest.raises(InvalidArgument, match="digest"):
        store.tag(TAG, "model/m:v1")
    with pytest.raises(NotFound):
        store.tag(TAG, "sha256:" + "0" * 64)
    assert store.tags() == []


@pytest.mark.backends
def test_of_processes_that_expect_the_same_one_wins(
    store: Store, publish: Callable[..., Artifact]
) -> None:
    digests = [publish(n).digest for n in range(6)]
    fork = multiprocessing.get_context("fork")
    expected = "none"
    rounds = 2 if store.remote else 8
    for _ in range(rounds):
        barrier = fork.Barrier(len(digests))
        winners = fork.SimpleQueue()

        def one(digest: str, expected=expected, barrier=barrier, winners=winners) -> None:
            if digest == expected:  # setting what is set is no race
                barrier.wait()
                return
            barrier.wait()
            try:
                store.tag(TAG, digest, expected=expected)
                winners.put(digest)
            except Aborted:
                pass

        children = [fork.Process(target=one, args=(digest,)) for digest in digests]
        for child in children:
            child.start()
        for child in children:
            child.join(120)
            assert child.exitcode == 0
        won = winners.get()
        assert winners.empty()
        assert store.resolve(TAG) == won
        expected = won
    assert len(store.tag_history(TAG)) == rounds


@pytest.mark.backends
def test_setters_without_expectation_all_succeed(
    store: Store, publish: Callable[..., Artifact]
) -> None:
    digests = [publish(n).digest for n in range(4)]
    fork = multiprocessing.get_context("fork")

    def many(digest: str) -> None:
        for _ in range(4 if store.remote else 10):
            store.tag(TAG, digest)

    children = [fork.Process(target=many, args=(digest,)) for digest in digests]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    keys = [found.key for found in store.objects.find("tags/model/m/prod/")]
    numbers = sorted(int(key.rpartition("/")[2]) for key in keys)
    assert numbers == list(range(1, len(numbers) + 1))
    assert store.resolve(TAG) == store.tag_history(TAG)[0].digest


def test_an_entry_whose_setter_was_killed_does_not_count(
    store: Store, publish: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tags, "UNWRITTEN_SECONDS", 0.05)
    one, two = publish(1), publish(2)
    store.tag(TAG, one.digest)
    (entries(store) / "2").touch()
    assert store.resolve(TAG) == one.digest
    store.tag(TAG, two.digest, expected=one.digest)
    assert store.resolve(TAG) == two.digest


def test_a_setter_that_slept_and_was_passed_is_told_so(
    store: Store, publish: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tags, "UNWRITTEN_SECONDS", 0.05)
    one, two, three = publish(1), publish(2), publish(3)
    store.tag(TAG, one.digest)
    asleep, wake = threading.Event(), threading.Event()
    write = os.write

    def slow(fd: int, data: bytes) -> int:
        if threading.current_thread() is not threading.main_thread():
            asleep.set()
            wake.wait(120)
        return write(fd, data)

    monkeypatch.setattr(os, "write", slow)
    said: list[str] = []

    def sleeper() -> None:
        try:
            store.tag(TAG, two.digest, expected=one.digest)
        except Aborted as error:
            said.append(error.message)

    thread = threading.Thread(target=sleeper)
    thread.start()
    assert asleep.wait(120)
    store.tag(TAG, three.digest, expected=one.digest)
    wake.set()
    thread.join(120)
    assert said
    assert "another setter passed" in said[0]
    assert store.resolve(TAG) == three.digest


def test_who_passes_a_setter_that_wakes_up_in_time_gives_way(
    store: Store, publish: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tags, "UNWRITTEN_SECONDS", 0.05)
    one, two, three = publish(1), publish(2), publish(3)
    store.tag(TAG, one.digest)
    waking = entries(store) / "2"
    waking.touch()
    content = (entries(store) / "1").read_bytes().replace(one.digest.encode(), two.digest.encode())
    opened = os.open

    def wakes_now(path: str | Path, flags: int, mode: int = 0o777, **rest: int) -> int:
        fd = opened(path, flags, mode, **rest)
        if Path(path) == entries(store) / "3":
            waking.write_bytes(content)
        return fd

    monkeypatch.setattr(os, "open", wakes_now)
    with pytest.raises(Aborted, match=f"points at {two.digest}"):
        store.tag(TAG, three.digest, expected=one.digest)
    assert store.resolve(TAG) == two.digest
    store.tag(TAG, three.digest, expected=two.digest)
    assert store.resolve(TAG) == three.digest
