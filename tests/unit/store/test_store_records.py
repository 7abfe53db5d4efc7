"""Results, locks, versions, room on the disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from arriero.errors import (
    ArrieroError,
    DataLoss,
    DiskFull,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unimplemented,
)
from arriero.gates import GateResult, Mode, Verdict
from arriero.store import QUOTA_VARIABLE, Artifact, ManifestDraft, Store, write_atomic


def forge(store: Store, digest: str, manifest: bytes) -> None:
    """Put an artifact there that nobody published."""
    store.objects.write(f"manifests/{digest}.json", manifest)
    if store.remote:
        store.objects.write(f"present/{digest}/0.json", b"{}")
    else:
        (store.root / "artifacts" / digest).mkdir()


@pytest.mark.backends
def test_a_result_is_found_by_its_key(store: Store, publish: Callable[..., Artifact]) -> None:
    one, two = publish(1), publish(2, kind="report")
    gate = GateResult("merge.delta", Mode.ENFORCE, Verdict.PASSED, 0.25, 0.5, "ratio")
    store.put_result("merging", "key", {"model": one.digest, "golden": two.digest}, [gate])
    result = store.get_result("merging", "key")
    assert result is not None
    assert list(result.outputs.items()) == [("model", one.digest), ("golden", two.digest)]
    assert result.gates == (gate,)
    assert store.get_result("merging", "other") is None
    assert store.get_result("training", "key") is None


@pytest.mark.backends
def test_a_result_is_none_when_an_artifact_is_gone_or_quarantined(
    store: Store, publish: Callable[..., Artifact], failed: GateResult
) -> None:
    bad, lost = publish(1, gates=[failed]), publish(2)
    store.put_result("merging", "bad", {"model": bad.digest}, [failed])
    store.put_result("merging", "lost", {"model": lost.digest})
    assert store.get_result("merging", "bad") is None
    store.waive(bad.digest, "merge.delta", "fine", "me")
    found = store.get_result("merging", "bad")
    assert found is not None
    assert math.isnan(found.gates[0].figure or 0)
    store.pin("runs", "r", [bad.digest])
    store.gc(dry_run=False, grace=0)
    assert store.get_result("merging", "bad") is not None
    assert store.get_result("merging", "lost") is None


@pytest.mark.backends
@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "outputs": [1]}'])
def test_a_torn_result_is_a_miss(store: Store, text: str) -> None:
    store.put_result("merging", "key", {})
    store.objects.write("results/merging/key.json", text.encode())
    assert store.get_result("merging", "key") is None


@pytest.mark.backends
def test_a_second_writer_is_refused_with_the_holders_pid(store: Store) -> None:
    code = (
        "import sys, time; from arriero.store import Store\n"
        "with Store.open(sys.argv[1]).lock('training'):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, store.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(FailedPrecondition, match=f"pid {child.pid}") as caught:
            store.lock("training").__enter__()
        assert caught.value.metadata["pid"] == str(child.pid)
        with store.lock("dataset"):
            pass
        child.send_signal(signal.SIGKILL)
        child.wait(120)
        with store.lock("training"):
            pass
    finally:
        child.kill()
        child.communicate()


def test_a_newer_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.mkdir()
    (root / "format.json").write_text('{"format": 2}')
    with pytest.raises(FailedPrecondition, match=r"format 2.*reads up to 1.*upgrade"):
        Store.open(root)
    assert os.listdir(root) == ["format.json"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"format": "x"}'])
def test_a_torn_format_file_is_data_loss(tmp_path: Path, text: str) -> None:
    (tmp_path / "format.json").write_text(text)
    with pytest.raises(DataLoss, match=r"format\.json is damaged"):
        Store.open(tmp_path)


@pytest.mark.backends
def test_a_newer_manifest_is_refused_with_a_message(
    store: Store, publish: Callable[..., Artifact]
) -> None:
    value = json.loads(publish().manifest.to_bytes())
    data = json.dumps({**value, "format": 2, "news": 1}).encode()
    digest = hashlib.sha256(data).hexdigest()
    forge(store, digest, data)
    with pytest.raises(FailedPrecondition, match="format 2"):
        store.manifest(f"sha256:{digest}")
    assert [artifact.manifest.format for artifact in store.list()] == [1]


@pytest.mark.backends
@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_a_torn_manifest_is_data_loss_and_nothing_else_suffers(
    store: Store, publish: Callable[..., Artifact], keep: int
) -> None:
    torn, whole = publish(1), publish(2)
    key = f"manifests/{torn.digest.removeprefix('sha256:')}.json"
    store.objects.write(key, store.objects.read(key)[:keep])
    fresh = Store.open(store.url)
    with pytest.raises(DataLoss, match="damaged"):
        fresh.get(torn.digest)
    assert fresh.list() == [whole]
    assert fresh.usage()["model"] == whole.manifest.size


@pytest.mark.backends
def test_a_manifest_whose_files_climb_out_is_refused(
    store: Store, publish: Callable[..., Artifact]
) -> None:
    value = json.loads(publish().manifest.to_bytes())
    value["files"][0]["path"] = "../../../etc/passwd"
    data = json.dumps(value).encode()
    digest = hashlib.sha256(data).hexdigest()
    forge(store, digest, data)
    with pytest.raises(InvalidArgument, match="climbs out"):
        store.get(f"sha256:{digest}")


def test_stores_are_named_by_path_or_url(tmp_path: Path) -> None:
    one = Store.open(tmp_path / "a b")
    assert Store.open(f"file://{tmp_path}/a%20b").root == one.root == tmp_path / "a b"
    assert Store.open(str(tmp_path / "x" / ".." / "a b")).root == one.root
    with pytest.raises(Unimplemented, match="s3://bucket"):
        Store.open("gs://bucket/store")
    for url in ("", "file://host/x", "file:relative", "s3://", "s3://B_/x", "s3://k:s@bucket/x"):
        with pytest.raises(InvalidArgument):
            Store.open(url)
    (tmp_path / "file").touch()
    with pytest.raises(FailedPrecondition, match="not a directory"):
        Store.open(tmp_path / "file")


@pytest.mark.backends
def test_usage_is_by_kind(store: Store, publish: Callable[..., Artifact]) -> None:
    publish(1)
    publish(22, kind="report")
    (store.staging("training", "e") / "x").write_bytes(b"12345")
    usage = store.usage()
    assert (usage["model"], usage["report"], usage["gguf"]) == (1003, 1004, 0)
    assert usage["staging"] == 5


def test_the_quota_refuses_with_needed_and_free_bytes(
    store: Store, publish: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    monkeypatch.setenv(QUOTA_VARIABLE, "100000")
    store.preflight(50_000)
    with pytest.raises(DiskFull) as caught:
        store.preflight(99_900)
    assert caught.value.needed == 99_900
    assert 95_000 < caught.value.free < 99_000
    assert f"{caught.value.free} bytes" in caught.value.message
    monkeypatch.setenv(QUOTA_VARIABLE, "much")
    with pytest.raises(InvalidArgument, match=QUOTA_VARIABLE):
        store.preflight(1)
    monkeypatch.delenv(QUOTA_VARIABLE)
    store.preflight(1)
    with pytest.raises(DiskFull, match="TiB needed"):
        store.preflight(1 << 60)


@pytest.mark.backends
def test_a_full_quota_publishes_nothing_and_keeps_the_source(
    store: Store, fill: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(QUOTA_VARIABLE, "10000")
    inside, outside = fill({"a": b"x" * 20_000}), tmp_path / "outside"
    outside.mkdir()
    (outside / "a").write_bytes(b"x" * 20_000)
    for source in (inside, outside):
        with pytest.raises(DiskFull, match="publishing needs"):
            store.publish(source, ManifestDraft(kind="model"))
        assert (source / "a").stat().st_size == 20_000
    assert store.list() == []
    monkeypatch.setenv(QUOTA_VARIABLE, "100000")
    store.verify(store.publish(inside, ManifestDraft(kind="model")).digest)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of one MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run(mount, capture_output=True).returncode == 0:
            yield place
            subprocess.run(["umount", "-l", str(place)], check=True)
            return
    pytest.skip("mounting a small tmpfs needs more rights")


def test_a_full_disk_leaves_nothing_half_written(small_disk: Path) -> None:
    store = Store.open(small_disk / "store")
    with pytest.raises(DiskFull) as caught:
        store.preflight(2 << 20)
    assert caught.value.needed == 2 << 20
    assert 0 < caught.value.free < 1 << 20
    source = store.staging("dataset", "e") / "out"
    source.mkdir()
    (source / "a").write_bytes(b"x" * 1000)
    store.pin("runs", "r", [])
    lost = store.staging("dataset", "lost") / "out"
    lost.mkdir()
    (lost / "a").write_bytes(b"x" * 50_000)
    garbage = store.publish(lost, ManifestDraft(kind="model", name="lost"))
    store.lease("test", [source])
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    before = sorted(path for path in small_disk.rglob("*"))
    for work in (
        lambda: store.publish(source, ManifestDraft(kind="model", name="m")),
        lambda: store.put_result("dataset", "k", {}),
        lambda: store.pin("runs", "r", ["sha256:" + "0" * 64]),
        lambda: write_atomic(small_disk / "x", b"y" * 5000),
    ):
        with pytest.raises(DiskFull, match="0 bytes free"):
            work()
    after = {path for path in small_disk.rglob("*") if path.is_file()}
    assert after <= set(before)
    assert [pin.digests for pin in store.pins()] == [()]
    assert store.get(garbage.digest) == garbage
    store.gc(dry_run=False, grace=0)  # makes room on a disk that has none
    assert store.list() == []
    store.verify(store.publish(source, ManifestDraft(kind="model", name="m")).digest)


def test_a_failed_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    write_atomic(path, b"old")

    def refuse(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["record.json"]


@pytest.mark.skipif(os.access("/proc/version", os.W_OK), reason="root may write anywhere")
def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(ArrieroError, match="can't be written"):
        Store.open(tmp_path / "store")


def test_a_store_can_be_read_by_who_may_not_write() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs another user")
    code = (
        "import os, sys; from arriero.store import Store\n"
        "from arriero.errors import PermissionDenied\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "store = Store.open(sys.argv[1]); artifact = store.get('model/m:v1')\n"
        "store.verify(artifact.digest); print(artifact.file('a').read_text())\n"
        "try: store.pin('runs', 'r', [])\n"
        "except PermissionDenied as error: print(error.message)"
    )
    with tempfile.TemporaryDirectory() as base:
        Path(base).chmod(0o755)
        store = Store.open(Path(base) / "store")
        source = store.staging("dataset", "e") / "out"
        source.mkdir()
        (source / "a").write_text("a")
        digest = store.publish(source, ManifestDraft(kind="model", name="m")).digest
        store.tag("model/m:v1", digest)
        done = subprocess.run(
            [sys.executable, "-c", code, str(store.root)], capture_output=True, text=True
        )
    if "in <module>\nPermissionError" in done.stderr:
        pytest.skip("this root may not become another user")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a\n")
    assert "can't be written" in done.stdout


@pytest.mark.backends
def test_not_found_says_which_store(store: Store) -> None:
    with pytest.raises(NotFound, match=store.url.removeprefix("file://")):
        store.manifest("sha256:" + "0" * 64)
