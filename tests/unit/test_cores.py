import os
from pathlib import Path

import pytest

from arriero.cores import threads


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return tmp_path / "cgroup"


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))


def test_a_request_is_taken_as_it_is() -> None:
    assert threads(3) == 3


def test_without_a_quota_the_affinity_counts(tmp_path: Path, own: Path) -> None:
    own.write_text("0::/\n")
    assert threads(cgroups=tmp_path, own=own) == 8


def test_a_version_2_quota_of_a_parent_group_counts_and_is_rounded_down(
    tmp_path: Path, own: Path
) -> None:
    own.write_text("0::/kubepods/pod1/container\n")
    group = tmp_path / "kubepods" / "pod1"
    (group / "container").mkdir(parents=True)
    (group / "container" / "cpu.max").write_text("max 100000\n")
    (group / "cpu.max").write_text("250000 100000\n")
    assert threads(cgroups=tmp_path, own=own) == 2


def test_a_version_1_quota_counts(tmp_path: Path, own: Path) -> None:
    own.write_text("4:cpu,cpuacct:/docker/abc\n2:memory:/docker/abc\n")
    group = tmp_path / "cpu,cpuacct"  # inside a container the mount is the group
    group.mkdir()
    (group / "cpu.cfs_quota_us").write_text("400000\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    assert threads(cgroups=tmp_path, own=own) == 4


def test_less_than_one_cpu_is_one_thread(tmp_path: Path, own: Path) -> None:
    own.write_text("0::/\n")
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert threads(cgroups=tmp_path, own=own) == 1


@pytest.mark.parametrize("text", ["", "max", "100000 0", "many few"])
def test_an_unreadable_quota_is_no_quota(tmp_path: Path, own: Path, text: str) -> None:
    own.write_text("0::/\n")
    (tmp_path / "cpu.max").write_text(text)
    assert threads(cgroups=tmp_path, own=own) == 8
