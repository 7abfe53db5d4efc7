"""One replica as a process of its own, over a real model.

Responsibility: publish a GGUF file, start `arriero.inference` for it, and wait
until it serves. Does not know what is asked of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from arriero.rpc import connect_sync
from arriero.rpc.channel import check_health
from arriero.store import ManifestDraft, Store
from arriero.v1.inference_pb2_grpc import InferenceServiceStub

__all__ = ["CONTEXT", "Running", "publish", "start", "wait_until"]

# Tokens per slot, unless a test asks for another number.
CONTEXT = 256


@dataclass
class Running:
    """A replica that serves."""

    process: subprocess.Popen[bytes]
    address: str
    metrics_address: str
    store: Store
    digest: str
    stub: InferenceServiceStub

    def engine(self) -> psutil.Process:
        """Its engine process, as it is now."""
        return next(
            child
            for child in psutil.Process(self.process.pid).children()
            if "arriero.inference.engine" in child.cmdline()
        )

    def metrics(self) -> dict[str, float]:
        """Its Prometheus page: series without the label that all of them share."""
        with urllib.request.urlopen(f"http://{self.metrics_address}/metrics", timeout=120) as page:
            lines = page.read().decode().splitlines()
        series = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {
            name.replace('model_name="tiny"', "").replace("{}", "").replace(",}", "}"): float(value)
            for name, value in series
        }

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()


def wait_until(condition: Callable[[], bool], seconds: float = 300) -> None:
    """Until the condition is true; fails when it is not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def publish(store: Store, gguf: Path) -> str:
    """The digest of an artifact with this file."""
    place = store.staging("test", "gguf") / "out"
    place.mkdir(parents=True)
    (place / "tiny.F16.gguf").write_bytes(gguf.read_bytes())
    draft = ManifestDraft(kind="gguf", name="tiny", labels={"quant_type": "F16"})
    return store.publish(place, draft).digest


def start(home: Path, gguf: Path, **env: str) -> Running:
    """A replica with a store in `home`; `env` is more of its environment."""
    store = Store.open(home / "store")
    digest = publish(store, gguf)
    address_file, metrics_file = home / "address", home / "metrics"
    process = subprocess.Popen(
        [sys.executable, "-m", "arriero.inference"],
        env={
            **os.environ,
            "ARRIERO_STORE": str(home / "store"),
            "ARRIERO_MODEL": digest,
            "ARRIERO_MODEL_NAME": "tiny",
            "ARRIERO_CONTEXT": str(CONTEXT),
            "ARRIERO_THREADS": "1",
            "ARRIERO_LISTEN": "127.0.0.1:0",
            "ARRIERO_ADDRESS_FILE": str(address_file),
            "ARRIERO_METRICS_ADDRESS_FILE": str(metrics_file),
            **env,
        },
    )
    wait_until(lambda: address_file.exists() or process.poll() is not None)
    assert process.poll() is None
    address = address_file.read_text().strip()
    wait_until(lambda: check_health(address))
    stub = InferenceServiceStub(connect_sync(address))
    return Running(process, address, metrics_file.read_text().strip(), store, digest, stub)
