"""The job's side of an operation: what a room's work sees, and the process around it.

Responsibility: hand a handler its spec and inputs, and write `outcome.json`
about what it made. Publishes nothing; does not know attempts before or after.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from google.protobuf.message import Message

from arriero.errors import ArrieroError, Internal, InvalidArgument, Preempted
from arriero.gates import Gates, Mode
from arriero.operations.delivery import Output, describe, failure
from arriero.operations.handoff import EXIT_FAILED, EXIT_TRY_AGAIN, Assignment, Outcome
from arriero.operations.keeping import Keeper
from arriero.operations.process import end_self
from arriero.operations.reporting import ProgressMeter, ProgressSender
from arriero.rpc import logs, parent
from arriero.store import Artifact, Store
from arriero.v1 import types_pb2

__all__ = ["Handler", "Job", "Output", "gate_modes", "hand_in", "main", "rank_directory"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_WATCH_INTERVAL = 0.5


class Job:
    """One attempt, as its handler sees it.

    Attributes:
        spec: the resolved spec, in the kind's own type.
        kind, run, stage, attempt: what this is a part of; attempts count from 1.
        last_failure: how the attempt before ended, as a word (`OUT_OF_MEMORY`); empty
            for the first.
        store: to read from; a job publishes nothing.
        inputs: artifacts by the spec's field name.
        checkpoints: directory that survives attempts (and a retry of the same work).
        scratch: directory of this attempt alone, empty at its start.
        gates: the collector of verdicts, with the spec's modes.
        preempted: set when the job is told to leave: save, then raise `Preempted`. A
            handler that never looked at it has nothing to save, and is ended at once.
        log: goes to the operation's kept log.
    """

    def __init__(
        self,
        *,
        spec: Message,
        kind: str,
        store: Store,
        inputs: Mapping[str, list[Artifact]],
        staging: Path,
        attempt: int = 1,
        run: str = "",
        stage: str = "",
        last_failure: str = "",
        preempted: threading.Event | None = None,
        nudge: Callable[[], None] | None = None,
        rank: int = 0,
    ) -> None:
        self.spec: Any = spec
        self.kind = kind
        self.attempt = attempt
        self.run = run
        self.stage = stage
        self.last_failure = last_failure
        self.store = store
        self.inputs = inputs
        self.directory = staging / "attempts" / str(attempt)
        self.checkpoints = staging / "checkpoints"
        place = rank_directory(self.directory, rank) if rank else self.directory
        self.scratch = place / "scratch"
        self.gates = Gates(gate_modes(spec))
        self.watches_preemption = False
        self._preempted = preempted or threading.Event()
        self.meter = ProgressMeter()
        self.log = logging.getLogger(f"arriero.job.{kind}")
        self._nudge = nudge
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)

    @property
    def preempted(self) -> threading.Event:
        """Set when the job is told to leave."""
        self.watches_preemption = True
        return self._preempted

    def input(self, name: str) -> Artifact:
        """The one artifact of an input field.

        Raises:
            InvalidArgument: the field holds none, or several.
        """
        artifacts = self.inputs.get(name, [])
        if len(artifacts) != 1:
            raise InvalidArgument.field(
                name, f"holds {len(artifacts)} artifacts, expected exactly one"
            )
        return artifacts[0]

    def optional_input(self, name: str) -> Artifact | None:
        """The artifact of an input field that may be unset."""
        return self.input(name) if self.inputs.get(name) else None

    def output_dir(self, name: str) -> Path:
        """An empty directory to fill; the same name gives the same place, emptied."""
        if not _NAME.fullmatch(name):
            raise Internal(f"output name {name!r} is not made of letters, digits, '.', '_', '-'")
        path = self.directory / "outputs" / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def progress(
        self,
        *,
        phase: str,
        step: int = 0,
        total: int = 0,
        unit: str = "",
        loss: float | None = None,
        raw_loss: float | None = None,
        grad_norm: float | None = None,
        micro_batch_size: int | None = None,
        learning_rate: float | None = None,
        tokens_per_second: float | None = None,
        tokens: int | None = None,
        mfu: float | None = None,
        checkpoint_time: float | None = None,
        force: bool = False,
    ) -> None:
        """Say how far the work is; call as often as you like.

        The service hears it at most twice a second. `loss` is in nats per
        token and smoothed, `raw_loss` the last step's, `mfu` 0..1,
        `checkpoint_time` in seconds since the epoch (of the newest complete
        checkpoint). The time left and the usage of host and
        GPUs are added here. `force` asks to be heard soon.
        """
        self.meter.update(
            phase=phase,
            step=step,
            total=total,
            unit=unit,
            loss=loss,
            raw_loss=raw_loss,
            grad_norm=grad_norm,
            micro_batch_size=micro_batch_size,
            learning_rate=learning_rate,
            tokens_per_second=tokens_per_second,
            tokens=tokens,
            mfu=mfu,
            checkpoint_time=checkpoint_time,
        )
        if force and self._nudge is not None:
            self._nudge()

    def check_preempted(self) -> None:
        """Raise if the job was told to leave; for handlers that have nothing to save.

        Does not count as looking: in a job process, such a handler is ended at once.

        Raises:
            Preempted: it was.
        """
        if self._preempted.is_set():
            raise Preempted("the job was told to stop; it will start again where it can")


def rank_directory(attempt: Path, rank: int) -> Path:
    """Where a rank of a distributed job, other than the first, leaves what it has to say."""
    return attempt / "ranks" / str(rank)


Handler = Callable[[Job], Sequence[Output]]


def gate_modes(spec: Message) -> dict[str, Mode]:
    """The modes that a spec's `gates` map asks for; unspecified ones are left out."""
    names = {
        types_pb2.GATE_MODE_ENFORCE: Mode.ENFORCE,
        types_pb2.GATE_MODE_WARN: Mode.WARN,
        types_pb2.GATE_MODE_SKIP: Mode.SKIP,
    }
    modes: Mapping[str, Any] = getattr(spec, "gates", {})
    return {gate: names[mode] for gate, mode in modes.items() if mode in names}


def main(handlers: Mapping[str, Handler]) -> NoReturn:
    """The whole job process: `python -m arriero.<room>.job ASSIGNMENT`.

    Writes `outcome.json` whatever happens short of a kill. Never returns: the
    process ends without the interpreter's shutdown, which libraries with
    threads of their own are known to hang in.

    Where a launcher such as torchrun set `RANK`, rank 0 does so for all; the others
    say only why they failed, in a directory of their own.
    """
    if len(sys.argv) != 2:
        print("usage: python -m <job module> ASSIGNMENT  (started by a service)", file=sys.stderr)
        sys.exit(os.EX_USAGE)
    assignment = Assignment.find(sys.argv[1])
    # The service's pid means nothing on another machine (torchrun's GROUP_RANK).
    if assignment.watch_service and os.environ.get("GROUP_RANK", "0") == "0":
        watch_service(assignment)
    logs.configure(assignment.service)
    with logs.bind(run=assignment.run, stage=assignment.stage, attempt=assignment.attempt):
        code = _run(assignment, handlers)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def watch_service(assignment: Assignment) -> None:
    """End this process within two seconds of its service's death.

    A thread looks for the service's pid and start time. Every rank of a
    distributed job calls it, because killing the launcher leaves the ranks alive.
    """
    if assignment.service_process is not None:
        parent.watch(
            assignment.service_process,
            lambda: end_self(EXIT_TRY_AGAIN),
            interval=_WATCH_INTERVAL,
        )


def _run(assignment: Assignment, handlers: Mapping[str, Handler]) -> int:
    job: Job | None = None
    sender: ProgressSender | None = None
    rank = int(os.environ.get("RANK", "0"))
    if rank:  # what all ranks say, the first one says
        logging.getLogger("arriero").setLevel(logging.WARNING)
    preempted = threading.Event()

    def on_sigterm() -> None:
        preempted.set()
        if job is None or not job.watches_preemption:
            end_self(EXIT_TRY_AGAIN)

    _listen(on_sigterm)
    log = logging.getLogger("arriero.job")
    outcome: Outcome
    if not rank:  # of a pod that was held, and goes on as the same attempt
        Outcome.path(Path(assignment.staging), assignment.attempt).unlink(missing_ok=True)
    try:
        handler = handlers.get(assignment.kind)
        if handler is None:
            raise Internal(
                f"no handler for kind {assignment.kind!r}; this module has {sorted(handlers)}"
            )
        store = Store.open(assignment.store)
        inputs = {
            name: [store.get(digest) for digest in digests]
            for name, digests in assignment.inputs.items()
        }
        job = Job(
            spec=assignment.message(),
            kind=assignment.kind,
            store=store,
            inputs=inputs,
            staging=Path(assignment.staging),
            attempt=assignment.attempt,
            run=assignment.run,
            stage=assignment.stage,
            last_failure=assignment.last_failure,
            preempted=preempted,
            nudge=lambda: sender.nudge() if sender is not None else None,
            rank=rank,
        )
        if not rank:
            job.gates.meter.watch()
            sender = ProgressSender(assignment, job.meter)
            sender.start()
        with Keeper(store, job.checkpoints) if not rank else contextlib.nullcontext():
            outcome = describe(handler(job), job)
        if assignment.detached and not rank:
            store.keep(job.directory / "outputs", hidden=True)
    except BaseException as error:  # whatever it was, the service must hear of it
        outcome = failure(assignment.attempt, error, log)
    if sender is not None:
        sender.close()
    if not rank:
        outcome.write(assignment.directory)
        hand_in(assignment)
    elif not outcome.ok:
        place = rank_directory(assignment.directory, rank)
        place.mkdir(parents=True, exist_ok=True)
        outcome.write(place)
    if outcome.ok:
        return 0
    return EXIT_TRY_AGAIN if outcome.preempted else EXIT_FAILED


def hand_in(assignment: Assignment) -> None:
    """Bring the outcome, or that there is none, to the store if the service looks for it there."""
    if not assignment.detached:
        return
    path = Outcome.path(Path(assignment.staging), assignment.attempt)
    try:
        store = Store.open(assignment.store)
        store.keep(path) if path.exists() else store.forget(path)
    except ArrieroError as error:  # the exit code has to do
        logging.getLogger("arriero.job").error("the outcome could not be handed in: %s", error)


def _listen(on_sigterm: Callable[[], None]) -> None:
    """Call back from a thread when SIGTERM comes.

    A signal handler would run only when the main thread is back in Python, and
    a quantizer may be away for minutes.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)

    def run() -> None:
        while data := os.read(read, 64):
            if signal.SIGTERM in data:
                on_sigterm()

    threading.Thread(target=run, name="sigterm", daemon=True).start()
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)
