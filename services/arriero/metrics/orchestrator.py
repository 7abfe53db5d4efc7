"""What the orchestrator shows of runs, endpoints, store and host.

Responsibility: names, labels, and how long a run's series stay. Does not know
where figures come from: plain numbers are handed in.

Series of a run come from a collector that drops them 15 minutes after the run's
end and holds a bounded number of runs, so that neither a long-lived process nor
many short runs make the page grow.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["EndpointFigures", "GpuFigures", "Metrics", "StageFigures"]

RETENTION_SECONDS = 15 * 60
MAX_RUNS = 200
# From a cached stage to a training of days.
_DURATIONS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuFigures:
    """One GPU: UUID, utilisation 0..1, memory in bytes."""

    uuid: str
    utilization_ratio: float
    memory_used_bytes: int
    memory_total_bytes: int


@dataclass(frozen=True, slots=True)
class StageFigures:
    """How far a stage is; None is not known. Times are Unix seconds."""

    kind: str
    state: str = ""
    step: int | None = None
    total_steps: int | None = None
    training_step: int | None = None
    training_total_steps: int | None = None
    loss: float | None = None
    raw_loss: float | None = None
    grad_norm: float | None = None
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    tokens: int | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    eta_seconds: float | None = None
    update_time: float | None = None
    checkpoint_time: float | None = None
    attempts: int | None = None
    cpu_cores: float | None = None
    memory_bytes: int | None = None
    gpus: tuple[GpuFigures, ...] = ()


@dataclass(frozen=True, slots=True)
class EndpointFigures:
    """What an endpoint serves. `kl_divergence` in nats per token, to the trained model."""

    endpoint: str
    artifact: str
    run: str
    desired: int
    ready: int
    kl_divergence: float | None = None
    top1_agreement: float | None = None


@dataclass(slots=True)
class _Run:
    state: str = "RUNNING"
    ended: float | None = None
    stages: dict[str, StageFigures] = field(default_factory=dict)


# Name, help, how to read it from a stage's figures.
_STAGE_GAUGES: tuple[tuple[str, str, Callable[[StageFigures, float], float | None]], ...] = (
    ("stage_step", "Steps done, in the stage's own unit", lambda s, _: s.step),
    ("stage_planned_steps", "Steps planned", lambda s, _: s.total_steps),
    (
        "stage_progress_ratio",
        "Share of the planned steps that is done, 0 to 1",
        lambda s, _: None if not s.total_steps else (s.step or 0) / s.total_steps,
    ),
    ("training_step", "Optimizer steps done", lambda s, _: s.training_step),
    ("training_planned_steps", "Optimizer steps planned", lambda s, _: s.training_total_steps),
    (
        "training_progress_ratio",
        "Share of the planned optimizer steps that is done, 0 to 1",
        lambda s, _: (
            s.training_step / s.training_total_steps
            if s.training_step is not None and s.training_total_steps
            else None
        ),
    ),
    ("training_loss_nats", "Smoothed training loss per token", lambda s, _: s.loss),
    ("training_raw_loss_nats", "Training loss per token of the last step", lambda s, _: s.raw_loss),
    ("training_grad_norm", "Norm of the gradient before clipping", lambda s, _: s.grad_norm),
    (
        "training_micro_batch_size",
        "Rows per forward pass now: fewer than asked for where memory ran out",
        lambda s, _: s.micro_batch_size,
    ),
    ("training_learning_rate", "Learning rate now", lambda s, _: s.learning_rate),
    ("training_tokens", "Tokens trained on so far", lambda s, _: s.tokens),
    ("training_tokens_per_second", "Training throughput", lambda s, _: s.tokens_per_second),
    ("training_mfu_ratio", "Model FLOPs utilisation, 0 to 1", lambda s, _: s.mfu),
    (
        "stage_eta_seconds",
        "Seconds left, from the rate since start or resume",
        lambda s, _: s.eta_seconds,
    ),
    (
        "stage_last_update_timestamp_seconds",
        "When the job last reported",
        lambda s, _: s.update_time,
    ),
    (
        "training_checkpoint_age_seconds",
        "Age of the newest complete checkpoint: what a kill would lose",
        lambda s, now: None if s.checkpoint_time is None else max(0.0, now - s.checkpoint_time),
    ),
    # Not `stage_attempts`: that is the counter's family in OpenMetrics.
    ("stage_jobs_started", "Jobs of the stage, evictions included", lambda s, _: s.attempts),
    ("job_cpu_cores", "Cores that the stage's job uses", lambda s, _: s.cpu_cores),
    ("job_memory_bytes", "Resident memory of the stage's job", lambda s, _: s.memory_bytes),
)


class _RunCollector(Collector):
    """Series of runs, from what was last handed in."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._runs: dict[str, _Run] = {}
        self._lock = threading.Lock()  # the HTTP server collects in a thread of its own

    def describe(self) -> Iterable[Metric]:
        return []

    def stage(self, run: str, stage: str, figures: StageFigures) -> None:
        with self._lock:
            self._touch(run).stages[stage] = figures

    def state(self, run: str, state: str, *, ended: bool) -> None:
        with self._lock:
            entry = self._touch(run)
            entry.state = state
            entry.ended = self._clock() if ended else None

    def _touch(self, run: str) -> _Run:
        entry = self._runs.get(run)
        if entry is None:
            self._drop()
            entry = self._runs[run] = _Run()
        return entry

    def _drop(self) -> None:
        now = self._clock()
        for name, entry in list(self._runs.items()):
            if entry.ended is not None and now - entry.ended >= RETENTION_SECONDS:
                del self._runs[name]
        while len(self._runs) >= MAX_RUNS:
            ended = [n for n, r in self._runs.items() if r.ended is not None]
            # Ended ones go first, each group oldest first.
            del self._runs[ended[0] if ended else next(iter(self._runs))]

    def collect(self) -> Iterator[Metric]:
        with self._lock:
            now = self._clock()
            runs = {
                name: _copy(entry)
                for name, entry in self._runs.items()
                if entry.ended is None or now - entry.ended < RETENTION_SECONDS
            }
        yield from self._stage_families(runs, now)
        yield from self._gpu_families(runs)
        states = GaugeMetricFamily(
            "arriero_run_state", "1 for the state that the run is in", labels=["run", "state"]
        )
        for name, entry in runs.items():
            states.add_metric([name, entry.state], 1)
        yield states

    @staticmethod
    def _stage_families(runs: Mapping[str, _Run], now: float) -> Iterator[Metric]:
        labels = ["run", "stage", "kind"]
        state = GaugeMetricFamily(
            "arriero_stage_state", "1 for the state that the stage is in", labels=[*labels, "state"]
        )
        for run, entry in runs.items():
            for stage, figures in entry.stages.items():
                if figures.state:
                    state.add_metric([run, stage, figures.kind, figures.state], 1)
        yield state
        for name, text, read in _STAGE_GAUGES:
            family = GaugeMetricFamily(f"arriero_{name}", text, labels=labels)
            for run, entry in runs.items():
                for stage, figures in entry.stages.items():
                    value = read(figures, now)
                    if value is not None:
                        family.add_metric([run, stage, figures.kind], value)
            yield family

    @staticmethod
    def _gpu_families(runs: Mapping[str, _Run]) -> Iterator[Metric]:
        labels = ["run", "stage", "gpu"]
        util = GaugeMetricFamily(
            "arriero_job_gpu_utilization_ratio", "Utilisation of a job's GPU, 0 to 1", labels=labels
        )
        used = GaugeMetricFamily(
            "arriero_job_gpu_memory_used_bytes", "Memory in use on a job's GPU", labels=labels
        )
        total = GaugeMetricFamily(
            "arriero_job_gpu_memory_total_bytes", "Memory of a job's GPU", labels=labels
        )
        for run, entry in runs.items():
            for stage, figures in entry.stages.items():
                for gpu in figures.gpus:
                    key = [run, stage, gpu.uuid]
                    util.add_metric(key, gpu.utilization_ratio)
                    used.add_metric(key, gpu.memory_used_bytes)
                    total.add_metric(key, gpu.memory_total_bytes)
        yield from (util, used, total)


def _copy(entry: _Run) -> _Run:
    """A copy that later updates leave alone."""
    return replace(entry, stages=dict(entry.stages))


@dataclass(frozen=True, slots=True)
class Limits:
    """What comes to an end; None where nothing does, or nobody knows."""

    store_bytes: int | None = None
    """That the store may hold."""
    certificate_ends: float | None = None
    """Unix seconds."""


class _LiveCollector(Collector):
    """Endpoints, store and host, asked when the page is read."""

    def __init__(
        self,
        endpoints: Callable[[], Sequence[EndpointFigures]],
        store_bytes: Callable[[], Mapping[str, int]],
        limits: Callable[[], Limits],
        gpus: Callable[[], Sequence[GpuFigures]],
        clock: Callable[[], float],
    ) -> None:
        self._limits = limits
        self._endpoints, self._store_bytes, self._gpus = endpoints, store_bytes, gpus
        self._clock = clock
        self._usage: tuple[float, Mapping[str, int]] | None = None

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        # One part that cannot be read must not take the page away.
        for part in (
            self._endpoint_families,
            self._store_family,
            self._limit_families,
            self._host_families,
        ):
            try:
                yield from list(part())
            except Exception:
                _log.exception("metrics: %s failed", part.__name__)

    def _endpoint_families(self) -> Iterator[Metric]:
        def gauge(name: str, text: str, labels: Sequence[str] = ("endpoint",)) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"arriero_endpoint_{name}", text, labels=list(labels))

        desired = gauge("replicas_desired", "Replicas that are wanted")
        ready = gauge("replicas_ready", "Replicas that serve the wanted artifact")
        kl = gauge("kl_to_trained", "KL divergence of the live replicas to the trained model, nats")
        top1 = gauge("top1_agreement", "Top-1 agreement with the trained model, 0 to 1")
        info = gauge("info", "What is served", ("endpoint", "artifact", "run"))
        for e in self._endpoints():
            desired.add_metric([e.endpoint], e.desired)
            ready.add_metric([e.endpoint], e.ready)
            info.add_metric([e.endpoint, e.artifact, e.run], 1)
            if e.kl_divergence is not None:
                kl.add_metric([e.endpoint], e.kl_divergence)
            if e.top1_agreement is not None:
                top1.add_metric([e.endpoint], e.top1_agreement)
        yield from (desired, ready, info, kl, top1)

    def _store_family(self) -> Iterator[Metric]:
        now = self._clock()
        if self._usage is None or now - self._usage[0] > 30:  # it walks the store
            self._usage = (now, self._store_bytes())
        family = GaugeMetricFamily(
            "arriero_store_bytes", "Bytes in the model store by artifact kind", labels=["kind"]
        )
        for kind, size in sorted(self._usage[1].items()):
            family.add_metric([kind], size)
        yield family

    def _limit_families(self) -> Iterator[Metric]:
        limits = self._limits()
        if limits.store_bytes is not None:
            yield GaugeMetricFamily(
                "arriero_store_quota_bytes", "Bytes that the store may hold", limits.store_bytes
            )
        if limits.certificate_ends is not None:
            yield GaugeMetricFamily(
                "arriero_certificate_expiration_timestamp_seconds",
                "When the certificate that this service shows ends, in Unix seconds",
                limits.certificate_ends,
            )

    def _host_families(self) -> Iterator[Metric]:
        import psutil

        memory = psutil.virtual_memory()
        for name, text, value in (
            (
                "host_cpu_ratio",
                "CPU in use on this host since the last reading, 0 to 1",
                psutil.cpu_percent() / 100,
            ),
            (
                "host_memory_used_bytes",
                "Memory in use on this host",
                memory.total - memory.available,
            ),
            ("host_memory_total_bytes", "Memory of this host", memory.total),
        ):
            yield GaugeMetricFamily(f"arriero_{name}", text, value=value)
        util = GaugeMetricFamily(
            "arriero_gpu_utilization_ratio",
            "Utilisation of this host's GPU, 0 to 1",
            labels=["gpu"],
        )
        used = GaugeMetricFamily(
            "arriero_gpu_memory_used_bytes", "Memory in use on this host's GPU", labels=["gpu"]
        )
        total = GaugeMetricFamily(
            "arriero_gpu_memory_total_bytes", "Memory of this host's GPU", labels=["gpu"]
        )
        for gpu in self._gpus():
            util.add_metric([gpu.uuid], gpu.utilization_ratio)
            used.add_metric([gpu.uuid], gpu.memory_used_bytes)
            total.add_metric([gpu.uuid], gpu.memory_total_bytes)
        yield from (util, used, total)


class LocalGpus:
    """All GPUs of this host by NVML; none where there is no driver."""

    def __init__(self) -> None:
        self._nvml: Any = None
        try:
            import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

            pynvml.nvmlInit()
        except Exception:  # absent module, absent driver: both mean no GPU to show
            return
        self._nvml = pynvml

    def __call__(self) -> list[GpuFigures]:
        """Utilisation and memory now."""
        nvml = self._nvml
        found = []
        for index in range(nvml.nvmlDeviceGetCount() if nvml else 0):
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                uuid = nvml.nvmlDeviceGetUUID(handle)
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                rates = nvml.nvmlDeviceGetUtilizationRates(handle)
            except nvml.NVMLError:
                continue
            found.append(
                GpuFigures(
                    uuid.decode() if isinstance(uuid, bytes) else str(uuid),
                    rates.gpu / 100,
                    int(memory.used),
                    int(memory.total),
                )
            )
        return found


class Metrics:
    """What the orchestrator counts; one per registry.

    Args:
        registry: where the series are registered.
        endpoints: the endpoints now.
        store_bytes: bytes in the store by kind; asked at most twice a minute.
        limits: of the store and the certificate, now.
        gpus: this host's GPUs now.
        clock: Unix seconds.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        endpoints: Callable[[], Sequence[EndpointFigures]] = tuple,
        store_bytes: Callable[[], Mapping[str, int]] = dict,
        limits: Callable[[], Limits] = Limits,
        gpus: Callable[[], Sequence[GpuFigures]] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.registry = registry
        self._runs = _RunCollector(clock)
        registry.register(self._runs)
        registry.register(
            _LiveCollector(endpoints, store_bytes, limits, gpus or LocalGpus(), clock)
        )
        self._runs_total = Counter(
            "arriero_runs", "Runs that ended, by state", ["state"], registry=registry
        )
        self._durations = Histogram(
            "arriero_stage_duration_seconds",
            "From a stage's start to its end",
            ["kind", "state"],
            buckets=_DURATIONS,
            registry=registry,
        )
        self._waits = Histogram(
            "arriero_stage_wait_seconds",
            "From a stage's start to its first job's",
            ["kind"],
            buckets=_DURATIONS,
            registry=registry,
        )
        self._attempts = Counter(
            "arriero_stage_attempts", "Jobs of ended stages", ["kind"], registry=registry
        )
        self._hits = Counter(
            "arriero_cache_hits",
            "Stages whose result the store had",
            ["kind"],
            registry=registry,
        )
        self._gates = Counter(
            "arriero_gate_results",
            "Gates judged, by gate and verdict",
            ["gate", "verdict"],
            registry=registry,
        )

    def stage_progress(self, run: str, stage: str, figures: StageFigures) -> None:
        """A stage's newest figures."""
        self._runs.stage(run, stage, figures)

    def stage_ended(
        self,
        kind: str,
        state: str,
        *,
        seconds: float,
        wait_seconds: float | None = None,
        attempts: int = 0,
        cached: bool = False,
        gates: Iterable[tuple[str, str]] = (),
    ) -> None:
        """A stage ended: `gates` are pairs of gate and verdict (both lower case)."""
        self._durations.labels(kind, state).observe(max(0.0, seconds))
        if wait_seconds is not None:
            self._waits.labels(kind).observe(max(0.0, wait_seconds))
        self._attempts.labels(kind).inc(attempts)
        if cached:
            self._hits.labels(kind).inc()
        for gate, verdict in gates:
            self.gate(gate, verdict)

    def gate(self, gate: str, verdict: str) -> None:
        """A gate was judged."""
        self._gates.labels(gate, verdict).inc()

    def run_state(self, run: str, state: str, *, ended: bool) -> None:
        """A run is in another state now."""
        self._runs.state(run, state, ended=ended)
        if ended:
            self._runs_total.labels(state).inc()
