"""From raw rows to a served model, through real processes over gRPC."""

from __future__ import annotations

import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from arriero.v1 import orchestrator_pb2 as pb

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def run(
    platform: Any, tiny_pipeline: Write, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The tiny pipeline, run once from the command line."""
    path = tiny_pipeline(tmp_path_factory.mktemp("pipeline"))
    ended: dict[str, Any] = platform.json("run", str(path))
    return ended


def outputs(run: dict[str, Any], stage: str) -> dict[str, str]:
    found = next(s for s in run["stages"] if s["name"] == stage)
    return {output["name"]: output["digest"] for output in found.get("outputs", [])}


def test_every_stage_succeeds_and_every_gate_passes(run: dict[str, Any]) -> None:
    assert run["state"] == "RUN_STATE_SUCCEEDED"
    assert {s["state"] for s in run["stages"]} == {"STAGE_STATE_SUCCEEDED"}
    gates = {
        gate["gate"]: gate["verdict"]
        for stage in run["stages"]
        for gate in stage["metadata"].get("gates", [])
    }
    wanted = {
        "dataset.schema",
        "dataset.labels",
        "dataset.bos",
        "adapter.health",
        "merge.delta",
        "merge.logits",
        "gguf.tokens",
        "gguf.template",
        "gguf.rope",
        "quant.kld",
        "serve.smoke",
    }
    assert wanted <= gates.keys()
    assert all(gates[name] == "GATE_VERDICT_PASSED" for name in wanted), gates


def test_the_endpoint_serves_what_was_trained(platform: Any, run: dict[str, Any]) -> None:
    endpoint = platform.json("endpoints", "get", "tiny")
    (replica,) = endpoint["replicas"]
    assert replica["state"] == "REPLICA_STATE_READY"
    assert replica["kl_divergence"] < 0.05
    assert endpoint["run"] == run["id"]
    kinds = [artifact["kind"] for artifact in endpoint["lineage"]]
    assert kinds[0] == "gguf"
    assert {"model", "adapter", "dataset"} <= set(kinds)


def test_people_and_programs_can_talk_to_it(platform: Any, run: dict[str, Any]) -> None:
    answer = platform.json(
        "chat", "tiny", "Name llama 1", "--max-tokens", "5", "--temperature", "0"
    )
    assert answer["role"] == "assistant"
    text = platform.cli("generate", "tiny", "Name", "--max-tokens", "4").stdout
    assert text.strip("\n") != ""
    with platform.client() as client:
        again = client.endpoint("tiny").chat("Name llama 1", max_tokens=5, temperature=0).text()
    assert again == answer["content"]
    with openai.OpenAI(base_url=platform.json("status")["gateway"], api_key="none") as outside:
        assert "tiny" in [model.id for model in outside.models.list()]
        said = outside.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Name llama 1"}],
            max_tokens=5,
            temperature=0,
        )
        assert said.choices[0].message.content == answer["content"]
        shaped = outside.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Name llama 1"}],
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"enum": ["one", "two"]}},
            },
            logprobs=True,
            top_logprobs=2,
            max_tokens=50,
        )
    assert shaped.choices[0].message.content in ('"one"', '"two"')
    told = shaped.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in told.content)


def test_the_same_pipeline_again_does_no_work_twice(
    platform: Any, run: dict[str, Any], tiny_pipeline: Write, tmp_path: Path
) -> None:
    again = platform.json("run", str(tiny_pipeline(tmp_path)))
    assert again["state"] == "RUN_STATE_SUCCEEDED"
    cached = {s["name"]: s["metadata"].get("cached", False) for s in again["stages"]}
    assert cached == {name: name != "live" for name in cached}
    assert outputs(again, "quants") == outputs(run, "quants")


def test_a_dry_run_tells_what_is_there_already(
    platform: Any, run: dict[str, Any], tiny_pipeline: Write, tmp_path: Path
) -> None:
    before = len(platform.json("runs", "list"))
    shown = platform.cli(
        "run", str(tiny_pipeline(tmp_path)), "--dry-run", "--set", "stages.sft.max_steps=5"
    ).stdout
    lines = {line.split()[0]: line for line in shown.splitlines() if line.split()}
    assert "reuse" in lines["rows"]
    assert "to do" in lines["sft"]
    assert len(platform.json("runs", "list")) == before


def test_artifacts_can_be_listed_tagged_traced_pulled_and_pushed(
    platform: Any, run: dict[str, Any], tmp_path: Path
) -> None:
    tuned = outputs(run, "tuned")["model"]
    listed = platform.json("artifacts", "list", "--kind", "model")
    assert tuned in [a["digest"] for a in listed]
    platform.cli("artifacts", "tag", tuned, "model/tiny:v1")
    assert platform.json("artifacts", "get", "model/tiny:v1")["digest"] == tuned
    assert platform.json("artifacts", "get", tuned)["labels"]["team"] == "herd"
    assert "adapter" in platform.cli("artifacts", "lineage", "model/tiny:v1").stdout
    platform.cli("artifacts", "pull", "model/tiny:v1", str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").exists()
    rows = tmp_path / "raw.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    platform.cli("artifacts", "push", str(rows), "dataset/raw:v1")
    assert platform.json("artifacts", "get", "dataset/raw:v1")["kind"] == "dataset"


def test_collecting_garbage_takes_nothing_that_is_served(
    platform: Any, run: dict[str, Any]
) -> None:
    platform.cli("artifacts", "gc")
    served = platform.json("endpoints", "get", "tiny")
    assert served["replicas"][0]["state"] == "REPLICA_STATE_READY"
    digest = served["spec"]["model"]
    assert platform.json("artifacts", "get", digest)["present"] is True


def test_logs_stay_after_the_jobs_are_gone(platform: Any, run: dict[str, Any]) -> None:
    lines = platform.cli("runs", "logs", run["id"], "--stage", "sft").stdout
    assert "sft" in lines


def test_an_endpoint_is_scaled_and_deleted_by_hand(platform: Any, run: dict[str, Any]) -> None:
    best = outputs(run, "best")["chosen"]
    platform.cli("endpoints", "create", "by-hand", best, "--context", "256")
    scaled = platform.json("endpoints", "scale", "by-hand", "--replicas", "2")
    assert scaled["ready_replicas"] == 2
    assert len({r["address"] for r in scaled["replicas"]}) == 2
    platform.cli("endpoints", "delete", "by-hand")
    assert "by-hand" not in [e["name"] for e in platform.json("endpoints", "list")]


def test_the_prometheus_page_tells_of_the_run(platform: Any, run: dict[str, Any]) -> None:
    page = urllib.request.urlopen(platform.home.running()["metrics"]).read().decode()
    for name in (
        "arriero_training_step",
        "arriero_training_planned_steps",
        "arriero_training_loss_nats",
        "arriero_stage_duration_seconds",
        "arriero_gate_results_total",
        "arriero_cache_hits_total",
        "arriero_endpoint_replicas_ready",
        "arriero_endpoint_kl_to_trained",
    ):
        assert name in page, name
    assert run["id"] in page


def test_reflection_lists_the_services(platform: Any) -> None:
    wanted = {
        "orchestrator": {
            "arriero.v1.RunService",
            "arriero.v1.EndpointService",
            "arriero.v1.ArtifactService",
        },
        "training": {"arriero.v1.TrainingService", "google.longrunning.Operations"},
    }
    for name, services in wanted.items():
        address = platform.home.running()["services"][name]["address"]
        with grpc.insecure_channel(address) as channel:
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            ask = reflection_pb2.ServerReflectionRequest(list_services="")
            (answer,) = stub.ServerReflectionInfo(iter([ask]))
            listed = {s.name for s in answer.list_services_response.service}
            assert services <= listed
            ask = reflection_pb2.ServerReflectionRequest(file_containing_symbol=min(services))
            (answer,) = stub.ServerReflectionInfo(iter([ask]))
            assert FileDescriptorProto.FromString(
                answer.file_descriptor_response.file_descriptor_proto[0]
            ).name


def test_two_trainings_three_quants_and_one_chosen(
    platform: Any, tiny_pipeline: Write, tmp_path: Path
) -> None:
    def train(**more: Any) -> dict[str, Any]:
        return {
            "train": {
                "model": "base",
                "dataset": "rows",
                "lora": {"r": 2},
                "max_steps": 2,
                "batch_size": 4,
                "dtype": "float32",
                **more,
            }
        }

    path = tiny_pipeline(
        tmp_path,
        name="fan",
        sft=train(learning_rate=0.001),
        other=train(learning_rate=0.01),
        tuned={"merge": {"model": "base", "adapters": ["sft"]}},
        quants={"quantize": {"model": "tuned", "types": ["F16", "Q8_0", "Q4_0"]}},
        best={"evaluate": {"models": ["quants"], "choose": {"smallest": {"max_kld": 1000.0}}}},
        live=None,
    )
    run = platform.json("run", str(path))
    assert run["state"] == "RUN_STATE_SUCCEEDED"
    quants = outputs(run, "quants")
    assert list(quants) == ["F16", "Q8_0", "Q4_0"]
    assert outputs(run, "best")["chosen"] == quants["Q4_0"]
    assert outputs(run, "sft")["adapter"] != outputs(run, "other")["adapter"]
    with platform.client() as client:
        stages = {s.name: s for s in client.get_run(run["id"]).stages}
    assert stages["other"].state == pb.STAGE_STATE_SUCCEEDED
    assert "rows" in stages["other"].depends_on
    assert "sft" not in stages["other"].depends_on
