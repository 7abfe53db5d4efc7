"""Tests that fork do so in a process of their own.

Other tests leave gRPC's threads in this one, and a fork beside them may hang.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_INSIDE = "ARRIERO_TEST_FORKS"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test marked `forks` in a pytest of its own."""
    if pyfuncitem.get_closest_marker("forks") is None or os.environ.get(_INSIDE):
        return None
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
        + [pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath,
        env={**env, _INSIDE: "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.fail(f"{done.stdout[-8000:]}{done.stderr[-2000:]}", pytrace=False)
    return True
