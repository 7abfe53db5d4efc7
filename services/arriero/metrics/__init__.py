"""Every Prometheus metric of the project, and the HTTP port that shows them.

Responsibility: names, labels, buckets, and how long series stay; the registry is
injected. Does not know where figures come from: plain numbers are handed in.

All names start with `arriero_`.
"""

from arriero.metrics.gateway import GatewayMetrics
from arriero.metrics.orchestrator import EndpointFigures, GpuFigures, Limits, Metrics, StageFigures
from arriero.metrics.page import serve
from arriero.metrics.replica import EngineLoad, ReplicaMetrics

__all__ = [
    "EndpointFigures",
    "EngineLoad",
    "GatewayMetrics",
    "GpuFigures",
    "Limits",
    "Metrics",
    "ReplicaMetrics",
    "StageFigures",
    "serve",
]
