"""What `helm test` runs on a cluster, here against a platform of processes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any


def ask(platform: Any, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "arriero.testing.whole_way", *arguments],
        env={**platform.env, **extra},
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_it_passes_and_leaves_no_endpoint(platform: Any) -> None:
    gateway = platform.home.running()["services"]["gateway"]["address"]
    ended = ask(platform, "--timeout", "140", "--gateway", f"http://{gateway}")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "gateway answers" in ended.stdout
    assert "whole way: passed" in ended.stdout
    assert platform.json("endpoints", "list") == []


def test_it_says_where_a_run_was_when_time_is_over(platform: Any) -> None:
    ended = ask(platform, "--timeout", "0")
    assert ended.returncode == 1, ended.stdout
    assert "the run is not done after 0 s; it is at" in ended.stderr
    assert "Traceback" not in ended.stderr
    (run, *_) = platform.json("runs", "list")
    assert run["state"] == "RUN_STATE_CANCELLED"
    assert platform.json("endpoints", "list") == []


def test_it_waits_for_a_platform_and_says_when_there_is_none(platform: Any) -> None:
    """Network policies let a new pod in after a moment."""
    ended = ask(platform, "--timeout", "5", ARRIERO_ADDRESS="127.0.0.1:1")
    assert ended.returncode == 1
    assert "it does not answer yet" in ended.stdout
    assert ended.stderr.startswith("FAILED: ")
    assert "Traceback" not in ended.stderr
