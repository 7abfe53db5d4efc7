"""`arriero replicas`: what the orchestrator's files ask for, by a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from arriero.store import write_atomic


def test_replicas_run_beside_services_that_run_elsewhere(tmp_path: Path, wait_until) -> None:
    env = {**os.environ, "ARRIERO_HOME": str(tmp_path), "ARRIERO_ALLOWED_PATHS": str(tmp_path)}
    command = [sys.executable, "-m", "arriero.cli", "replicas"]
    process = subprocess.Popen(command, env=env)
    actual = tmp_path / "platform/actual/faq.json"
    try:
        wait_until((tmp_path / "up.lock").exists)
        desired = tmp_path / "platform/desired"
        desired.mkdir(parents=True)
        digest = "sha256:" + "0" * 64
        want: dict[str, Any] = {
            "name": "faq",
            "digest": digest,
            "replicas": 1,
            "generation": 1,
            "environment": {"ARRIERO_MODEL": digest},
        }
        write_atomic(desired / "faq.json", json.dumps(want).encode())

        def told() -> Any:
            found = json.loads(actual.read_text())["replicas"] if actual.exists() else []
            return [replica for replica in found if replica["pid"]]

        (replica,) = wait_until(told, what="a replica is started")
        assert replica["digest"] == digest
        serving = psutil.Process(replica["pid"])
        assert serving.environ()["ARRIERO_MODEL"] == digest
        again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert again.returncode == 1
        assert "already runs in" in again.stderr
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    assert not actual.exists()
    assert not serving.is_running()
