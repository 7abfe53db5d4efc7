"""What the gateway shows.

Responsibility: names and labels. Does not know HTTP.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

__all__ = ["GatewayMetrics"]

# From a first word to a long answer.
_ANSWERS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class GatewayMetrics:
    """What the gateway is asked and answers.

    Attributes:
        registry: to show.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._requests = Histogram(
            "arriero_gateway_request_seconds",
            "From a request to its answer, or to the first word of one that streams.",
            ("route", "status"),
            buckets=_ANSWERS,
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "arriero_gateway_prompt_tokens_total",
            "Tokens of prompts, by endpoint.",
            ("model_name",),
            registry=registry,
        )
        self._generation_tokens = Counter(
            "arriero_gateway_generation_tokens_total",
            "Tokens made, by endpoint.",
            ("model_name",),
            registry=registry,
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request got its answer, or the first part of it."""
        self._requests.labels(route, str(status)).observe(seconds)

    def tokens(self, model: str, prompt: int, made: int) -> None:
        """An answer ended; names that nobody serves make no series."""
        if prompt or made:
            self._prompt_tokens.labels(model).inc(prompt)
            self._generation_tokens.labels(model).inc(made)
