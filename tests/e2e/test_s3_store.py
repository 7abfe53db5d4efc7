"""The whole pipeline over a store in S3, with a job that is killed and loses its disk."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import boto3
import pytest

from arriero.store import Store
from arriero.v1 import orchestrator_pb2 as pb

STEPS = 200


@pytest.fixture
def s3_platform(
    platform_at: Callable[..., AbstractContextManager[Any]],
    s3_env: dict[str, str],
) -> Iterator[Any]:
    """All services over a new store in S3."""
    name = f"e2e-{uuid.uuid4().hex[:12]}"
    endpoint = s3_env["ARRIERO_STORE_ENDPOINT_URL"]
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket=name)
    with platform_at(ARRIERO_STORE=f"s3://{name}/models", **s3_env) as made:
        yield made


def test_a_pipeline_over_s3_survives_the_loss_of_a_job_and_its_disk(
    s3_platform: Any,
    tiny_pipeline: Callable[..., Path],
    tmp_path: Path,
    wait_until: Callable[..., Any],
) -> None:
    platform = s3_platform
    train = {
        "model": "base",
        "dataset": "rows",
        "lora": {"r": 4, "lora_dropout": 0.1},
        "max_steps": STEPS,
        "batch_size": 4,
        "save_steps": 20,
        "dtype": "float32",
    }
    store = Store.open(platform.env["ARRIERO_STORE"])
    with platform.client() as client:
        run = client.create_run(tiny_pipeline(tmp_path, sft={"train": train}))

        def kept() -> bool:
            """Whether a checkpoint is in the bucket, with every file that it lists."""
            found = {found.key for found in store.objects.find("staging/training/")}
            for key in (key for key in found if key.endswith("/checkpoint.json")):
                place = key.removesuffix("checkpoint.json")
                with contextlib.suppress(FileNotFoundError):  # a newer one took its place
                    listed = json.loads(store.objects.read(key))["files"]
                    if {place + name for name in listed} <= found:
                        return True
            return False

        wait_until(kept, 300, "a checkpoint in the bucket")
        (job,) = platform.processes("arriero.training.job")
        job.send_signal(signal.SIGKILL)
        (place,) = (store.root / "staging" / "training").iterdir()
        shutil.rmtree(place / "checkpoints")

        def ended() -> pb.Run | None:
            found = client.get_run(run.id)
            return found if found.state > pb.RUN_STATE_RUNNING else None

        found = wait_until(ended, 400, "the run's end")
    assert found.state == pb.RUN_STATE_SUCCEEDED, found.error
    stages = {stage.name: stage for stage in found.stages}
    assert stages["sft"].metadata.attempt == 2
    log = platform.cli("runs", "logs", run.id, "--stage", "sft").stdout
    assert "resum" in log.lower()
    text = platform.cli("generate", "tiny", "Name", "--max-tokens", "4").stdout
    assert text.strip()

    # Everything is in the bucket, nothing that only the work needed.
    digests = [output.digest for stage in found.stages for output in stage.outputs]
    assert len(digests) >= 8
    for digest in digests:
        store.verify(digest)
    wait_until(lambda: not list(store.objects.find("staging/")), 300, "nothing of it stays")
    logs = [f.key for f in store.objects.find("operations/training/") if f.key.endswith("jsonl")]
    assert len(logs) == 1

    # People see and move artifacts as on files.
    listed = platform.json("artifacts", "list")
    assert set(digests) <= {artifact["digest"] for artifact in listed}
    tuned = stages["tuned"].outputs[0].digest
    platform.cli("artifacts", "tag", tuned, "model/tuned:prod")
    platform.cli("artifacts", "pull", "model/tuned:prod", str(tmp_path / "pulled"))
    assert (tmp_path / "pulled" / "config.json").is_file()
    shown = platform.cli("artifacts", "get", "model/tuned:prod").stdout
    assert platform.env["ARRIERO_STORE"] in shown.replace("\n", "")
    platform.cli("artifacts", "verify", "model/tuned:prod")
    platform.cli("artifacts", "gc", "--dry-run")

    # The same work on a machine that has nothing of it yet.
    platform.down()
    shutil.rmtree(store.root, ignore_errors=True)
    secret = platform.env["AWS_SECRET_ACCESS_KEY"].encode()
    for path in platform.home.root.rglob("*"):
        if path.is_file():
            assert secret not in path.read_bytes(), path
    platform.up()
    again = platform.json("run", str(tmp_path / "tiny.yaml"))
    assert again["state"] == "RUN_STATE_SUCCEEDED"
    assert {
        stage["name"]: stage["metadata"].get("cached", False)
        for stage in again["stages"]
        if stage["name"] != "live"
    } == dict.fromkeys(["base", "rows", "sft", "tuned", "quants", "best"], True)
