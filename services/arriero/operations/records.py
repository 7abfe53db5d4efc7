"""What an engine remembers: operations and executions, one JSON file each.

Responsibility: the records' shape, and reading and writing them atomically.
Does not know what moves an operation from one state to the next.

    operations/<service>/<id>/operation.json              somebody asked
    operations/<service>/executions/<id>/execution.json   the work, shared by equal askers
    operations/<service>/executions/<id>/log.jsonl        what its jobs wrote
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from arriero.errors import ArrieroError
from arriero.operations.handoff import canonical
from arriero.rpc.parent import ProcessId
from arriero.store import Store
from arriero.store.files import make_directories, parse_json

FORMAT = 1


class State(StrEnum):
    """Where an operation or an execution stands; names as in `OperationState`."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"

    @property
    def ended(self) -> bool:
        """Whether it stays so."""
        return self not in (State.PENDING, State.RUNNING)


def now() -> str:
    """The time as RFC 3339 in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass
class JobRecord:
    """One job process.

    `status` is a `google.rpc.Status` as JSON, None while it runs; `counted` says
    whether it used up one of the attempts.
    """

    attempt: int
    start_time: str
    end_time: str = ""
    status: dict[str, Any] | None = None
    counted: bool = True
    process: ProcessId | None = None


@dataclass
class Result:
    """How work ended, as proto JSON: `StageOutput`, `GateResult` and `JobUsage`."""

    error: dict[str, Any] | None = None
    outputs: list[dict[str, Any]] = field(default_factory=list)
    gates: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, Any] | None = None


@dataclass
class OperationRecord:
    """Somebody who asked for work, and what came of it.

    `request_digest` tells the same request from another under the same
    `request_id`; `staging` (relative to the store) and `inputs` are what garbage
    collection must leave alone until the end.
    """

    id: str
    service: str
    kind: str
    request_id: str
    request_digest: str
    result_key: str
    execution: str
    inputs: dict[str, list[str]]
    staging: str = ""
    run: str = ""
    stage: str = ""
    owner: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    cached: bool = False
    cancel_requested: bool = False
    paused: bool = False
    state: State = State.PENDING
    create_time: str = ""
    start_time: str = ""
    end_time: str = ""
    disk_bytes: int = 0
    memory_bytes: int = 0
    result: Result = field(default_factory=Result)
    format: int = FORMAT

    @property
    def name(self) -> str:
        """`operations/<id>`."""
        return f"operations/{self.id}"


@dataclass
class ExecutionRecord:
    """Work that runs or ran.

    `cancelled` is the marker of a cancellation: set before the job is killed,
    so that a restart does not take the work up again. `paused` holds it, `profile`
    and `nodes` say with what its jobs run.
    """

    id: str
    kind: str
    result_key: str
    spec: dict[str, Any]
    inputs: dict[str, list[str]]
    profile: str = ""
    nodes: int = 1
    paused: bool = False
    run: str = ""
    stage: str = ""
    owner: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    cacheable: bool = True
    disk_bytes: int = 0
    memory_bytes: int = 0
    attempt: int = 0
    jobs: list[JobRecord] = field(default_factory=list)
    state: State = State.PENDING
    cancelled: bool = False
    create_time: str = ""
    start_time: str = ""
    end_time: str = ""
    progress: dict[str, Any] = field(default_factory=dict)
    result: Result = field(default_factory=Result)
    format: int = FORMAT

    @property
    def counted(self) -> int:
        """Attempts used up: preemptions and deaths of the service left out."""
        return sum(1 for job in self.jobs if job.counted)


_Record = TypeVar("_Record", OperationRecord, ExecutionRecord)


class Records:
    """The records of one service; it is their only writer.

    Logs are written where the service runs. A store elsewhere gets them when they
    are kept.
    """

    def __init__(self, store: Store, service: str) -> None:
        self._store = store
        self._directory = store.record_dir(service)
        self._prefix = f"operations/{service}/"
        self._writing = threading.Lock()
        self._numbers = itertools.count(1)
        # Of each key: the number of what was written last, and what is to be written later.
        self._written: dict[str, int] = {}
        self._later: dict[str, tuple[int, bytes]] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="records")
        # Executions whose log is here, and whose log is being brought.
        self._brought: set[str] = set()
        self._bringing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        make_directories(self._directory / "executions", below=self._directory)

    def execution_dir(self, execution: str) -> Path:
        """Directory of an execution's record and log."""
        return self._directory / "executions" / execution

    def log_path(self, execution: str) -> Path:
        """Where an execution's jobs write their log; bring what there was before, first."""
        return self.execution_dir(execution) / "log.jsonl"

    def has_log(self, execution: str) -> bool:
        """Whether this machine has what there was of a log before."""
        return not self._store.remote or execution in self._brought

    async def bring_log(self, execution: str) -> None:
        """Let an execution's log be here, as far as it was kept; nobody else is held up.

        Raises:
            Unavailable: the store is away.
        """
        async with self._bringing.setdefault(execution, asyncio.Lock()):
            if self.has_log(execution):
                return
            path = self.log_path(execution)
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                await asyncio.to_thread(self._store.bring, path)
            self._brought.add(execution)

    def keep_log(self, execution: str) -> None:
        """Let an execution's log survive this machine, as far as it is written."""
        if self._store.remote:
            self._store.keep(self.log_path(execution))

    def save(self, record: OperationRecord | ExecutionRecord, *, durable: bool = True) -> None:
        """Write a record; after a crash there is the old one or the new one.

        What need not be durable is not waited for where the store is elsewhere.

        Raises:
            DiskFull: no space; the old record stays.
        """
        directory, key = self._place(record)
        number, data = next(self._numbers), canonical(asdict(record))
        if self._store.remote and not durable:
            self._later[key] = (number, data)
            self._writer.submit(self._write_later, key)
            return
        new = not directory.exists()
        directory.mkdir(exist_ok=True)
        try:
            self._write(key, number, data, durable=durable)
        except BaseException:
            if new:
                shutil.rmtree(directory, ignore_errors=True)
            raise

    async def keep(self, record: OperationRecord | ExecutionRecord) -> None:
        """As `save`; a store elsewhere holds nobody else up.

        Raises:
            DiskFull: no space; the old record stays. Unavailable: the store is away.
        """
        if not self._store.remote:
            self.save(record)
            return
        _, key = self._place(record)
        number, data = next(self._numbers), canonical(asdict(record))
        await asyncio.to_thread(self._write, key, number, data, durable=True)

    def _place(self, record: OperationRecord | ExecutionRecord) -> tuple[Path, str]:
        if isinstance(record, OperationRecord):
            directory, name = self._directory / record.id, "operation.json"
        else:
            directory, name = self.execution_dir(record.id), "execution.json"
        return directory, self._prefix + (directory / name).relative_to(self._directory).as_posix()

    def _write(self, key: str, number: int, data: bytes, *, durable: bool) -> None:
        with self._writing:
            if self._written.get(key, 0) > number:
                return  # somebody was faster, with a newer one
            self._store.objects.write(key, data, durable=durable)
            self._written[key] = number

    def _write_later(self, key: str) -> None:
        number, data = self._later.pop(key, (0, b""))
        if number:
            with contextlib.suppress(ArrieroError):
                self._write(key, number, data, durable=False)

    def operations(self) -> list[OperationRecord]:
        """Every operation, oldest first.

        Raises:
            FailedPrecondition: a record of a newer format.
        """
        found = self._load("/operation.json", OperationRecord)
        return sorted(found, key=lambda record: (record.create_time, record.id))

    def executions(self) -> list[ExecutionRecord]:
        """Every execution, oldest first.

        Raises:
            FailedPrecondition: a record of a newer format.
        """
        found = self._load("/execution.json", ExecutionRecord)
        return sorted(found, key=lambda record: (record.create_time, record.id))

    def _load(self, name: str, record_type: type[_Record]) -> list[_Record]:
        objects = self._store.objects
        found = []
        for item in objects.find(self._prefix):
            if item.key.endswith(name):
                what = f"the record {objects.shown(item.key)}"
                data = parse_json(objects.read(item.key), FORMAT, what)
                found.append(_parse(data, record_type))
        return found


def _parse(data: dict[str, Any], record_type: type[_Record]) -> _Record:
    data["state"] = State(data["state"])
    data["result"] = Result(**data["result"])
    if "jobs" in data:
        data["jobs"] = [_job(item) for item in data["jobs"]]
    known = {item.name for item in fields(record_type)}
    return record_type(**{key: value for key, value in data.items() if key in known})


def _job(data: dict[str, Any]) -> JobRecord:
    process = data["process"]
    return JobRecord(**{**data, "process": None if process is None else ProcessId(**process)})
