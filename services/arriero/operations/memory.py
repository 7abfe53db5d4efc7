"""How much memory this process may still use, and whether the kernel killed for it.

Responsibility: figures of the host and of the control group that this process is
in. Does not know who asks; what cannot be read is left out, never guessed.
"""

from __future__ import annotations

from pathlib import Path

import psutil

__all__ = ["available_bytes", "oom_kills"]

_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
# Version 1 says so many bytes (or a page less than 2**63) where there is no limit.
_NO_LIMIT = 1 << 62


def available_bytes(*, cgroups: Path = _CGROUPS, proc: Path = _PROC) -> int:
    """Bytes that can be had without swapping: the host's, or less where a limit is set.

    Pages of files that were merely read count as free: the kernel takes them back.
    """
    free = int(psutil.virtual_memory().available)
    for directory, limit_file, usage_file in _limits(cgroups, proc):
        limit, usage = _number(directory / limit_file), _number(directory / usage_file)
        if limit is None or usage is None or limit >= _NO_LIMIT:
            continue
        stat = directory / "memory.stat"  # version 1 counts children in `total_...` alone
        cached = _field(stat, "total_inactive_file") or _field(stat, "inactive_file") or 0
        free = min(free, max(0, limit - max(0, usage - cached)))
    return free


def oom_kills(*, cgroups: Path = _CGROUPS, proc: Path = _PROC) -> int | None:
    """Processes that the kernel has killed for memory; None where it does not say.

    Of the whole host, and of this control group and those below it (whose limits
    the host's count does not always show).
    """
    counts = [_field(proc / "vmstat", "oom_kill")]
    for directory, _, _ in _limits(cgroups, proc):
        counts.append(_field(directory / "memory.events", "oom_kill"))
        counts.append(_field(directory / "memory.oom_control", "oom_kill"))
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _limits(cgroups: Path, proc: Path) -> list[tuple[Path, str, str]]:
    """This process' control groups, innermost first: directory, limit's and usage's file."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found: list[tuple[Path, str, str]] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            root, files = cgroups, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # In a container the path may be the host's, and the limit lies at the root.
        for depth in range(len(parts), -1, -1):
            directory = root.joinpath(*parts[:depth])
            if (directory / files[1]).is_file():
                found.append((directory, *files))
    return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # `max` is no number: no limit
        return None


def _field(path: Path, name: str) -> int | None:
    try:
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except (OSError, ValueError):
        pass
    return None
