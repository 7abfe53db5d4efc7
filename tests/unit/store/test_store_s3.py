"""What a store in S3 does beyond what any store does: cache, locks, orphans, refusals."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from arriero.errors import (
    DataLoss,
    DiskFull,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from arriero.store import Artifact, FileEntry, ManifestDraft, Store
from arriero.store.s3 import S3Backend, lease, outline, transfer
from arriero.store.s3.bucket import Bucket
from arriero.store.s3.places import Places
from arriero.testing.s3 import serving_s3

DRAFT = ManifestDraft(kind="model", name="m")


@pytest.fixture
def store(s3_url: str) -> Store:
    return Store.open(s3_url)


@pytest.fixture
def elsewhere(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The same store, opened on another machine."""
    monkeypatch.setenv("ARRIERO_STORE_CACHE", str(tmp_path / "another"))
    return Store.open(store.url)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 12 MiB has three parts, the least that S3 takes."""
    monkeypatch.setattr(transfer, "PART_BYTES", 5 << 20)


def backend(store: Store) -> S3Backend:
    assert isinstance(store._backend, S3Backend)
    return store._backend


def bucket(store: Store) -> Bucket:
    return backend(store)._bucket


def keys(store: Store, prefix: str) -> list[str]:
    return [found.key for found in bucket(store).find(prefix)]


def big(store: Store, name: str = "big", size: int = 12 << 20) -> Path:
    source = store.staging("training", name) / "out"
    source.mkdir()
    (source / "weights").write_bytes(os.urandom(1 << 20) * (size >> 20))
    (source / "config.json").write_text("{}")
    return source


def requests(store: Store, operation: str) -> list[dict[str, Any]]:
    """The requests of one kind that this process makes from now on."""
    made: list[dict[str, Any]] = []
    bucket(store).client.meta.events.register(
        f"provide-client-params.s3.{operation}", lambda params, **_: made.append(dict(params))
    )
    return made


def test_a_store_on_files_needs_no_boto3(tmp_path: Path) -> None:
    code = (
        "import sys, arriero.store as s; s.Store.open(sys.argv[1]); print('boto3' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


# Bytes


def test_parts_go_and_come_side_by_side(store: Store, elsewhere: Store, small_parts: None) -> None:
    source = big(store)
    digest = hashlib.sha256((source / "weights").read_bytes()).hexdigest()
    parts = requests(store, "UploadPart")
    artifact = store.publish(source, DRAFT)
    assert sorted(part["PartNumber"] for part in parts) == [1, 2, 3]
    assert all(part["ChecksumSHA256"] for part in parts)
    assert artifact.manifest.files[1] == FileEntry("weights", 12 << 20, digest)
    ranges = requests(elsewhere, "GetObject")
    found = elsewhere.get(artifact.digest)
    assert not any("Range" in request for request in ranges)  # a manifest needs no files
    assert hashlib.sha256(found.file("weights").read_bytes()).hexdigest() == digest
    assert sum("Range" in request for request in ranges) == 4
    assert elsewhere.get(artifact.digest).path == found.path
    assert sum("Range" in request for request in ranges) == 4
    elsewhere.verify(artifact.digest)


def test_what_was_published_here_is_not_fetched(store: Store) -> None:
    source = big(store)
    fetched = requests(store, "GetObject")
    artifact = store.publish(source, DRAFT)
    assert artifact.file("weights").stat().st_size == 12 << 20
    assert not any("Range" in request for request in fetched)
    assert artifact.path.is_relative_to(store.root)


def test_a_fetch_that_was_killed_goes_on_where_it_was(
    store: Store, elsewhere: Store, small_parts: None
) -> None:
    artifact = store.publish(big(store), DRAFT)
    code = (
        "import os, sys\n"
        "from arriero.store import Store\n"
        "from arriero.store.s3 import transfer\n"
        "transfer.PART_BYTES = 5 << 20\n"
        "read, parts = transfer.read_range, []\n"
        "def slow(bucket, key, first, last):\n"
        "    if first and parts: os.kill(os.getpid(), 9)\n"
        "    data = read(bucket, key, first, last); parts.append(1); return data\n"
        "transfer.read_range = slow\n"
        "transfer.THREADS = 1\n"
        "from arriero.store.s3 import bucket\n"
        "bucket.THREADS = 1\n"
        "Store.open(sys.argv[1]).get(sys.argv[2]).path\n"
    )
    child = subprocess.run([sys.executable, "-c", code, store.url, artifact.digest])
    assert child.returncode == -signal.SIGKILL
    name = artifact.digest.removeprefix("sha256:")
    assert not (elsewhere.root / "artifacts" / name).exists()
    assert (elsewhere.root / "partial" / name).is_dir()
    ranges = requests(elsewhere, "GetObject")
    weights = elsewhere.get(artifact.digest).file("weights")
    assert sum("Range" in request for request in ranges) < 4
    assert weights.read_bytes() == artifact.file("weights").read_bytes()
    assert not any((elsewhere.root / "partial").iterdir())


def test_what_a_killed_fetch_left_wrong_is_fetched_again(
    store: Store, elsewhere: Store, small_parts: None
) -> None:
    artifact = store.publish(big(store), DRAFT)
    partial = elsewhere.root / "partial" / artifact.digest.removeprefix("sha256:")
    partial.mkdir()
    (partial / "weights").write_bytes(bytes(12 << 20))  # as after a loss of power
    (partial / ".weights.parts").write_text(f"{5 << 20} 0\n{5 << 20} 1\n")
    found = elsewhere.get(artifact.digest).file("weights")
    assert found.read_bytes() == artifact.file("weights").read_bytes()
    assert sorted(path.name for path in found.parent.iterdir()) == ["config.json", "weights"]


def test_an_outline_has_headers_and_small_files_and_no_weights(
    store: Store, elsewhere: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outline, "HEAD_BYTES", 100)
    monkeypatch.setattr(outline, "LARGEST", 1 << 20)
    header = b'{"w":{"dtype":"U8","shape":[4194304],"data_offsets":[0,4194304]}}'.ljust(300)
    whole = len(header).to_bytes(8, "little") + header + b"1" * (4 << 20)
    source = store.staging("training", "model") / "out"
    source.mkdir()
    (source / "model.safetensors").write_bytes(whole)
    (source / "old.bin").write_bytes(bytes(2 << 20))
    (source / "config.json").write_text("{}")
    digest = store.publish(source, DRAFT).digest
    ranges = requests(elsewhere, "GetObject")
    artifact = elsewhere.get(digest)
    place = artifact.outline
    assert place.name == digest.removeprefix("sha256:")
    assert artifact.outline == place
    assert {path.name for path in place.iterdir()} == {"model.safetensors", "config.json"}
    assert (place / "config.json").read_text() == "{}"
    there = (place / "model.safetensors").read_bytes()
    assert there == whole[:308] + bytes(4 << 20)
    asked = [request["Range"] for request in ranges if "Range" in request]
    assert sorted(asked) == ["bytes=0-1", "bytes=0-99", "bytes=100-307"]
    del artifact
    assert not place.exists()
    # What is here already is looked at where it is.
    whole_place = elsewhere.get(digest).path
    assert elsewhere.get(digest).outline == whole_place
    assert (whole_place / "model.safetensors").read_bytes() == whole


def test_an_outline_of_what_is_damaged_in_the_bucket_is_refused(
    store: Store, elsewhere: Store
) -> None:
    digest = store.publish(big(store), DRAFT).digest
    [config] = [key for key in keys(store, "files/") if key.endswith("config.json")]
    bucket(store).put(config, b"[]")
    with pytest.raises(DataLoss, match="other bytes"):
        _ = elsewhere.get(digest).outline
    bucket(store).delete([config])
    with pytest.raises(DataLoss, match="is gone"):
        _ = elsewhere.get(digest).outline


def test_of_processes_that_want_the_same_one_fetches(store: Store, elsewhere: Store) -> None:
    artifact = store.publish(big(store), DRAFT)
    code = (
        "import sys; from arriero.store import Store; from arriero.store.s3 import transfer\n"
        "read = transfer.read_range\n"
        "def told(*a): print('fetched', flush=True); return read(*a)\n"
        "transfer.read_range = told\n"
        "a = Store.open(sys.argv[1]).get(sys.argv[2])\n"
        "assert a.file('weights').stat().st_size == 12 << 20"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, store.url, artifact.digest], stdout=subprocess.PIPE
        )
        for _ in range(3)
    ]
    said = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert sorted(text.count(b"fetched") for text in said) == [0, 0, 2]


@pytest.mark.parametrize("data", [b"x" * 1000, b"", b"y" * 1001])
def test_bytes_that_somebody_changed_are_told_and_never_shown(
    store: Store, elsewhere: Store, fill: Callable[..., Path], data: bytes
) -> None:
    artifact = store.publish(fill(), DRAFT)
    (key,) = [key for key in keys(store, "files/") if key.endswith("sub/weights.bin")]
    bucket(store).put(key, data)
    found = elsewhere.get(artifact.digest)
    with pytest.raises(DataLoss, match=r"sub/weights\.bin.* somebody changed the bucket"):
        _ = found.path
    assert not any((elsewhere.root / "artifacts").iterdir())
    (problem,) = store.problems(artifact.digest)
    assert problem.startswith("sub/weights.bin has")
    bucket(store).delete([key])
    assert store.problems(artifact.digest) == ["sub/weights.bin is missing"]
    with pytest.raises(DataLoss, match="is missing"):
        store.verify(artifact.digest)
    with pytest.raises(DataLoss, match=r"sub/weights\.bin is gone"):
        _ = found.path


# The cache


def test_the_longest_unused_goes_first_and_what_is_in_use_never(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = [store.publish(big(store, str(n), 2 << 20), DRAFT).digest for n in range(4)]
    monkeypatch.setenv("ARRIERO_STORE_CACHE", str(tmp_path / "small"))
    monkeypatch.setenv("ARRIERO_STORE_CACHE_BYTES", str(5 << 20))
    small = Store.open(store.url)

    def held() -> set[str]:
        return {f"sha256:{path.name}" for path in (small.root / "artifacts").iterdir()}

    used = small.get(digests[0])
    assert used.path.is_dir()
    assert small.get(digests[1]).path.is_dir()
    assert held() == {digests[0], digests[1]}
    assert small.get(digests[2]).path.is_dir()
    assert held() == {digests[0], digests[2]}  # the first is older, but in use
    second = small.get(digests[2])
    assert second.path.is_dir()
    with pytest.raises(DiskFull, match=r"ARRIERO_STORE_CACHE_BYTES is 5\.0 MiB") as caught:
        _ = small.get(digests[3]).path
    assert caught.value.needed == small.manifest(digests[3]).size
    del used, second
    assert small.get(digests[3]).path.is_dir()
    assert digests[3] in held()
    monkeypatch.setenv("ARRIERO_STORE_CACHE_BYTES", "a lot")
    with pytest.raises(Exception, match="expected a count of bytes"):
        Store.open(store.url)


def test_work_that_needs_the_disk_gets_what_is_only_cached(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = store.publish(big(store), DRAFT)
    digest, path = artifact.digest, artifact.path
    free = [1000, 1000, 50_000_000]
    for module in ("arriero.store.disk", "arriero.store.s3.backend", "arriero.store.s3.cache"):
        monkeypatch.setattr(f"{module}.free_bytes", lambda _: free[0] if path.exists() else free[2])
    with pytest.raises(DiskFull):
        store.preflight(2000)
    assert path.exists()  # somebody has it
    del artifact
    store.preflight(2000)
    assert not path.exists()
    store.verify(digest)


# Publishing


def test_files_that_a_job_left_in_the_bucket_are_published_without_coming_here(
    store: Store, elsewhere: Store
) -> None:
    source = big(elsewhere)
    entries = [
        FileEntry(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in source.iterdir()
    ]
    elsewhere.keep(source)
    here = store.root / source.relative_to(elsewhere.root)
    assert not here.exists()
    draft = ManifestDraft(kind="model", name="m", files=entries, created="2026-01-01T00:00:00Z")
    fetched = requests(store, "GetObject")
    artifact = store.publish(here, draft)
    assert not any("Range" in request for request in fetched)
    store.verify(artifact.digest)
    assert store.publish(here, draft) == artifact
    short = ManifestDraft(kind="model", name="other", files=entries[:1])
    with pytest.raises(DataLoss, match="was not announced"):
        store.publish(here, short)
    assert len({key.split("/")[1] for key in keys(store, "files/")}) == 1


def test_a_refused_publication_leaves_nothing_in_the_bucket(
    store: Store, small_parts: None
) -> None:
    source = big(store)
    files = [FileEntry("weights", 12 << 20, "0" * 64), FileEntry("config.json", 2, "0" * 64)]
    with pytest.raises(DataLoss, match="weights has sha256"):
        store.publish(source, ManifestDraft(kind="model", files=files))
    assert source.is_dir()
    assert keys(store, "files/") == keys(store, "present/") == keys(store, "manifests/") == []
    assert list(bucket(store).uploads("files/")) == []


def test_uploads_of_a_killed_publisher_go_after_the_grace(
    store: Store, publish: Callable[..., Artifact], small_parts: None
) -> None:
    artifact = publish()
    store.tag("model/m:v1", artifact.digest)
    held = "files/ffffffffffffffffffffffff"
    client, place = bucket(store).client, bucket(store).at(f"{held}/weights")
    number = client.create_multipart_upload(**place)["UploadId"]
    client.upload_part(**place, UploadId=number, PartNumber=1, Body=b"x" * (5 << 20))
    bucket(store).put(f"{held}/config.json", b"{}")
    # Somebody publishes just now, and has a lease.
    with store.lease("upload", [held], 60):
        assert all(not r.path.startswith("files/") for r in store.gc(dry_run=False, grace=0))
    planned = [(r.path, r.reason) for r in store.gc(dry_run=True, grace=0)]
    assert (held, "uploaded by a publisher that was killed") in planned
    assert (f"{held}/weights", "upload that was never finished") in planned
    store.gc(dry_run=False, grace=0)
    assert list(bucket(store).uploads("files/")) == []
    assert not any(key.startswith(held) for key in keys(store, "files/"))
    store.verify(artifact.digest)


# Removing


def test_who_claims_a_doomed_artifact_keeps_it(
    store: Store, publish: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = publish()
    take = Places.take

    def claimed_first(self: Places, name: str) -> list[str]:
        assert store.get(artifact.digest) == artifact
        return take(self, name)

    monkeypatch.setattr(Places, "take", claimed_first)
    assert not any(r.path.startswith("artifacts/") for r in store.gc(dry_run=False, grace=0))
    monkeypatch.undo()
    assert [key for key in keys(store, "present/") if not key.endswith(".json")] == []
    store.verify(artifact.digest)
    assert any(r.path.startswith("artifacts/") for r in store.gc(dry_run=False, grace=0))
    assert keys(store, "files/") == keys(store, "present/") == []


def test_who_comes_after_the_decision_learns_that_it_is_gone_and_makes_it_anew(
    store: Store, publish: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = publish(created="2026-01-01T00:00:00Z")
    delete = Bucket.delete
    again: list[Artifact] = []

    def decided(self: Bucket, names: Any) -> None:
        names = list(names)
        if names and names[0].startswith("present/") and names[0].endswith(".json"):
            monkeypatch.undo()  # decided, not yet gone
            with pytest.raises(NotFound, match="collected"):
                store.get(artifact.digest)
            again.append(publish(created="2026-01-01T00:00:00Z"))
        delete(self, names)

    monkeypatch.setattr(Bucket, "delete", decided)
    store.gc(dry_run=False, grace=0)
    assert again == [artifact]
    store.verify(artifact.digest)  # another publication: the deletion did not touch it
    assert len(keys(store, "present/")) == 1


def test_a_collector_that_slept_while_another_came_takes_nothing(
    store: Store, publish: Callable[..., Artifact]
) -> None:
    artifact = publish()
    name = artifact.digest.removeprefix("sha256:")
    asleep, awake = Places(bucket(store)), Places(bucket(store))
    asleep.doom(name)
    awake.settle()
    assert store.get(artifact.digest) == artifact
    assert asleep.take(name) == []
    store.verify(artifact.digest)
    # One that died over its decision is finished by the next.
    asleep.doom(name)
    (publication, round_) = asleep._rounds[name][0]
    bucket(store).create(f"present/{name}/{publication}.decided-{round_}", b"taken")
    with pytest.raises(NotFound):
        store.get(artifact.digest)
    awake.settle()
    assert keys(store, "present/") == []


# One writer


def test_a_lock_that_expired_is_taken_and_its_holder_told(
    store: Store, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., Any]
) -> None:
    monkeypatch.setattr(lease, "SECONDS", 3)
    lost = threading.Event()
    with lease.hold(bucket(store), "training", "training service", lost.set):
        (key,) = keys(store, "locks/")
        with pytest.raises(FailedPrecondition, match=f"pid {os.getpid()}"):
            store.lock("training").__enter__()
        first = json.loads(bucket(store).get(key))
        wait_until(lambda: json.loads(bucket(store).get(key)) != first, what="its renewal")
        assert json.loads(bucket(store).get(key))["expires"] > first["expires"]
        with pytest.raises(FailedPrecondition, match="is the training service"):
            store.lock("training").__enter__()
        # As if this process had slept on another machine.
        record = bucket(store).get(key).replace(b'"expires":', b'"expires":0,"was":')
        bucket(store).put(key, record)
        other = lease._Lease(bucket(store), "training", "training service")
        other.take()
        assert lost.wait(120)
        with pytest.raises(FailedPrecondition):
            store.lock("training").__enter__()
    assert len(keys(store, "locks/")) == 1  # and gives back nothing that is not its own


def test_of_several_that_want_a_lock_one_gets_it(store: Store) -> None:
    got: list[int] = []
    gate = threading.Barrier(6)

    def want(n: int) -> None:
        wanted = lease._Lease(bucket(store), "dataset", "dataset service")
        gate.wait()
        try:
            wanted.take()
            got.append(n)
        except FailedPrecondition:
            pass

    threads = [threading.Thread(target=want, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


# What outlives a machine


def test_a_kept_directory_comes_back_elsewhere(store: Store, elsewhere: Store) -> None:
    here = store.staging("training", "e") / "checkpoints"
    there = elsewhere.staging("training", "e") / "checkpoints"
    for step in ("step-1", "step-2"):
        (here / step).mkdir(parents=True)
        (here / step / "tensors.pt").write_text(step)
    (here / ".aside-3").mkdir()
    (here / ".aside-3" / "tensors.pt").write_text("half")
    store.keep(here)
    puts = requests(store, "PutObject")
    store.keep(here)
    assert puts == []
    elsewhere.bring(there)
    assert (there / "step-2" / "tensors.pt").read_text() == "step-2"
    assert not (there / ".aside-3").exists()
    (here / "step-1" / "tensors.pt").unlink()
    (here / "step-2" / "tensors.pt").write_text("STEP-2")
    store.keep(here)
    assert keys(store, "staging/") == ["staging/training/e/checkpoints/step-2/tensors.pt"]
    (there / "step-2" / "tensors.pt").unlink()
    elsewhere.bring(there)
    assert (there / "step-2" / "tensors.pt").read_text() == "STEP-2"
    store.forget(here.parent)
    assert keys(store, "staging/") == []


def test_what_was_written_last_is_kept_last(store: Store) -> None:
    here = store.staging("training", "e") / "checkpoints/step-1"
    here.mkdir(parents=True)
    for moment, name in enumerate(("tensors.pt", "state.json", "checkpoint.json"), 1_000):
        (here / name).write_text(name)
        os.utime(here / name, (moment, moment))
    puts = requests(store, "PutObject")
    store.keep(here.parent)
    assert [put["Key"].rpartition("/")[2] for put in puts] == [
        "tensors.pt",
        "state.json",
        "checkpoint.json",
    ]


# Refusals


def test_a_bucket_that_is_not_there_is_said(s3_env: dict[str, str]) -> None:
    with pytest.raises(NotFound, match="no bucket 'nobodys'") as caught:
        Store.open("s3://nobodys/models")
    assert s3_env["ARRIERO_STORE_ENDPOINT_URL"] in caught.value.message


def test_wrong_credentials_are_said_and_never_shown(
    s3_env: dict[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "arriero")
    with serving_s3({"bucket": {}}) as url:
        monkeypatch.setenv("ARRIERO_STORE_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDSOMEBODY")
        with pytest.raises(PermissionDenied, match="refuses these credentials") as caught:
            Store.open("s3://bucket/models")
    for secret in ("AKIDSOMEBODY", s3_env["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in caught.value.message + caplog.text
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(Unauthenticated, match="AWS_ACCESS_KEY_ID"):
        Store.open("s3://bucket/models")


def test_a_server_that_is_away_is_unavailable(
    s3_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arriero.store.s3.bucket._ATTEMPTS", 2)
    monkeypatch.setenv("ARRIERO_STORE_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:9 does not answer") as caught:
        Store.open("s3://bucket/models")
    assert caught.value.retryable


def test_a_server_without_conditional_puts_is_refused(s3_env: dict[str, str]) -> None:
    client = boto3.client(
        "s3", endpoint_url=s3_env["ARRIERO_STORE_ENDPOINT_URL"], region_name="us-east-1"
    )
    client.create_bucket(Bucket="careless-bucket")
    with pytest.raises(FailedPrecondition, match="ignores If-None-Match"):
        Store.open("s3://careless-bucket/models")
    assert "Contents" not in client.list_objects_v2(Bucket="careless-bucket")


def test_a_newer_store_is_refused_and_left_alone(store: Store) -> None:
    bucket(store).put("format.json", b'{"format":2}')
    with pytest.raises(FailedPrecondition, match="format 2"):
        Store.open(store.url)
    bucket(store).put("format.json", b"{")
    with pytest.raises(DataLoss, match="is damaged"):
        Store.open(store.url)


def test_stores_of_one_bucket_and_of_one_cache_do_not_mix(
    store: Store, publish: Callable[..., Artifact]
) -> None:
    artifact = publish()
    for url in (f"{store.url}-2", f"{store.url}/below", store.url.rpartition("/")[0]):
        other = Store.open(url)
        assert other.root != store.root
        with pytest.raises(NotFound):
            other.get(artifact.digest)
