"""Where the platform is.

Responsibility: the orchestrator's address from the environment or from what the
local supervisor wrote. Does not know how to call it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from arriero.errors import FailedPrecondition
from arriero.rpc import parent
from arriero.settings import home

__all__ = ["orchestrator_address"]


def orchestrator_address(env: Mapping[str, str] | None = None) -> str:
    """`ARRIERO_ADDRESS`, else the platform that runs on this machine (`state.json`).

    Raises:
        FailedPrecondition: neither says, or what ran on this machine is gone.
    """
    env = os.environ if env is None else env
    if address := env.get("ARRIERO_ADDRESS"):
        return address
    path = home(env) / "state.json"
    do = "start one with `arriero up --detach`, or set ARRIERO_ADDRESS to the orchestrator's"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        address, pid = str(state["address"]), state.get("pid")
    except FileNotFoundError:
        raise FailedPrecondition(
            f"no platform runs here ({path} does not exist); {do}", reason="NO_PLATFORM"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FailedPrecondition(
            f"{path} cannot be read ({error}); {do}", reason="NO_PLATFORM"
        ) from None
    if isinstance(pid, int):
        start = parent.process_start(pid)
        if start is None or state.get("start", start) != start:
            raise FailedPrecondition(
                f"the platform of {path} is gone (process {pid}); {do}", reason="NO_PLATFORM"
            )
    return address
