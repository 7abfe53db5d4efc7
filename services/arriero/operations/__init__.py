"""Durable long-running operations: a service's answer to one stage.

Responsibility: accept work once, run it in jobs, retry, resume, publish what
came out, remember all of it across restarts. Does not know what any work is.

    WorkKind, Resolved, ResolveContext    what a room tells the engine
    Engine, serve                         the service's side
    operations.job                        the job's side: Job, Output, main
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arriero.operations.engine import Engine
    from arriero.operations.kinds import ResolveContext, Resolved, WorkKind
    from arriero.operations.serving import serve

__all__ = ["Engine", "ResolveContext", "Resolved", "WorkKind", "serve"]

_HOMES = {
    "Engine": "engine",
    "ResolveContext": "kinds",
    "Resolved": "kinds",
    "WorkKind": "kinds",
    "serve": "serving",
}


def __getattr__(name: str) -> Any:
    """Import on use: a job needs `operations.job` alone."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
