"""How many threads to compute with.

Responsibility: the CPUs that this process may really use: its affinity, cut by
its cgroup's quota. Does not know what computes, nor who else is running.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_SELF = Path("/proc/self/cgroup")


def threads(
    requested: int = 0, *, spare: int = 0, cgroups: Path = _CGROUPS, own: Path = _SELF
) -> int:
    """Threads to compute with, at least 1.

    A fractional quota is rounded down: workers that wait at a barrier for one
    that is throttled make every token slower than one thread less does.

    Args:
        requested: taken as it is when positive; 0 asks for the machine's answer.
        spare: CPUs to leave to others, as long as one is left.
        cgroups: where the cgroup file systems are mounted.
        own: the list of this process' cgroups (`man 7 cgroups`).
    """
    if requested > 0:
        return requested
    cpus = _affinity()
    quota = min(_quotas(cgroups, own), default=float(cpus))
    return max(1, min(cpus, int(quota)) - spare)


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quotas(cgroups: Path, own: Path) -> Iterator[float]:
    """CPUs granted by each cgroup that contains this process, up to the root."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        relative = group.strip("/")
        if controllers == "":  # version 2
            for directory in _upwards(cgroups, relative):
                quota = _read_v2(directory / "cpu.max")
                if quota is not None:
                    yield quota
        elif "cpu" in controllers.split(","):  # version 1
            for mount in (cgroups / controllers, cgroups / "cpu"):
                for directory in _upwards(mount, relative):
                    quota = _read_v1(directory)
                    if quota is not None:
                        yield quota


def _upwards(mount: Path, relative: str) -> Iterator[Path]:
    """A group's directory and its parents; in a container the mount itself is the group."""
    parts = [part for part in relative.split("/") if part not in ("", "..")]
    for length in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:length])


def _read_v2(path: Path) -> float | None:
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _read_v1(directory: Path) -> float | None:
    try:
        quota = int((directory / "cpu.cfs_quota_us").read_text())
        period = int((directory / "cpu.cfs_period_us").read_text())
        return None if quota <= 0 or period <= 0 else quota / period
    except (OSError, ValueError):
        return None
