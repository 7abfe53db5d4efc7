"""The orchestrator's Prometheus page."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from arriero import metrics
from arriero.errors import InvalidArgument
from arriero.metrics import (
    EndpointFigures,
    EngineLoad,
    GatewayMetrics,
    GpuFigures,
    Limits,
    Metrics,
    ReplicaMetrics,
    StageFigures,
    orchestrator,
)


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def page(registry: CollectorRegistry) -> str:
    return generate_latest(registry).decode()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def test_a_training_shows_its_progress(registry, clock):
    made = Metrics(registry, clock=clock)
    gpu = GpuFigures("GPU-1", 0.5, 10, 20)
    made.stage_progress(
        "r-1",
        "sft",
        StageFigures(
            "train",
            "RUNNING",
            step=5,
            total_steps=20,
            training_step=6,
            training_total_steps=24,
            loss=1.5,
            eta_seconds=30.0,
            checkpoint_time=clock.now - 7,
            gpus=(gpu,),
        ),
    )
    text = page(registry)
    labels = '{kind="train",run="r-1",stage="sft"}'
    assert f"arriero_stage_step{labels} 5.0" in text
    assert f"arriero_training_step{labels} 6.0" in text
    assert f"arriero_training_planned_steps{labels} 24.0" in text
    assert f"arriero_training_progress_ratio{labels} 0.25" in text
    assert f"arriero_stage_progress_ratio{labels} 0.25" in text
    assert f"arriero_training_loss_nats{labels} 1.5" in text
    assert f"arriero_stage_eta_seconds{labels} 30.0" in text
    assert f"arriero_training_checkpoint_age_seconds{labels} 7.0" in text
    assert "arriero_training_mfu_ratio{" not in text
    assert 'arriero_job_gpu_utilization_ratio{gpu="GPU-1",run="r-1",stage="sft"} 0.5' in text


def test_what_comes_to_an_end_is_shown_where_it_is_known(registry):
    Metrics(registry, limits=lambda: Limits(store_bytes=1000, certificate_ends=2e9))
    text = page(registry)
    assert "arriero_store_quota_bytes 1000.0" in text
    assert "arriero_certificate_expiration_timestamp_seconds 2e+09" in text
    other = CollectorRegistry()
    Metrics(other)
    assert "quota" not in page(other)
    assert "certificate" not in page(other)


def test_a_runs_series_go_fifteen_minutes_after_its_end(registry, clock):
    made = Metrics(registry, clock=clock)
    made.stage_progress("r-1", "sft", StageFigures("train", "RUNNING", step=1))
    made.run_state("r-1", "SUCCEEDED", ended=True)
    clock.now += 14 * 60
    assert 'run="r-1"' in page(registry)
    clock.now += 61
    assert 'run="r-1"' not in page(registry)
    assert 'arriero_runs_total{state="SUCCEEDED"} 1.0' in page(registry)


def test_the_number_of_runs_is_capped_and_ended_ones_go_first(registry, clock):
    made = Metrics(registry, clock=clock)
    made.run_state("active", "RUNNING", ended=False)
    for i in range(orchestrator.MAX_RUNS + 10):
        made.run_state(f"r-{i}", "FAILED", ended=True)
    text = page(registry)
    assert text.count("arriero_run_state{") == orchestrator.MAX_RUNS
    assert 'run="active"' in text
    assert 'run="r-0"' not in text


def test_ended_stages_are_counted(registry, clock):
    made = Metrics(registry, clock=clock)
    made.stage_ended(
        "merge",
        "SUCCEEDED",
        seconds=3,
        wait_seconds=0.2,
        attempts=2,
        cached=True,
        gates=[("merge.logits", "passed")],
    )
    text = page(registry)
    assert 'arriero_stage_duration_seconds_sum{kind="merge",state="SUCCEEDED"} 3.0' in text
    assert 'arriero_stage_attempts_total{kind="merge"} 2.0' in text
    assert 'arriero_cache_hits_total{kind="merge"} 1.0' in text
    assert 'arriero_gate_results_total{gate="merge.logits",verdict="passed"} 1.0' in text


def test_pages_are_valid_openmetrics_which_prometheus_asks_for(registry, clock):
    orchestrators = Metrics(
        registry,
        endpoints=lambda: [EndpointFigures("zh", "sha256:1", "r-1", 3, 2, 0.04, 0.9)],
        store_bytes=lambda: {"model": 5},
        limits=lambda: Limits(store_bytes=1000, certificate_ends=2e9),
        clock=clock,
    )
    figures = StageFigures("train", "RUNNING", step=1, attempts=2, gpus=(GpuFigures("0", 0, 1, 2),))
    orchestrators.stage_progress("r-1", "sft", figures)
    orchestrators.stage_ended("train", "SUCCEEDED", seconds=3, attempts=2, cached=True)
    orchestrators.run_state("r-1", "SUCCEEDED", ended=True)
    replicas = ReplicaMetrics(CollectorRegistry(), "zh", EngineLoad)
    replicas.ended(0.1, "stop")
    replicas.failed("cancelled")
    gateways = GatewayMetrics(CollectorRegistry())
    gateways.answered("/v1/models", 200, 0.1)
    gateways.tokens("zh", 1, 2)
    for shown in (orchestrators, replicas, gateways):
        text = openmetrics.generate_latest(shown.registry).decode()
        assert len(list(text_string_to_metric_families(text))) > 2  # raises where names clash


def test_endpoints_store_and_host_are_asked_when_the_page_is_read(registry, clock):
    asked = []

    def usage() -> dict[str, int]:
        asked.append(1)
        return {"model": 5}

    Metrics(
        registry,
        endpoints=lambda: [EndpointFigures("zh", "sha256:1", "r-1", 3, 2, 0.04, 0.9)],
        store_bytes=usage,
        gpus=lambda: [GpuFigures("GPU-7", 1.0, 1, 2)],
        clock=clock,
    )
    text = page(registry)
    assert 'arriero_endpoint_replicas_ready{endpoint="zh"} 2.0' in text
    assert 'arriero_endpoint_info{artifact="sha256:1",endpoint="zh",run="r-1"} 1.0' in text
    assert 'arriero_endpoint_kl_to_trained{endpoint="zh"} 0.04' in text
    assert 'arriero_store_bytes{kind="model"} 5.0' in text
    assert 'arriero_gpu_utilization_ratio{gpu="GPU-7"} 1.0' in text
    assert "arriero_host_memory_used_bytes " in text
    page(registry)
    assert len(asked) == 1


def test_a_part_that_fails_does_not_take_the_page_away(registry, clock):
    def broken() -> list[EndpointFigures]:
        raise OSError("gone")

    Metrics(registry, endpoints=broken, clock=clock)
    assert "arriero_host_cpu_ratio" in page(registry)


def test_the_page_is_served_and_its_address_is_written(registry, clock, tmp_path):
    Metrics(registry, clock=clock)
    file = tmp_path / "address"
    address, stop = metrics.serve(registry, listen="127.0.0.1:0", address_file=file)
    try:
        assert file.read_text().strip() == address
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=120) as answer:
            assert b"arriero_host_cpu_ratio" in answer.read()
    finally:
        stop()


@pytest.mark.parametrize("listen", ["nowhere", ":9090", "127.0.0.1:x"])
def test_a_listen_address_that_is_none_is_refused(registry, listen):
    with pytest.raises(InvalidArgument, match="ARRIERO_METRICS_LISTEN"):
        metrics.serve(registry, listen=listen)


def test_a_replica_shows_what_vllm_shows(registry):
    before = EngineLoad(prompt_tokens=100, cached_tokens=10, generation_tokens=5)
    made = ReplicaMetrics(registry, "faq", lambda: EngineLoad(2, 3, 0.25, 7, 4, 9) + before)
    made.first(0.2)
    made.gap(0.03)
    made.ended(1.5, "stop")
    made.failed("resource_exhausted")
    text = page(registry)
    label = '{model_name="faq"}'
    for line in (
        f"arriero_num_requests_running{label} 2.0",
        f"arriero_num_requests_waiting{label} 3.0",
        f"arriero_kv_cache_usage_perc{label} 0.25",
        f"arriero_prompt_tokens_total{label} 107.0",
        f"arriero_generation_tokens_total{label} 14.0",
        f"arriero_prefix_cache_hits_total{label} 14.0",
        f"arriero_time_to_first_token_seconds_sum{label} 0.2",
        f"arriero_inter_token_latency_seconds_count{label} 1.0",
        f"arriero_e2e_request_latency_seconds_sum{label} 1.5",
        'arriero_request_success_total{finished_reason="stop",model_name="faq"} 1.0',
        'arriero_request_failure_total{code="resource_exhausted",model_name="faq"} 1.0',
    ):
        assert line in text
