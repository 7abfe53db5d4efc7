"""Publishing and finding artifacts."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import multiprocessing
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from arriero import refs
from arriero.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from arriero.gates import GateResult, Mode, Verdict
from arriero.store import Artifact, FileEntry, ManifestDraft, Store, safe_relative

DRAFT = ManifestDraft(kind="model", name="base")
NOBODY = "sha256:" + "0" * 64


def entry(path: str, data: bytes) -> FileEntry:
    return FileEntry(path, len(data), hashlib.sha256(data).hexdigest())


def test_a_published_directory_is_an_artifact_and_its_source_is_gone(
    store: Store, fill: Callable[..., Path]
) -> None:
    source = fill()
    artifact = store.publish(source, DRAFT)
    assert not source.exists()
    assert artifact.path == store.root / "artifacts" / artifact.digest.removeprefix("sha256:")
    assert [e.path for e in artifact.manifest.files] == ["config.json", "sub/weights.bin"]
    assert artifact.manifest.size == 1002
    assert artifact.file("sub/weights.bin").read_bytes() == b"\x01" * 1000
    store.verify(artifact.digest)
    assert Store.open(store.root).get(artifact.digest) == artifact


@pytest.mark.backends
def test_artifacts_are_read_only(publish: Callable[..., Artifact]) -> None:
    path = publish().path
    for base, _, files in os.walk(path):
        assert stat.S_IMODE(os.stat(base).st_mode) == 0o555
        for name in files:
            assert stat.S_IMODE(os.stat(os.path.join(base, name)).st_mode) == 0o444


@pytest.mark.backends
def test_every_field_of_a_manifest_survives(store: Store, fill: Callable[..., Path]) -> None:
    gate = GateResult("merge.delta", Mode.WARN, Verdict.WARNED, math.inf, 0.5, "ratio", "d", 1.5)
    draft = ManifestDraft(
        kind="gguf",
        name="zh",
        parents=[NOBODY],
        golden=NOBODY,
        spec={"types": ["Q4_0"], "lora": {"r": 8, "名": None}},
        gates=[gate],
        metrics={"size_bytes": 7, "loss": math.inf},
        labels={"quant_type": "Q4_0"},
        licenses=["llama2"],
        owner="me",
        creator="arriero 1",
        created="2026-01-31T13:00:00+01:00",
    )
    artifact = store.publish(fill(), draft)
    manifest = Store.open(store.url).manifest(artifact.digest)
    assert manifest == artifact.manifest
    assert manifest.digest == artifact.digest
    assert manifest.gates == (gate,)
    assert manifest.metrics == {"size_bytes": 7.0, "loss": math.inf}
    assert manifest.created == "2026-01-31T12:00:00.000000Z"
    assert (manifest.golden, manifest.parents) == (NOBODY, (NOBODY,))


@pytest.mark.backends
def test_licences_come_down_from_the_parents(publish: Callable[..., Artifact]) -> None:
    one = publish(1, licenses=["llama2"])
    two = publish(2, licenses=["cc-by-4.0"])
    child = publish(3, parents=[one.digest, two.digest], licenses=["mit"])
    assert child.manifest.licenses == ("cc-by-4.0", "llama2", "mit")


@pytest.mark.backends
def test_the_same_draft_published_again_is_the_same_artifact(
    store: Store, fill: Callable[..., Path]
) -> None:
    data = b"hello"
    draft = dataclasses.replace(
        DRAFT, files=[entry("a", data)], created="2026-01-31T12:00:00Z", licenses=["mit"]
    )
    first = store.publish(fill({"a": data}), draft)
    source = fill({"a": data})
    assert store.publish(source, draft) == first
    assert not source.exists()
    # As after a crash between the rename and whatever the publisher writes down next.
    assert store.publish(source, draft) == first
    assert store.list() == [first]


@pytest.mark.backends
@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"a": b"hellO"}, "a has sha256"),
        ({"a": b"hell"}, "a has 4 bytes, expected 5"),
        ({"b": b"hello"}, "a is missing"),
        ({"a": b"hello", "b": b""}, "b was not announced"),
    ],
)
def test_files_that_are_not_as_announced_are_not_published(
    store: Store, fill: Callable[..., Path], files: dict[str, bytes], said: str
) -> None:
    source = fill(files)
    with pytest.raises(DataLoss, match=said):
        store.publish(source, dataclasses.replace(DRAFT, files=[entry("a", b"hello")]))
    assert source.is_dir()
    assert store.list() == []
    assert list(store.objects.find("manifests/")) == []


@pytest.mark.backends
@pytest.mark.parametrize(
    "draft",
    [
        ManifestDraft(kind="cake"),
        ManifestDraft(kind="model", name="../up"),
        ManifestDraft(kind="model", parents=["sha256:12"]),
        ManifestDraft(kind="model", golden="../../etc/passwd"),
        ManifestDraft(kind="model", created="yesterday"),
        ManifestDraft(kind="model", files=[FileEntry("../up", 0, "")]),
        ManifestDraft(kind="model", spec={"x": math.nan}),
        ManifestDraft(kind="model", spec={"x": object()}),
    ],
)
def test_wrong_drafts_are_refused(
    store: Store, fill: Callable[..., Path], draft: ManifestDraft
) -> None:
    with pytest.raises(InvalidArgument):
        store.publish(fill(), draft)
    assert store.list() == []


@pytest.mark.backends
def test_links_and_special_files_are_refused(store: Store, fill: Callable[..., Path]) -> None:
    source = fill()
    (source / "link").symlink_to("/etc/passwd")
    with pytest.raises(InvalidArgument, match="link is a symbolic link"):
        store.publish(source, DRAFT)
    (source / "link").unlink()
    (source / "dir").symlink_to("/etc")
    with pytest.raises(InvalidArgument, match="symbolic link"):
        store.publish(source, DRAFT)
    (source / "dir").unlink()
    os.mkfifo(source / "pipe")
    with pytest.raises(InvalidArgument, match="special file"):
        store.publish(source, DRAFT)


@pytest.mark.backends
def test_a_hard_link_is_copied_so_that_nobody_else_owns_the_bytes(
    store: Store, fill: Callable[..., Path], tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    source = fill()
    os.link(outside, source / "linked")
    artifact = store.publish(source, DRAFT)
    outside.write_bytes(b"yours")
    assert artifact.file("linked").read_bytes() == b"mine"
    store.verify(artifact.digest)


@pytest.mark.backends
def test_only_staging_may_be_published_out_of_the_store(
    store: Store, publish: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = publish()
    for source in (
        store.root,
        tmp_path,
        artifact.path,
        store.root / "staging",
        store.root / "staging" / ".." / "artifacts",
        store.root / "manifests",
    ):
        with pytest.raises(InvalidArgument, match="source"):
            store.publish(source, DRAFT)
    store.verify(artifact.digest)


@pytest.mark.backends
def test_no_source_and_no_files_are_said(store: Store, fill: Callable[..., Path]) -> None:
    with pytest.raises(NotFound, match="nothing to publish"):
        store.publish(store.root / "staging" / "a" / "b", DRAFT)
    with pytest.raises(InvalidArgument, match="holds no files"):
        store.publish(store.staging("dataset", "empty"), DRAFT)


def test_another_filesystem_is_refused(store: Store) -> None:
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == store.root.stat().st_dev:
        pytest.skip("needs a second filesystem")
    source = shared / f"arriero-test-{os.getpid()}"
    source.mkdir()
    try:
        (source / "a").write_text("a")
        with pytest.raises(FailedPrecondition, match="another filesystem"):
            store.publish(source, DRAFT)
    finally:
        shutil.rmtree(source)
    assert store.list() == []


@pytest.mark.backends
def test_publishers_of_the_same_thing_all_get_the_one_artifact(
    store: Store, fill: Callable[..., Path]
) -> None:
    fork = multiprocessing.get_context("fork")
    rounds = 2 if store.remote else 5
    for n in range(rounds):
        data = str(n).encode()
        draft = dataclasses.replace(DRAFT, files=[entry("a", data)], created="2026-01-31T12:00:00Z")
        sources = [fill({"a": data}) for _ in range(4)]
        barrier = fork.Barrier(len(sources))
        digests = fork.SimpleQueue()

        def one(source: Path, draft=draft, barrier=barrier, digests=digests) -> None:
            barrier.wait()
            digests.put(store.publish(source, draft).digest)

        children = [fork.Process(target=one, args=(source,)) for source in sources]
        for child in children:
            child.start()
        for child in children:
            child.join(120)
            assert child.exitcode == 0
        found = {digests.get() for _ in sources}
        assert len(found) == 1
        store.verify(found.pop())
        assert not any(source.exists() for source in sources)
    assert len(store.list()) == rounds


@pytest.mark.backends
def test_a_write_protected_directory_within_the_source_is_fine(
    store: Store, fill: Callable[..., Path]
) -> None:
    source = fill()
    for directory in (source / "sub", source):
        directory.chmod(0o555)
    store.verify(store.publish(source, DRAFT).digest)


@pytest.mark.backends
def test_artifacts_are_found_by_digest_prefix_tag_and_reference(
    store: Store, publish: Callable[..., Artifact]
) -> None:
    artifact = publish()
    store.tag("model/m:v1", artifact.digest)
    store.tag("model/m:latest", artifact.digest)
    hexadecimal = artifact.digest.removeprefix("sha256:")
    for ref in (
        artifact.digest,
        hexadecimal[:8],
        hexadecimal,
        f"sha256:{hexadecimal[:12]}",
        "model/m:v1",
        "model/m",
        f"model/m@{artifact.digest}",
        refs.parse("model/m:v1"),
    ):
        assert store.get(ref) == artifact
        assert store.resolve(ref) == artifact.digest


@pytest.mark.backends
def test_what_is_not_there_is_not_found(store: Store, publish: Callable[..., Artifact]) -> None:
    artifact = publish()
    for ref in (
        NOBODY,
        "model/m:nope",
        "model/nope:v1",
        "00000000",
        f"model/other@{artifact.digest}",
        f"gguf/m@{artifact.digest}",
    ):
        with pytest.raises(NotFound):
            store.get(ref)


@pytest.mark.parametrize(
    "ref",
    [
        "",
        "nonsense",
        "../../etc/passwd",
        "model/../../etc:passwd",
        "model/..:v1",
        "model/m:../../x",
        "model/m:..",
        "cake/m:v1",
        "sha256:1234",
        "sha256:",
        "sha256:../../../etc/passwd",
        "model/m@sha256:../x",
        "model/a\0b:v1",
    ],
)
def test_references_that_are_none_or_climb_out_are_refused(store: Store, ref: str) -> None:
    with pytest.raises(InvalidArgument):
        store.get(ref)
    with pytest.raises(InvalidArgument):
        store.tag(ref, NOBODY)


@pytest.mark.backends
def test_an_ambiguous_prefix_is_refused_with_the_candidates(store: Store) -> None:
    for last in "ab":
        store.objects.write(f"manifests/{'c' * 63}{last}.json", b"{}")
    with pytest.raises(InvalidArgument, match="ambiguous: cccccccccccccccc"):
        store.resolve("c" * 10)


@pytest.mark.parametrize(
    "path", ["", ".", "/etc/passwd", "../x", "a/../../x", "a\\b", "a\0b", "\udcff"]
)
def test_paths_that_climb_out_are_refused(
    store: Store, publish: Callable[..., Artifact], path: str
) -> None:
    with pytest.raises(InvalidArgument):
        safe_relative(path)
    with pytest.raises(InvalidArgument):
        publish().file(path)


@pytest.mark.backends
@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a\0", "x" * 200])
def test_names_of_services_and_keys_that_climb_out_are_refused(store: Store, name: str) -> None:
    for call in (
        lambda: store.staging(name, "e"),
        lambda: store.staging("dataset", name),
        lambda: store.record_dir(name),
        lambda: store.lock(name),
        lambda: store.pin(name, "n", []),
        lambda: store.pin("runs", name, []),
        lambda: store.unpin(name, "n"),
        lambda: store.unpin("runs", name),
        lambda: store.put_result("dataset", name, {}),
        lambda: store.get_result(name, "k"),
        lambda: store.lease(name, []),
    ):
        with pytest.raises(InvalidArgument):
            call()


@pytest.mark.backends
def test_a_file_that_an_artifact_lacks_is_said_with_those_that_it_has(
    publish: Callable[..., Artifact],
) -> None:
    with pytest.raises(NotFound, match=r"no file 'tokenizer.json'; it has: config.json"):
        publish().file("tokenizer.json")


def test_get_waits_for_what_another_host_published(store: Store, fill: Callable[..., Path]) -> None:
    data = b"x"
    draft = dataclasses.replace(DRAFT, files=[entry("a", data)], created="2026-01-31T12:00:00Z")
    source = fill({"a": data})
    probe = Store.open(store.root.parent / "other")
    twin = probe.staging("dataset", "e") / "out"
    shutil.copytree(source, twin)
    digest = probe.publish(twin, draft).digest
    publisher = threading.Timer(0.2, store.publish, (source, draft))
    publisher.start()
    try:
        assert store.get(digest, wait=30).digest == digest
    finally:
        publisher.join()
    start = time.monotonic()
    with pytest.raises(NotFound):
        store.get(NOBODY, wait=0.1)
    assert time.monotonic() - start < 10


@pytest.mark.backends
def test_the_list_is_newest_first_and_by_kind(
    store: Store, publish: Callable[..., Artifact]
) -> None:
    old = publish(1, created="2026-01-01T00:00:00Z")
    new = publish(2, created="2026-01-01T00:00:01+00:00")
    report = publish(3, kind="report", created="2026-01-01T09:00:00.5+09:00")
    assert store.list() == [new, report, old]
    assert store.list("report") == [report]
    assert store.list("gguf") == []


@pytest.mark.backends
def test_lineage_is_itself_then_ancestors_nearest_first_once_each(
    store: Store, publish: Callable[..., Artifact]
) -> None:
    base = publish(1)
    data = publish(2, parents=[NOBODY])
    adapter = publish(3, parents=[base.digest, data.digest])
    merged = publish(4, parents=[base.digest, adapter.digest])
    found = [manifest.digest for manifest in store.lineage(merged.digest)]
    assert found == [merged.digest, base.digest, adapter.digest, data.digest]
    with pytest.raises(NotFound):
        store.lineage(NOBODY)


def test_verify_names_every_file_that_changed(
    store: Store, publish: Callable[..., Artifact]
) -> None:
    artifact = publish()
    for path in (artifact.path, artifact.path / "sub"):
        path.chmod(0o755)
    for name in ("config.json", "sub/weights.bin"):
        (artifact.path / name).chmod(0o644)
    (artifact.path / "config.json").write_bytes(b"[]")
    (artifact.path / "sub/weights.bin").write_bytes(b"")
    (artifact.path / "n.txt").unlink()
    (artifact.path / "extra").write_bytes(b"")
    with pytest.raises(DataLoss) as caught:
        store.verify(artifact.digest)
    for said in (
        "config.json has sha256",
        "sub/weights.bin has 0 bytes, expected 1000",
        "n.txt is missing",
        "extra does not belong",
    ):
        assert said in caught.value.message
    with pytest.raises(NotFound):
        store.verify(NOBODY)
