"""Memory that may still be used, and kills for want of it: by a real kernel where it lets us."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from arriero.operations.memory import available_bytes, oom_kills


def lay(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def version_2(tmp_path: Path) -> dict[str, Path]:
    lay(
        tmp_path,
        {
            "proc/self/cgroup": "0::/kubepods/pod7\n",
            "proc/vmstat": "pgfault 12\noom_kill 3\n",
            "cg/kubepods/memory.current": "9000",
            "cg/kubepods/memory.max": "max",
            "cg/kubepods/pod7/memory.current": "700",
            "cg/kubepods/pod7/memory.max": "1000",
            "cg/kubepods/pod7/memory.stat": "anon 500\ninactive_file 200\n",
            "cg/kubepods/pod7/memory.events": "max 4\noom 1\noom_kill 1\n",
        },
    )
    return {"cgroups": tmp_path / "cg", "proc": tmp_path / "proc"}


@pytest.fixture
def version_1(tmp_path: Path) -> dict[str, Path]:
    lay(
        tmp_path,
        {
            "proc/self/cgroup": "4:cpu,cpuacct:/a\n3:memory:/a\n",
            "cg/memory/a/memory.usage_in_bytes": "700",
            "cg/memory/a/memory.limit_in_bytes": "1000",
            "cg/memory/a/memory.stat": "inactive_file 0\ntotal_inactive_file 100\n",
            "cg/memory/a/memory.oom_control": "under_oom 0\noom_kill 2\n",
            "cg/memory/memory.usage_in_bytes": "800",
            "cg/memory/memory.limit_in_bytes": "9223372036854771712",
        },
    )
    return {"cgroups": tmp_path / "cg", "proc": tmp_path / "proc"}


def test_a_limit_counts_and_cached_files_are_free(version_2):
    assert available_bytes(**version_2) == 1000 - (700 - 200)
    assert oom_kills(**version_2) == 3 + 1


def test_the_older_hierarchy_is_read_too(version_1):
    assert available_bytes(**version_1) == 1000 - (700 - 100)
    assert oom_kills(**version_1) == 2


def test_without_control_groups_the_host_counts(tmp_path):
    nothing = {"cgroups": tmp_path, "proc": tmp_path}
    found = available_bytes(**nothing)
    assert found == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert oom_kills(**nothing) is None


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A control group with 64 MB, made by root on a real kernel."""
    root = Path("/sys/fs/cgroup")
    old = (root / "memory").is_dir()
    group = (root / "memory" if old else root) / f"arriero-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(64 << 20))
        if old:
            (group / "memory.swappiness").write_text("0")
        else:
            (group / "memory.swap.max").write_text("0")
    except OSError as error:
        pytest.skip(f"control groups can not be made here: {error}")
    yield group
    group.rmdir()


def test_a_real_kill_is_counted_and_a_real_limit_seen(control_group: Path):
    program = """
import os, subprocess, sys
from pathlib import Path
from arriero.operations.memory import available_bytes, oom_kills
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
before = oom_kills()
done = subprocess.run([sys.executable, "-c", "b'x' * (1 << 28)"])
print(done.returncode, oom_kills() > before, available_bytes() < (64 << 20))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(control_group)], capture_output=True, text=True
    )
    assert done.stdout.split() == ["-9", "True", "True"], done.stderr
