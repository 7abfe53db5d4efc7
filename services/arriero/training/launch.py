"""The training job as torchrun's agent, where several processes train.

Responsibility: start a process per rank with torchrun, and see that the outcome says
why it ended. Knows `PET_*`, torchrun's variables; does not know what ranks do.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from arriero.cores import threads
from arriero.errors import FailedPrecondition
from arriero.operations.delivery import failure
from arriero.operations.endings import reason_of
from arriero.operations.handoff import EXIT_FAILED, EXIT_TRY_AGAIN, Assignment, Outcome
from arriero.operations.job import hand_in, rank_directory, watch_service
from arriero.rpc import logs
from arriero.training.ranks import RANK_LOST

_MODULE = "arriero.training.job"
# Any of them says where ranks on several machines meet.
_RENDEZVOUS = ("PET_RDZV_ENDPOINT", "PET_MASTER_ADDR")
_GPUS = Path("/proc/driver/nvidia/gpus")
_SHELL = 128

_log = logging.getLogger("arriero.job.train")


def as_torchrun() -> None:
    """Become torchrun where the assignment asks for several processes; else return.

    Returns in each rank too, which torchrun started.
    """
    if "RANK" in os.environ or len(sys.argv) != 2:
        return
    assignment = Assignment.find(sys.argv[1])
    spec: Any = assignment.message()
    arguments = torchrun_arguments(spec, os.environ)
    if arguments is None:
        return
    logs.configure(assignment.service)
    with logs.bind(run=assignment.run, stage=assignment.stage, attempt=assignment.attempt):
        if assignment.watch_service and os.environ.get("PET_NODE_RANK", "0") == "0":
            watch_service(assignment)
        code = _run(assignment, spec, arguments)
        if os.environ.get("PET_NODE_RANK", "0") == "0":
            hand_in(assignment)
    logging.shutdown()
    _leave(code)


def torchrun_arguments(spec: Any, environment: Mapping[str, str]) -> list[str] | None:
    """What torchrun is told beside `PET_*`; None when one process is enough.

    `PET_NNODES` and `PET_NPROC_PER_NODE`, which a cluster sets, win over the spec.
    """
    arguments = []
    if "PET_NNODES" not in environment:
        arguments += ["--nnodes", str(spec.nodes)]
    if "PET_NPROC_PER_NODE" not in environment:
        count = spec.nproc_per_node or _gpus()
        arguments += ["--nproc-per-node", str(count)]
        if "PET_NNODES" not in environment and spec.nodes == 1 and count == 1:
            return None
    return arguments


def _gpus() -> int:
    """GPUs of this machine that torch can use, at least 1."""
    if not _GPUS.is_dir():
        return 1
    import torch

    return max(1, int(torch.cuda.device_count()))


def _run(assignment: Assignment, spec: Any, arguments: list[str]) -> int:
    nodes = os.environ.get("PET_NNODES") or str(spec.nodes)
    if nodes != "1" and not any(os.environ.get(name) for name in _RENDEZVOUS):
        error = FailedPrecondition(
            f"nodes: {nodes}, but this service starts processes on its own machine alone and "
            f"knows no place where those of {nodes} machines meet; use nodes: 1 with "
            "nproc_per_node, a cluster, or set PET_RDZV_BACKEND=c10d, PET_RDZV_ENDPOINT and "
            "PET_RDZV_ID for the service and start the job on the other machines",
            reason="NO_RENDEZVOUS",
        )
        failure(assignment.attempt, error, _log).write(assignment.directory)
        return EXIT_FAILED
    # torchrun would give each rank one thread, and say so; ranks decide by themselves.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads()))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    # Other threads' exceptions and its own summary are for people at a terminal.
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    fixed = ["--max-restarts", "0", "--monitor-interval", "0.2", "-m", _MODULE, sys.argv[1]]
    try:
        run(parse_args([*arguments, *fixed]))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return _conclude(assignment, codes)
    except SignalException:
        return _code(Outcome.read(_path(assignment)), EXIT_TRY_AGAIN)
    if os.environ.get("PET_NODE_RANK", "0") != "0":
        return 0  # the first machine speaks for all, and may have much to do still
    return _code(Outcome.read(_path(assignment)), EXIT_FAILED)


def _conclude(assignment: Assignment, codes: Mapping[int, int]) -> int:
    """The exit code for ranks that failed; the word of the guilty one becomes the outcome.

    Others only notice that it is gone, so that what they say comes second. SIGTERM is
    what torchrun sends to those that are left.
    """
    path = _path(assignment)
    outcome = Outcome.read(path)
    if outcome is not None and reason_of(outcome.status) != RANK_LOST:
        return _code(outcome, EXIT_FAILED)
    for rank, code in codes.items():
        if code < 0 and code != -signal.SIGTERM:  # the service knows what to make of it
            _log.error("rank %d was ended by signal %d", rank, -code)
            path.unlink(missing_ok=True)
            return _SHELL - code
    for rank in codes:
        own = Outcome.read(rank_directory(assignment.directory, rank) / path.name)
        if own is not None and reason_of(own.status) != RANK_LOST:
            own.write(assignment.directory)
            return _code(own, EXIT_FAILED)
    if outcome is None and set(codes.values()) <= {EXIT_TRY_AGAIN, -signal.SIGTERM}:
        return EXIT_TRY_AGAIN
    _log.error("ranks exited with codes %s", dict(codes))
    return EXIT_FAILED


def _path(assignment: Assignment) -> Path:
    return Outcome.path(Path(assignment.staging), assignment.attempt)


def _code(outcome: Outcome | None, otherwise: int) -> int:
    if outcome is None:
        return otherwise
    if outcome.ok:
        return 0
    return EXIT_TRY_AGAIN if outcome.preempted else EXIT_FAILED


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
