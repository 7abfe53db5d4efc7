"""Run a job's handler in this process: no service, no process of its own, a real store.

Responsibility: a `Job` as a service would make it, below a temporary directory.
Does not know services, retries or gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from google.protobuf.message import Message

from arriero.operations.delivery import Output
from arriero.operations.job import Handler, Job
from arriero.store import Artifact, Store

__all__ = ["make_job", "run_job"]

Inputs = Mapping[str, Artifact | str | Sequence[Artifact | str]]


def make_job(
    kind: str,
    spec: Message,
    inputs: Inputs,
    store: Store,
    tmp_path: Path,
    *,
    attempt: int = 1,
    run: str = "run",
    stage: str = "stage",
    last_failure: str = "",
) -> Job:
    """A job whose staging directory is `tmp_path/"staging"`.

    Args:
        kind: stage kind, such as `train`.
        spec: the resolved spec.
        inputs: by field name: an artifact, a digest, or a sequence of them.
        store: where digests are looked up.
        tmp_path: the same path with another `attempt` finds the checkpoints again.
        attempt: counts from 1.
        run: recorded in log lines, as is `stage`.
        stage: see `run`.
        last_failure: how the attempt before ended.
    """
    resolved: dict[str, list[Artifact]] = {}
    for name, value in inputs.items():
        items = [value] if isinstance(value, Artifact | str) else list(value)
        resolved[name] = [store.get(item) if isinstance(item, str) else item for item in items]
    return Job(
        spec=spec,
        kind=kind,
        store=store,
        inputs=resolved,
        staging=tmp_path / "staging",
        attempt=attempt,
        run=run,
        stage=stage,
        last_failure=last_failure,
    )


def run_job(
    handler: Handler,
    kind: str,
    spec: Message,
    inputs: Inputs,
    store: Store,
    tmp_path: Path,
    *,
    attempt: int = 1,
    last_failure: str = "",
    prepare: Callable[[Job], None] | None = None,
) -> list[Output]:
    """Run a handler and return what it returns; what it raises comes through as it is.

    Args:
        handler: `Callable[[Job], Sequence[Output]]`.
        kind: as in `make_job`, as are `spec`, `inputs`, `store`, `tmp_path`, `attempt`.
        spec: see `kind`.
        inputs: see `kind`.
        store: see `kind`.
        tmp_path: see `kind`.
        attempt: see `kind`.
        last_failure: see `kind`.
        prepare: called with the job before the handler, to keep it (its gates, its
            meter) or to set `preempted`.
    """
    job = make_job(kind, spec, inputs, store, tmp_path, attempt=attempt, last_failure=last_failure)
    if prepare is not None:
        prepare(job)
    return list(handler(job))
