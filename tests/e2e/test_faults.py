"""Gates that fail, full disks, garbage collection at bad moments, replicas that die."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from google.rpc import code_pb2
from safetensors.numpy import load_file, save_file

from arriero.errors import ArrieroError, FailedPrecondition
from arriero.store import ManifestDraft, Store
from arriero.testing.adapters import tiny_adapter
from arriero.v1 import orchestrator_pb2 as pb

Stage = dict[str, Any]
Write = Callable[..., Path]
Wait = Callable[..., Any]


@pytest.fixture(scope="module")
def platform(platform_at: Any) -> Iterator[Any]:
    """All services; runs keep nothing from gc once they have ended."""
    with platform_at(ARRIERO_RETENTION_DAYS="0") as made:
        yield made


@pytest.fixture(scope="module")
def store(platform: Any) -> Store:
    return Store.open(platform.home.store)


def write_pipeline(path: Path, stages: dict[str, Stage], **more: Any) -> Path:
    body = {"name": path.stem, "stages": [{"name": n, **w} for n, w in stages.items()], **more}
    path.write_text(yaml.safe_dump(body, sort_keys=False))
    return path


# A failing gate


def untrained_adapter(directory: Path, base: Path) -> Path:
    """Its B is zero everywhere: merging it would change nothing."""
    tiny_adapter(directory, base)
    path = directory / "adapter_model.safetensors"
    values = load_file(str(path))
    for name, value in values.items():
        if "lora_B" in name:
            values[name] = np.zeros_like(value)
    save_file(values, str(path), metadata={"format": "pt"})
    return directory


def odd_tokenizer(directory: Path, base: Path) -> Path:
    """Its two tokenizer files disagree: llama.cpp reads one, training read the other."""
    shutil.copytree(base, directory)
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["▁"], vocabulary["e"] = vocabulary["e"], vocabulary["▁"]
    path.write_text(json.dumps(tokenizer))
    return directory


GATES = {"weak": "adapter.health", "text": "dataset.schema", "file": "gguf.tokens"}


@pytest.fixture(scope="module")
def refused(
    platform: Any,
    tiny_llama_dir: Path,
    write_rows: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """A run in which three gates fail, each in a branch of its own."""
    directory = tmp_path_factory.mktemp("refused")
    rows = write_rows(directory / "rows.jsonl", 8)
    rows.write_text(rows.read_text() + '{"instruction": "and the answer?"}\n')
    adapter = untrained_adapter(directory / "adapter", tiny_llama_dir)
    odd = odd_tokenizer(directory / "odd", tiny_llama_dir)
    path = write_pipeline(
        directory / "refused.yaml",
        {
            "base": {"import": {"source": str(tiny_llama_dir)}},
            "odd": {"import": {"source": str(odd)}},
            "weak": {"import": {"source": str(adapter)}},
            "tuned": {"merge": {"model": "base", "adapters": ["weak"]}},
            "text": {"dataset": {"sources": [str(rows)], "tokenizer": "base"}},
            "sft": {"train": {"model": "base", "dataset": "text"}},
            "file": {"quantize": {"model": "odd", "types": ["F16"]}},
            "live": {"deploy": {"model": "file", "endpoint": "odd"}},
        },
        tags={"adapter/weak:v1": "weak", "model/odd:v1": "odd"},
    )
    done = platform.cli("run", str(path), "--output", "json", check=False)
    assert done.returncode == 1
    run: dict[str, Any] = json.loads(done.stdout)
    assert run["state"] == "RUN_STATE_FAILED"
    return run


def stage(run: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(s for s in run["stages"] if s["name"] == name)
    return found


@pytest.mark.parametrize("name", GATES)
def test_a_failing_gate_fails_its_stage_and_keeps_the_artifact(
    name: str, refused: dict[str, Any], platform: Any
) -> None:
    found = stage(refused, name)
    assert found["state"] == "STAGE_STATE_FAILED"
    assert found["error"]["code"] == code_pb2.FAILED_PRECONDITION
    assert GATES[name] in found["error"]["message"]
    assert "quarantine" in found["error"]["message"]
    (gate,) = [g for g in found["metadata"]["gates"] if g["gate"] == GATES[name]]
    assert gate["verdict"] == "GATE_VERDICT_FAILED"
    assert gate["figure"] > gate.get("threshold", 0)
    assert gate["detail"]
    output = found["outputs"][0]
    assert output["digest"] in found["error"]["message"]
    assert output["quarantined"] is True
    artifact = platform.json("artifacts", "get", output["digest"])
    assert artifact["quarantined"] is True
    assert artifact["present"] is True


def test_what_comes_after_a_failed_gate_does_not_start_and_nothing_is_tagged(
    refused: dict[str, Any], platform: Any
) -> None:
    states = {s["name"]: s["state"] for s in refused["stages"]}
    assert {n for n, s in states.items() if s == "STAGE_STATE_SKIPPED"} == {"tuned", "sft", "live"}
    assert {n for n, s in states.items() if s == "STAGE_STATE_SUCCEEDED"} == {"base", "odd"}
    with platform.client() as client:
        assert client.artifacts.tags() == []
        assert client.endpoints.list() == []


def test_a_quarantined_artifact_cannot_be_tagged_used_or_deployed(
    refused: dict[str, Any], platform: Any, tmp_path: Path
) -> None:
    base = stage(refused, "base")["outputs"][0]["digest"]
    bad = {name: stage(refused, name)["outputs"][0]["digest"] for name in GATES}
    uses: list[tuple[str, Stage, str]] = [
        ("weak", {"merge": {"model": base, "adapters": [bad["weak"]]}}, "merge.adapters[0]"),
        ("text", {"train": {"model": base, "dataset": bad["text"]}}, "train.dataset"),
        ("file", {"evaluate": {"models": [bad["file"]]}}, "evaluate.models[0]"),
        ("file", {"deploy": {"model": bad["file"], "endpoint": "odd"}}, "deploy.model"),
    ]
    with platform.client() as client:
        before = [run.id for run in client.list_runs()]
        for name, digest in bad.items():
            kind = stage(refused, name)["outputs"][0]["kind"]
            with pytest.raises(FailedPrecondition, match=f"can't be tagged: failed {GATES[name]}"):
                client.artifacts.tag(digest, f"{kind}/bad:v1")
        for name, work, field in uses:
            path = write_pipeline(tmp_path / "use.yaml", {"use": work})
            with pytest.raises(FailedPrecondition) as caught:
                client.create_run(path)
            said = caught.value.message
            assert said.startswith(f"stages[0].{field}: {path}:")
            assert f"quarantined by {GATES[name]}" in said
            assert caught.value.reason == "QUARANTINED"
        with pytest.raises(FailedPrecondition, match=r"quarantined by gguf\.tokens"):
            client.endpoints.create("odd", bad["file"])
        assert [run.id for run in client.list_runs()] == before
        assert client.artifacts.tags() == []
        assert client.endpoints.list() == []


def test_the_same_work_again_is_refused_again(refused: dict[str, Any], platform: Any) -> None:
    source = next(
        s["import"]["source"] for s in refused["pipeline"]["stages"] if s["name"] == "weak"
    )
    done = platform.cli("import", source, "--tag", "adapter/weak:v1", check=False)
    assert done.returncode == 1
    assert "adapter.health" in done.stdout
    with platform.client() as client:
        assert client.artifacts.tags() == []


# Garbage collection


class Collector:
    """Collects garbage over and over, without any grace, until told to stop."""

    def __init__(self, store: Store, grace: float) -> None:
        self.removed: list[str] = []
        self.problems: list[ArrieroError] = []
        self._store = store
        self._grace = grace
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            try:
                self.removed += [r.path for r in self._store.gc(dry_run=False, grace=self._grace)]
            except ArrieroError as error:
                self.problems.append(error)

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def publish_junk(store: Store) -> str:
    staging = store.staging("tests", "junk")
    (staging / "rows.jsonl").write_text("{}\n")
    return store.publish(staging, ManifestDraft(kind="dataset", name="junk")).digest


@pytest.fixture(scope="module")
def collected(
    refused: dict[str, Any],
    platform: Any,
    store: Store,
    tiny_pipeline: Write,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[pb.Run, Collector]:
    """A run during which garbage was collected all the time."""
    junk = publish_junk(store)
    path = tiny_pipeline(tmp_path_factory.mktemp("collected"))
    with platform.client() as client, Collector(store, grace=0) as collector:
        run = client.create_run(path)
        ended = client.wait(run.id, timeout=150)
    assert junk not in [a.digest for a in store.list()]
    return ended, collector


def test_gc_during_a_run_removes_nothing_that_it_needs(
    collected: tuple[pb.Run, Collector], store: Store
) -> None:
    run, collector = collected
    assert collector.problems == []
    assert run.state == pb.RUN_STATE_SUCCEEDED, run.error.message
    assert {s.name: pb.StageState.Name(s.state) for s in run.stages} == dict.fromkeys(
        [s.name for s in run.stages], "STAGE_STATE_SUCCEEDED"
    )
