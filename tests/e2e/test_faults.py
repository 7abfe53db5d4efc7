"""Gates that fail, full disks, garbage collection at bad moments, replicas that die."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import threading
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
    assert f"gates: {{{GATES[name]}: warn}}" in found["error"]["message"]
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


def test_a_gate_on_warn_says_the_same_and_lets_the_artifact_pass(
    refused: dict[str, Any], platform: Any, tmp_path: Path
) -> None:
    stages = {}
    for written in refused["pipeline"]["stages"]:
        if written["name"] in ("base", "weak", "text"):
            ((kind, spec),) = [(k, v) for k, v in written.items() if k != "name"]
            gates = {GATES[written["name"]]: "warn"} if written["name"] in GATES else {}
            stages[written["name"]] = {kind: {**spec, "gates": gates}}
    path = write_pipeline(tmp_path / "warned.yaml", stages, tags={"adapter/warned:v1": "weak"})
    run = platform.json("run", str(path))
    for name in ("weak", "text"):
        (gate,) = [g for g in stage(run, name)["metadata"]["gates"] if g["gate"] == GATES[name]]
        assert gate["verdict"] == "GATE_VERDICT_WARNED"
    assert platform.json("artifacts", "get", "adapter/warned:v1").get("quarantined") is None


# Garbage collection

# Between a stage's end and the next one's start its artifacts are kept by their
# youth alone; everything older must be held by whoever needs it.
GRACE_SECONDS = 10.0


class Collector:
    """Collects garbage over and over until told to stop."""

    def __init__(self, store: Store) -> None:
        self.problems: list[ArrieroError] = []
        self._store = store
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            try:
                self._store.gc(dry_run=False, grace=GRACE_SECONDS)
            except ArrieroError as error:
                self.problems.append(error)

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture(scope="module")
def thrifty(platform_at: Any) -> Iterator[Any]:
    """All services; runs keep nothing from gc once they have ended."""
    with platform_at(ARRIERO_RETENTION_DAYS="0") as made:
        yield made


@pytest.fixture(scope="module")
def store(thrifty: Any) -> Store:
    return Store.open(thrifty.home.store)


def publish_junk(store: Store) -> str:
    staging = store.staging("tests", "junk")
    (staging / "rows.jsonl").write_text("{}\n")
    return store.publish(staging, ManifestDraft(kind="dataset", name="junk")).digest


@pytest.fixture(scope="module")
def served(
    thrifty: Any,
    store: Store,
    tiny_pipeline: Write,
    tmp_path_factory: pytest.TempPathFactory,
    wait_until: Wait,
) -> pb.Run:
    """The tiny pipeline, run and deployed while garbage was collected all the time."""
    junk = publish_junk(store)
    path = tiny_pipeline(
        tmp_path_factory.mktemp("collected"),
        quants={"quantize": {"model": "tuned", "types": ["F16"]}},
        best=None,
        live={"deploy": {"model": "quants", "endpoint": "tiny", "context": 256}},
    )
    with thrifty.client() as client, Collector(store) as collector:
        run = client.wait(client.create_run(path).id, timeout=400)
        wait_until(lambda: junk not in [found.digest for found in store.list()], what="collected")
    assert collector.problems == []
    return run


def test_gc_during_a_run_removes_nothing_that_it_needs(served: pb.Run, store: Store) -> None:
    assert served.state == pb.RUN_STATE_SUCCEEDED, served.error.message
    assert {s.state for s in served.stages} == {pb.STAGE_STATE_SUCCEEDED}
    assert max(s.metadata.attempt for s in served.stages) == 1


def test_gc_beside_an_endpoint_keeps_what_it_serves_and_is_measured_by(
    served: pb.Run, thrifty: Any, store: Store
) -> None:
    with thrifty.client() as client:
        spec = client.endpoints.get("tiny").spec
        assert client.artifacts.get(spec.model).tags == []
        store.gc(dry_run=False, grace=0)
        # The run is over and keeps nothing here, so nothing else is left.
        assert {a.digest for a in store.list()} == {spec.model, spec.golden}
        store.verify(spec.model)
        endpoint = client.endpoints.get("tiny", score=True)
        assert endpoint.replicas[0].kl_divergence < 0.05
        client.endpoints.scale("tiny", 2)
        text = client.endpoint("tiny").chat("Name llama 1", max_tokens=4).text()
        assert text


def test_a_killed_replica_comes_back_and_the_other_one_answers_meanwhile(
    served: pb.Run, thrifty: Any, wait_until: Wait
) -> None:
    def replicas() -> dict[int, str]:
        actual = json.loads((thrifty.home.platform / "actual" / "tiny.json").read_text())
        return {r["pid"]: r["address"] for r in actual["replicas"] if r["state"] == "READY"}

    with thrifty.client() as client:
        client.endpoints.scale("tiny", 2)
        before = wait_until(lambda: len(found := replicas()) == 2 and found, 300, "two replicas")
        endpoint = client.endpoint("tiny")
        victim = psutil.Process(min(before))
        children = victim.children(recursive=True)
        victim.kill()
        for _ in range(6):
            endpoint.generate("Name", max_tokens=2).text()
        after = wait_until(
            lambda: len(found := replicas()) == 2 and victim.pid not in found and found,
            what="the replica's return",
        )
        assert set(after.values()) == set(before.values())
        endpoint.generate("Name", max_tokens=2).text()
        assert client.endpoints.get("tiny").ready_replicas == 2
    wait_until(lambda: not any(c.is_running() for c in children), 300, "its engine's end")


# A full disk


def test_work_that_does_not_fit_is_refused_with_the_figures_and_leaves_nothing(
    platform_at: Any, tiny_pipeline: Write, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    model = sum(file.stat().st_size for file in tiny_llama_dir.iterdir())
    # Room for the model, not for the dataset.
    with platform_at(ARRIERO_STORE_QUOTA_BYTES=str(model + 200_000)) as platform:
        done = platform.cli("run", str(tiny_pipeline(tmp_path)), "--output", "json", check=False)
        assert done.returncode == 1
        run = json.loads(done.stdout)
        states = {s["name"]: s["state"].removeprefix("STAGE_STATE_") for s in run["stages"]}
        assert states["base"] == "SUCCEEDED"
        assert states["rows"] == "FAILED"
        assert set(states.values()) == {"SUCCEEDED", "FAILED", "SKIPPED"}
        error = stage(run, "rows")["error"]
        assert error["code"] == code_pb2.RESOURCE_EXHAUSTED
        check_figures(error["message"])

        store = Store.open(platform.home.store)
        (artifact,) = store.list()
        store.verify(artifact.digest)
        assert files(store.root / "staging") == []

        big = tmp_path / "big.jsonl"
        big.write_text("x" * 300_000)
        done = platform.cli("artifacts", "push", str(big), "dataset/big:v1", check=False)
        assert done.returncode == 1
        check_figures(done.stderr)
        assert [a.digest for a in store.list()] == [artifact.digest]
        assert files(store.root / "staging") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 16 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_disk_that_fills_up_meanwhile_costs_no_more_than_a_retry(
    small_disk: Path, platform_at: Any, tiny_pipeline: Write, tmp_path: Path, wait_until: Wait
) -> None:
    train = {"model": "base", "dataset": "rows", "max_steps": 400, "batch_size": 4}
    path = tiny_pipeline(
        tmp_path,
        sft={"train": {**train, "save_steps": 5, "dtype": "float32"}},
        **dict.fromkeys(("tuned", "quants", "best", "live")),
    )
    filler = small_disk / "filler"
    with (
        platform_at(ARRIERO_STORE=str(small_disk / "store")) as platform,
        platform.client() as client,
    ):
        run = client.create_run(path)

        def sft() -> pb.StageStatus:
            return next(s for s in client.get_run(run.id).stages if s.name == "sft")

        wait_until(lambda: sft().metadata.progress.step > 10, 300, "training")
        (job,) = platform.processes("arriero.training.job")
        job.suspend()  # however slowly this fills
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        job.resume()
        ended = client.wait(run.id, timeout=400)
        assert ended.state == pb.RUN_STATE_FAILED
        assert ended.error.code == code_pb2.RESOURCE_EXHAUSTED
        figures = r"needed \(\d+ bytes\), .* free \(\d+ bytes\)|\d+ bytes needed, \d+ bytes free"
        assert re.search(figures, ended.error.message)
        store = Store.open(small_disk / "store")
        filler.unlink()
        before = store.list()
        assert {artifact.manifest.kind for artifact in before} == {"model", "dataset", "report"}
        for artifact in before:
            store.verify(artifact.digest)
        client.retry_run(run.id)
        ended = client.wait(run.id, timeout=400)
        assert ended.state == pb.RUN_STATE_SUCCEEDED, ended.error.message
        store.verify(sft().outputs[0].digest)
        assert any("resum" in line.message for line in client.logs(run.id, stage="sft"))


def check_figures(message: str) -> None:
    found = re.search(r"needed \((\d+) bytes\).* free \((\d+) bytes\)", message)
    assert found, message
    needed, free = map(int, found.groups())
    assert needed > free >= 0
    assert "arriero artifacts gc" in message


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]
