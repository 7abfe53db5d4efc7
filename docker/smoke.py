"""What an image is for, done once inside of it: real processes, a tiny model, no network.

    docker run --rm --read-only --tmpfs /tmp --network none \\
        --volume "$PWD/docker/smoke.py:/smoke.py:ro" arriero-worker:0.1.0 python /smoke.py worker

`docker/smoke.sh` does this for each image.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from google.longrunning import operations_pb2, operations_pb2_grpc

from arriero import rpc
from arriero.rpc.channel import check_health
from arriero.settings import ClientSettings
from arriero.store import ManifestDraft, Store
from arriero.v1 import types_pb2

PLACE = Path(tempfile.mkdtemp(prefix="smoke-"))
ENVIRONMENT = {**os.environ, "ARRIERO_HOME": str(PLACE), "ARRIERO_STORE": str(PLACE / "store")}


def check(condition: object, what: str) -> None:
    """Say what holds, or end."""
    print(f"  {'ok  ' if condition else 'FAIL'} {what}", flush=True)
    if not condition:
        sys.exit(1)


@contextlib.contextmanager
def serving(room: str, **extra: str) -> Iterator[str]:
    """A service's address."""
    file = PLACE / f"{room}.address"
    env = ENVIRONMENT | {"ARRIERO_LISTEN": "127.0.0.1:0", "ARRIERO_ADDRESS_FILE": str(file)}
    with (PLACE / f"{room}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"arriero.{room}"], env=env | extra, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 120
        while not file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{room} did not start:\n{(PLACE / f'{room}.log').read_text()}")
            time.sleep(0.1)
        yield file.read_text().strip()
        process.terminate()
        check(process.wait(60) == 0, f"{room} starts, and ends in order")
    finally:
        process.kill()


def work(channel: grpc.Channel, start: Any, request: Any) -> dict[str, Any]:
    """Outputs of one stage by name, once it has ended well."""
    with rpc.translated():
        operation = start(request, timeout=60)
        done = operations_pb2_grpc.OperationsStub(channel).WaitOperation(
            operations_pb2.WaitOperationRequest(name=operation.name), timeout=600
        )
    if done.HasField("error"):
        sys.exit(f"  FAIL {operation.name}: {done.error.message}")
    result = types_pb2.OperationResult()
    done.response.Unpack(result)
    return {output.name: output for output in result.outputs}


def publish_model(store: Store) -> str:
    """A tiny LLaMA in the store; its digest."""
    from arriero.testing.models import tiny_llama

    staging = store.staging("smoke", "model") / "files"
    shutil.copytree(tiny_llama(PLACE / "tiny"), staging)
    return store.publish(staging, ManifestDraft(kind="model", name="tiny")).digest


def control() -> None:
    """The orchestrator starts, and the command line gets its answers."""
    with serving("orchestrator") as address:
        env = ENVIRONMENT | {"ARRIERO_ADDRESS": address}

        def arriero(*words: str) -> Any:
            done = subprocess.run(
                ["arriero", *words, "--output", "json"],
                env=env,
                capture_output=True,
                text=True,
                check=False,
            )
            check(done.returncode == 0, f"arriero {' '.join(words)} {done.stderr.strip()[-300:]}")
            return json.loads(done.stdout)

        rows = PLACE / "rows"
        rows.mkdir()
        (rows / "rows.jsonl").write_text('{"instruction": "Name a river.", "output": "Urubamba."}')
        arriero("artifacts", "push", str(rows), "dataset/rows:v1")
        found = arriero("artifacts", "list")
        check("rows" in json.dumps(found), "what was pushed is listed")
        arriero("runs", "list")
        arriero("endpoints", "list")
        with serving("gateway", ARRIERO_ADDRESS=address):
            pass
    import psycopg
    import sqlalchemy

    check(psycopg.pq.__impl__ == "binary" and sqlalchemy, "PostgreSQL's driver is here")


def worker() -> None:
    """Rows to tokens, two steps of training, the adapter folded into the model."""
    from arriero.v1 import dataset_pb2 as data
    from arriero.v1 import dataset_pb2_grpc, merging_pb2_grpc, training_pb2_grpc
    from arriero.v1 import merging_pb2 as merging
    from arriero.v1 import training_pb2 as training

    base = publish_model(Store.open(PLACE / "store"))
    rows = PLACE / "rows.jsonl"
    lines = [{"instruction": f"Name llama {i}.", "output": f"Llama {i % 3}."} for i in range(24)]
    rows.write_text("\n".join(map(json.dumps, lines)))

    def asked(stage: str) -> types_pb2.StageContext:
        return types_pb2.StageContext(request_id=stage, stage=stage)

    with serving("dataset", ARRIERO_ALLOWED_PATHS=str(PLACE)) as address:
        channel = rpc.connect_sync(address, ClientSettings())
        stub = dataset_pb2_grpc.DatasetServiceStub(channel)
        spec = data.DatasetSpec(sources=[str(rows)], tokenizer=base, cutoff_len=128)
        request = data.PrepareDatasetRequest(context=asked("rows"), spec=spec)
        made = work(channel, stub.PrepareDataset, request)
        check(made["train"].metrics["rows"] == 24, "24 rows become tokens")
        channel.close()
    with serving("training") as address:
        channel = rpc.connect_sync(address, ClientSettings())
        spec = training.TrainSpec(
            model=base,
            dataset=made["train"].digest,
            max_steps=2,
            batch_size=4,
            micro_batch_size=4,
            learning_rate=0.01,
            dtype="float32",
        )
        spec.lora.r = 4
        request = training.TrainRequest(context=asked("sft"), spec=spec)
        tuned = work(channel, training_pb2_grpc.TrainingServiceStub(channel).Train, request)
        check("adapter" in tuned, "an adapter is trained for two steps")
        channel.close()
    with serving("merging") as address:
        channel = rpc.connect_sync(address, ClientSettings())
        spec = merging.MergeSpec(model=base, adapters=[tuned["adapter"].digest])
        request = merging.MergeRequest(context=asked("tuned"), spec=spec)
        merged = work(channel, merging_pb2_grpc.MergingServiceStub(channel).Merge, request)
        check("model" in merged, "the adapter is folded in, and its gates pass")
        channel.close()


def llama() -> None:
    """A model becomes a GGUF file, and answers one request."""
    from arriero.v1 import inference_pb2 as inference
    from arriero.v1 import inference_pb2_grpc, quantization_pb2_grpc
    from arriero.v1 import quantization_pb2 as quantization

    base = publish_model(Store.open(PLACE / "store"))
    with serving("quantization") as address:
        channel = rpc.connect_sync(address, ClientSettings())
        stub = quantization_pb2_grpc.QuantizationServiceStub(channel)
        request = quantization.QuantizeRequest(
            context=types_pb2.StageContext(request_id="q", stage="q"),
            spec=quantization.QuantizeSpec(model=base, types=["Q8_0"]),
        )
        made = work(channel, stub.Quantize, request)
        check("Q8_0" in made, "a Q8_0 file is made, and its gates pass")
        channel.close()
    with serving("inference", ARRIERO_MODEL=made["Q8_0"].digest, ARRIERO_CONTEXT="256") as address:
        deadline = time.monotonic() + 60
        while not check_health(address) and time.monotonic() < deadline:
            time.sleep(0.2)  # the model is being loaded
        channel = rpc.connect_sync(address, ClientSettings())
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        asked = inference.GenerateRequest(prompt="The driver")
        asked.sampling.max_tokens = 8
        with rpc.translated():
            answers = list(stub.Generate(asked, timeout=120))
        check(answers[-1].usage.completion_tokens, "a replica answers a request")
        channel.close()


def image() -> None:
    """What holds for every image."""
    check(os.getuid() == 10001 and os.getgid() == 10001, "runs as 10001:10001")
    check(not any(map(shutil.which, ("cc", "gcc", "c++", "g++", "clang", "cmake"))), "no compiler")
    first = Path("/proc/1/comm").read_text().strip()
    check(first in ("tini", "catatonit", "docker-init"), f"PID 1 is {first}")
    try:
        Path("/opt/arriero/written").touch()
    except OSError:
        written = False
    else:
        written = True
    check(not written, "the environment is read-only")


if __name__ == "__main__":
    started = time.monotonic()
    image()
    {"control": control, "worker": worker, "llama": llama}[sys.argv[1]]()
    print(f"{sys.argv[1]}: all well in {time.monotonic() - started:.0f} s", flush=True)
