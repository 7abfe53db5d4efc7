"""A job's progress: what it last was, how long it will take, and telling the service.

Responsibility: the meter that a job writes to, and the thread that sends what
it shows. Does not know who reads it; a service that is away costs nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from arriero.operations.handoff import EXIT_TRY_AGAIN, TOKEN_KEY, Assignment
from arriero.operations.process import end_self
from arriero.operations.usage import GpuMeter, HostUsage
from arriero.v1 import types_pb2

if TYPE_CHECKING:
    import grpc

    from arriero.v1 import job_pb2_grpc

# At most two reports a second.
INTERVAL = 0.5
DEADLINE = 2.0
# What training said stays while later phases go on.
_KEPT = (
    "loss",
    "raw_loss",
    "grad_norm",
    "micro_batch_size",
    "learning_rate",
    "tokens",
    "training_step",
    "training_total_steps",
)


class ProgressMeter:
    """The newest progress of this process; thread-safe and cheap to write.

    The time left is (planned - done) steps at the mean rate since this process'
    first step of the phase, so that the steps of earlier attempts don't count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._progress = types_pb2.Progress()
        self._phase: tuple[str, str, int] | None = None
        self._first: tuple[int, float] = (0, 0.0)
        self.version = 0

    def update(
        self,
        *,
        phase: str,
        step: int = 0,
        total: int = 0,
        unit: str = "",
        loss: float | None = None,
        raw_loss: float | None = None,
        grad_norm: float | None = None,
        micro_batch_size: int | None = None,
        learning_rate: float | None = None,
        tokens_per_second: float | None = None,
        tokens: int | None = None,
        mfu: float | None = None,
        checkpoint_time: float | None = None,
    ) -> None:
        """Replace the progress; what training and the newest checkpoint said stays.

        Steps in the unit `steps` are optimizer steps.
        """
        now = self._clock()
        with self._lock:
            if self._phase != (phase, unit, total) or step < self._first[0]:
                self._phase, self._first = (phase, unit, total), (step, now)
            progress = types_pb2.Progress(
                phase=phase,
                step=step,
                total_steps=total,
                unit=unit,
                loss=loss,
                raw_loss=raw_loss,
                grad_norm=grad_norm,
                micro_batch_size=micro_batch_size,
                learning_rate=learning_rate,
                tokens_per_second=tokens_per_second,
                tokens=tokens,
                mfu=mfu,
                eta_seconds=self._eta(step, total, now),
            )
            if unit == "steps":
                progress.training_step, progress.training_total_steps = step, total
            for field in _KEPT:
                _keep(self._progress, progress, field)
            if checkpoint_time is not None:
                progress.checkpoint_time.FromMilliseconds(int(checkpoint_time * 1000))
            elif self._progress.HasField("checkpoint_time"):
                progress.checkpoint_time.CopyFrom(self._progress.checkpoint_time)
            progress.update_time.GetCurrentTime()
            self._progress = progress
            self.version += 1

    def _eta(self, step: int, total: int, now: float) -> float | None:
        first_step, first_time = self._first
        if total <= 0 or step <= first_step or now <= first_time:
            return None
        return max(0, total - step) * (now - first_time) / (step - first_step)

    def read(self) -> types_pb2.Progress:
        """A copy of the newest progress."""
        with self._lock:
            copy = types_pb2.Progress()
            copy.CopyFrom(self._progress)
            return copy


def _keep(old: types_pb2.Progress, new: types_pb2.Progress, field: Any) -> None:
    if old.HasField(field) and not new.HasField(field):
        setattr(new, field, getattr(old, field))


class ProgressSender:
    """A daemon thread that sends the meter to the service when it moved.

    Host and GPU usage are sampled here, also between the job's own updates, so
    that a long step still shows that something happens.
    """

    def __init__(self, assignment: Assignment, meter: ProgressMeter) -> None:
        self._assignment = assignment
        self._meter = meter
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def start(self) -> None:
        """Begin; without an address to report to this does nothing."""
        if self._assignment.report_address:
            self._thread.start()

    def nudge(self) -> None:
        """Send as soon as the rate allows."""
        self._wake.set()

    def close(self) -> None:
        """Send what is newest and end; takes at most a deadline."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(DEADLINE + INTERVAL)

    def _run(self) -> None:
        # Imported here, beside the work: the job need not wait for grpc.
        from arriero.rpc.channel import connect_sync
        from arriero.settings import ClientSettings
        from arriero.v1 import job_pb2_grpc

        host, gpus = HostUsage(), GpuMeter()
        with connect_sync(self._assignment.report_address, ClientSettings.from_env()) as channel:
            stub = job_pb2_grpc.JobServiceStub(channel)
            host.sample()  # from here on cores are counted
            sent, sent_at, stopping = 0, 0.0, False
            while not stopping:
                self._wake.wait(INTERVAL)
                self._wake.clear()
                self._stop.wait(max(0.0, sent_at + INTERVAL - time.monotonic()))
                stopping = self._stop.is_set()
                version = self._meter.version
                # Without news the usage is still told, now and then.
                if version != sent or (sent and time.monotonic() - sent_at > 4 * INTERVAL):
                    self._send(stub, self._progress(host, gpus))
                    sent, sent_at = version, time.monotonic()

    def _progress(self, host: HostUsage, gpus: GpuMeter) -> types_pb2.Progress:
        progress = self._meter.read()
        cores, memory = host.sample()
        if cores is not None:
            progress.cpu_cores = cores
        if memory is not None:
            progress.memory_bytes = memory
        progress.gpus.extend(gpus.sample())
        return progress

    def _send(self, stub: job_pb2_grpc.JobServiceStub, progress: types_pb2.Progress) -> None:
        import grpc

        from arriero.v1 import job_pb2

        request = job_pb2.ReportProgressRequest(
            execution=self._assignment.execution,
            attempt=self._assignment.attempt,
            progress=progress,
        )
        metadata = ((TOKEN_KEY, self._assignment.report_token),)
        try:
            stub.ReportProgress(request, timeout=DEADLINE, metadata=metadata)
        except grpc.RpcError as error:
            # Superseded: another attempt is the current one, this one must not go on.
            if _code(error) is grpc.StatusCode.FAILED_PRECONDITION:
                end_self(EXIT_TRY_AGAIN)


def _code(error: grpc.RpcError) -> grpc.StatusCode | None:
    code = getattr(error, "code", None)
    return code() if callable(code) else None
