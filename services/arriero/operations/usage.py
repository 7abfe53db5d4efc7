"""What a job uses of its host: GPUs by NVML, cores and memory by psutil.

Responsibility: figures of a process tree, now. Does not know what they are for;
what cannot be read is left out, never guessed.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import psutil

from arriero.v1 import types_pb2


def _cuda_initialized() -> bool:
    torch: Any = sys.modules.get("torch")  # never imported for this alone
    return torch is not None and bool(torch.cuda.is_initialized())


@dataclass
class HostUsage:
    """Cores and resident memory of a process and its descendants."""

    pid: int = field(default_factory=os.getpid)
    _seconds: float | None = None
    _time: float = 0.0

    def sample(self) -> tuple[float | None, int | None]:
        """(cores used since the last sample, resident bytes now); None where not known.

        The first sample knows no cores. Memory shared between the processes is
        counted once for each of them.
        """
        try:
            root = psutil.Process(self.pid)
            tree = [root, *root.children(recursive=True)]
        except psutil.Error:
            return None, None
        seconds, memory = 0.0, 0
        for process in tree:
            try:
                times = process.cpu_times()
                memory += process.memory_info().rss
            except psutil.Error:
                continue
            # A reaped child's time moves into its parent's children_*: the sum only grows.
            seconds += times.user + times.system
            seconds += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
        now = time.monotonic()
        cores = None
        if self._seconds is not None and now > self._time:
            cores = max(0.0, (seconds - self._seconds) / (now - self._time))
        self._seconds, self._time = seconds, now
        return cores, memory


class GpuMeter:
    """NVML's view of the GPUs that a job may use; empty where there is no NVML.

    `CUDA_VISIBLE_DEVICES` (indices or UUIDs) limits it as it limits CUDA. Where
    NVML can tell which GPUs this process tree works on, only those are given.
    """

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        try:
            import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

            pynvml.nvmlInit()
        except Exception:  # absent module, absent driver: both mean no GPU to show
            return
        self._nvml = pynvml
        try:
            self._handles = self._visible()
        except pynvml.NVMLError:
            self._handles = []

    def _visible(self) -> list[Any]:
        nvml = self._nvml
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
        if wanted is None:
            return handles
        chosen = []
        for item in (part.strip() for part in wanted.split(",")):
            if item.isdigit() and int(item) < len(handles):
                chosen.append(handles[int(item)])
            elif item.startswith("GPU-"):
                chosen += [h for h in handles if self._uuid(h).startswith(item)]
            else:  # CUDA stops at the first device that it does not know
                break
        return chosen

    def _uuid(self, handle: Any) -> str:
        uuid = self._nvml.nvmlDeviceGetUUID(handle)
        return uuid.decode() if isinstance(uuid, bytes) else str(uuid)

    def _mine(self) -> list[Any]:
        try:
            pids = {os.getpid(), *(c.pid for c in psutil.Process().children(recursive=True))}
        except psutil.Error:
            pids = {os.getpid()}
        mine = []
        for handle in self._handles:
            try:
                users = {p.pid for p in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)}
            except self._nvml.NVMLError:
                continue
            if users & pids:
                mine.append(handle)
        # In a container NVML names the host's pids, which match nothing here.
        return mine or (self._handles if _cuda_initialized() else [])

    def sample(self) -> list[types_pb2.GpuUsage]:
        """One message per GPU in use: utilisation 0..1, memory in bytes."""
        if self._nvml is None:
            return []
        found = []
        for handle in self._mine():
            try:
                rates = self._nvml.nvmlDeviceGetUtilizationRates(handle)
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
            except self._nvml.NVMLError:
                continue
            found.append(
                types_pb2.GpuUsage(
                    uuid=self._uuid(handle),
                    utilization_ratio=rates.gpu / 100,
                    memory_used_bytes=int(memory.used),
                    memory_total_bytes=int(memory.total),
                )
            )
        return found
