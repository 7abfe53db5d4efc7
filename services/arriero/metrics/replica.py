"""What a replica shows, under the names that vLLM's dashboards and autoscalers know.

Responsibility: names, labels and buckets; `arriero_` stands where vLLM writes `vllm:`.
Does not know how text is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["EngineLoad", "ReplicaMetrics"]

# Seconds. Between tokens, until the first one, and for a whole answer.
_GAPS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5)
_FIRST = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160)
_WHOLE = (0.1, 0.3, 0.5, 1, 2, 3, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What the engine does now, and what it has done since it was started.

    Attributes:
        running: requests that have a slot.
        waiting: requests that wait for one.
        kv_usage: share of the KV cache that running requests fill, 0 to 1.
        prompt_tokens: of all requests that got a slot.
        cached_tokens: how many of them were in the cache already.
        generation_tokens: tokens made.
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0

    def __add__(self, before: EngineLoad) -> EngineLoad:
        """This engine's load with the totals of those before it."""
        return EngineLoad(
            self.running,
            self.waiting,
            self.kv_usage,
            self.prompt_tokens + before.prompt_tokens,
            self.cached_tokens + before.cached_tokens,
            self.generation_tokens + before.generation_tokens,
        )


class _LoadCollector(Collector):
    """The engine's own figures, asked when the page is read."""

    def __init__(self, model: str, load: Callable[[], EngineLoad]) -> None:
        self._model, self._load = model, load

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        for name, text, value in (
            ("num_requests_running", "Requests that have a slot", load.running),
            ("num_requests_waiting", "Requests that wait for a slot", load.waiting),
            (
                "kv_cache_usage_perc",
                "Share of the KV cache that running requests fill, 0 to 1",
                load.kv_usage,
            ),
        ):
            gauge = GaugeMetricFamily(f"arriero_{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, text, total in (
            ("prompt_tokens", "Tokens of prompts, cached ones included", load.prompt_tokens),
            ("generation_tokens", "Tokens made", load.generation_tokens),
            ("prefix_cache_queries", "Tokens looked up in the cache", load.prompt_tokens),
            ("prefix_cache_hits", "Tokens found in the cache", load.cached_tokens),
        ):
            counter = CounterMetricFamily(f"arriero_{name}", text, labels=["model_name"])
            counter.add_metric([self._model], total)
            yield counter


class ReplicaMetrics:
    """What one replica counts.

    Args:
        registry: where the series are registered.
        model: the endpoint's name, label `model_name`.
        load: the engine's figures now; called from the thread that reads the page.
    """

    def __init__(
        self, registry: CollectorRegistry, model: str, load: Callable[[], EngineLoad]
    ) -> None:
        self.registry = registry
        registry.register(_LoadCollector(model, load))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(
                f"arriero_{name}", text, ["model_name"], buckets=buckets, registry=registry
            )
            return made.labels(model)

        self._first = histogram(
            "time_to_first_token_seconds", "From a request to its first text", _FIRST
        )
        self._gap = histogram(
            "inter_token_latency_seconds", "From one part of a text to the next", _GAPS
        )
        self._whole = histogram(
            "e2e_request_latency_seconds", "From a request to its answer's end", _WHOLE
        )
        self._model = model
        self._ended = Counter(
            "arriero_request_success",
            "Requests that were answered, by why the text ended",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        self._failed = Counter(
            "arriero_request_failure",
            "Requests that were not answered, by canonical code",
            ["model_name", "code"],
            registry=registry,
        )

    def first(self, seconds: float) -> None:
        """The first part of a text came."""
        self._first.observe(seconds)

    def gap(self, seconds: float) -> None:
        """One more part came."""
        self._gap.observe(seconds)

    def ended(self, seconds: float, reason: str) -> None:
        """An answer is complete; `reason` is `stop` or `length`."""
        self._whole.observe(seconds)
        self._ended.labels(self._model, reason).inc()

    def failed(self, code: str) -> None:
        """A request was refused or broke off; `code` in lower case, `cancelled` included."""
        self._failed.labels(self._model, code).inc()
