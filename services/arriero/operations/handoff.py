"""What a service and a job hand each other: the assignment, and the outcome.

Responsibility: the two JSON files and the directories around them. Does not
know how the job is started, nor what happens to its files afterwards.

A job's directories, below the execution's staging directory:

    checkpoints/                 survives attempts
    attempts/<n>/assignment.json
    attempts/<n>/outputs/<name>/
    attempts/<n>/scratch/
    attempts/<n>/outcome.json    exists only when it is complete
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from arriero.errors import FailedPrecondition
from arriero.gates import GateResult
from arriero.gates.cost import Cost
from arriero.rpc.parent import ProcessId
from arriero.store import Store, safe_relative
from arriero.store.files import write_atomic
from arriero.store.manifest import gates_from_json, gates_to_json

FORMAT = 1
# gRPC metadata key of the token that an attempt reports with.
TOKEN_KEY = "arriero-job-token"
# EX_TEMPFAIL: preempted, or the service is gone; not the job's fault.
EXIT_TRY_AGAIN = 75
EXIT_FAILED = 1


def to_json(message: Message) -> dict[str, Any]:
    """A message as canonical proto JSON with the proto's field names."""
    result: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return result


def canonical(data: Any) -> bytes:
    """JSON with one spelling: sorted keys, no spaces, UTF-8."""
    return json.dumps(
        data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


@dataclass(frozen=True)
class Assignment:
    """Everything that one attempt needs to know.

    `inputs` are digests by field name; `staging` is the execution's directory;
    `watch_service` makes the job end within two seconds of its service's death;
    `last_failure` is the reason of the attempt before, such as `OUT_OF_MEMORY`;
    `detached`: the job does not share the service's disk, so what it leaves goes
    to the store, and the service looks there.
    """

    service: str
    kind: str
    spec_type: str
    spec: Mapping[str, Any]
    inputs: Mapping[str, list[str]]
    store: str
    staging: str
    execution: str
    attempt: int
    run: str = ""
    stage: str = ""
    report_address: str = ""
    report_token: str = ""
    service_process: ProcessId | None = None
    watch_service: bool = True
    last_failure: str = ""
    detached: bool = False
    format: int = FORMAT

    @property
    def directory(self) -> Path:
        """This attempt's own directory."""
        return Path(self.staging) / "attempts" / str(self.attempt)

    @property
    def checkpoints(self) -> Path:
        """The directory that survives attempts."""
        return Path(self.staging) / "checkpoints"

    def message(self) -> Message:
        """The resolved spec, parsed into its own type."""
        module, _, name = self.spec_type.partition(":")
        spec_type: type[Message] = getattr(importlib.import_module(module), name)
        return json_format.ParseDict(dict(self.spec), spec_type())

    def write(self) -> Path:
        """Make the attempt's directory and write `assignment.json` into it, for the owner alone."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "assignment.json"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(canonical(asdict(self)))
        return path

    @classmethod
    def read(cls, path: Path) -> Assignment:
        """Read what `write` wrote.

        Raises:
            FailedPrecondition: a newer format.
        """
        data = json.loads(path.read_bytes())
        _check_format(data, path)
        if data["service_process"] is not None:
            data["service_process"] = ProcessId(**data["service_process"])
        return cls(**_known(cls, data))

    @classmethod
    def find(cls, place: str) -> Assignment:
        """Read an assignment from a file, or from the staging of a store elsewhere.

        Args:
            place: a path, or `<store's URL>/staging/<service>/<execution>/attempts/<n>/...`.

        Raises:
            OSError, ArrieroError: it can't be read.
        """
        if not place.startswith("s3://"):
            return cls.read(Path(place))
        url, _, key = place.rpartition("/staging/")
        store = Store.open(url)
        path = store.root / "staging" / safe_relative(key)
        store.bring(path)
        # Where it lies here is not where the service has it.
        return replace(cls.read(path), staging=str(path.parents[2]))


def type_name(spec_type: type[Message]) -> str:
    """`module:Class` of a top-level message."""
    return f"{spec_type.__module__}:{spec_type.__name__}"


@dataclass(frozen=True)
class OutputFiles:
    """One output as the job left it: where, what, and the digests of its files.

    `path` is the directory relative to the attempt's, empty for `existing`;
    `files` are (relative path, size in bytes, sha256 in hex).
    """

    name: str
    kind: str
    path: str = ""
    files: tuple[tuple[str, int, str], ...] = ()
    artifact_name: str = ""
    parents: tuple[str, ...] = ()
    golden: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    gates: tuple[GateResult, ...] = ()
    licenses: tuple[str, ...] = ()
    existing: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, by its own word.

    `status` is a `google.rpc.Status` as JSON (code 0: done); `created` is when,
    RFC 3339 in UTC, and becomes the artifacts' time, so that publishing again
    after a crash makes the same digests. `work` is what it took without its proofs.
    """

    attempt: int
    status: Mapping[str, Any]
    created: str
    retryable: bool = False
    preempted: bool = False
    outputs: tuple[OutputFiles, ...] = ()
    gates: tuple[GateResult, ...] = ()
    work: Cost | None = None
    format: int = FORMAT

    @property
    def ok(self) -> bool:
        """Whether the work was done (its gates may still have failed)."""
        return int(self.status.get("code", 0)) == 0

    @staticmethod
    def path(staging: Path, attempt: int) -> Path:
        """Where the outcome of an attempt lies."""
        return staging / "attempts" / str(attempt) / "outcome.json"

    def write(self, directory: Path) -> None:
        """Write `outcome.json` atomically: it is there whole, or not at all."""
        data = asdict(self)
        data["gates"] = gates_to_json(self.gates)
        for item, output in zip(data["outputs"], self.outputs, strict=True):
            item["gates"] = gates_to_json(output.gates)
            item["metrics"] = {key: _number(value) for key, value in output.metrics.items()}
        write_atomic(directory / "outcome.json", canonical(data))

    @classmethod
    def read(cls, path: Path) -> Outcome | None:
        """Read what `write` wrote; None when the attempt left none.

        Raises:
            FailedPrecondition: a newer format.
        """
        try:
            data = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        _check_format(data, path)
        data["outputs"] = tuple(_output(item) for item in data["outputs"])
        data["gates"] = _gates(data["gates"])
        data["work"] = Cost(**_known(Cost, data["work"])) if data.get("work") else None
        return cls(**_known(cls, data))


def _gates(values: Sequence[Mapping[str, Any]]) -> tuple[GateResult, ...]:
    return gates_from_json([_known(GateResult, value) for value in values])


def _output(data: dict[str, Any]) -> OutputFiles:
    data["files"] = tuple((path, size, digest) for path, size, digest in data["files"])
    data["gates"] = _gates(data["gates"])
    data["metrics"] = {key: float(value) for key, value in data["metrics"].items()}
    data["parents"] = tuple(data["parents"])
    data["licenses"] = tuple(data["licenses"])
    return OutputFiles(**_known(OutputFiles, data))


def _known(record: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Without fields of a later build: within a format they say nothing one must know.

    A job keeps the image that it started with, while its service may be updated.
    """
    names = {item.name for item in fields(record)}
    return {key: value for key, value in data.items() if key in names}


def _number(value: float) -> float | str:
    """JSON has no NaN and no infinities, which a failed training does have."""
    return value if math.isfinite(value) else str(value)


def _check_format(data: Mapping[str, Any], path: Path) -> None:
    found = data.get("format")
    if not isinstance(found, int) or found > FORMAT:
        raise FailedPrecondition(
            f"{path.name} has format {found!r}, this build reads up to {FORMAT}: "
            "it was written by a newer Arriero; use that one"
        )
