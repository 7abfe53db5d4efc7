"""What the orchestrator remembers of runs and endpoints.

Responsibility: one JSON document per run and per endpoint, in a database of its
own beside DBOS's. Does not know what moves a run from one state to the next.
Progress is never written: it lives in memory until the next state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc import error_details_pb2  # noqa: F401  Any values in JSON need the type registered
from sqlalchemy.exc import IntegrityError

from arriero.errors import AlreadyExists, FailedPrecondition
from arriero.orchestrator.database import connected, explained, open_engine, shown
from arriero.v1 import orchestrator_pb2 as pb

FORMAT = 1

_metadata = sa.MetaData()
_meta = sa.Table(
    "arriero_meta",
    _metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.String(256), nullable=False),
)
_runs = sa.Table(
    "arriero_runs",
    _metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(128), unique=True, nullable=False),
    sa.Column("request_id", sa.String(256), unique=True, nullable=True),
    sa.Column("active", sa.Boolean, nullable=False, index=True),
    sa.Column("document", sa.Text, nullable=False),
)
_endpoints = sa.Table(
    "arriero_endpoints",
    _metadata,
    sa.Column("name", sa.String(128), primary_key=True),
    sa.Column("document", sa.Text, nullable=False),
)

ENDED_RUN = (pb.RUN_STATE_SUCCEEDED, pb.RUN_STATE_FAILED, pb.RUN_STATE_CANCELLED)
ENDED_STAGE = (
    pb.STAGE_STATE_SUCCEEDED,
    pb.STAGE_STATE_FAILED,
    pb.STAGE_STATE_CANCELLED,
    pb.STAGE_STATE_SKIPPED,
)


@dataclass
class RunRecord:
    """A run and what only the orchestrator needs to know of it.

    Attributes:
        run: as the API shows it.
        request_id: of its creation; empty when none was given.
        request_digest: tells the same request from another under one `request_id`.
        references: digest of every store reference in the pipeline, by its text.
        rounds: `request_id` of each start: the creation, then retries.
        cancel_requested: somebody asked for the end.
        owed: operations (stage, name) whose cancellation did not arrive yet.
    """

    run: pb.Run
    request_id: str = ""
    request_digest: str = ""
    references: dict[str, str] = field(default_factory=dict)
    rounds: list[str] = field(default_factory=list)
    cancel_requested: bool = False
    owed: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether nothing more happens, unless somebody retries."""
        return self.run.state in ENDED_RUN

    @property
    def active(self) -> bool:
        """Whether a restart has something to do for it."""
        return not self.ended or bool(self.owed)

    def stage(self, name: str) -> pb.StageStatus:
        """A stage's status, to be changed in place."""
        return next(s for s in self.run.stages if s.name == name)

    def seen(self) -> pb.Run:
        """A copy for a caller, with its etag."""
        run = pb.Run()
        run.CopyFrom(self.run)
        run.etag = hashlib.sha256(run.SerializeToString(deterministic=True)).hexdigest()[:16]
        return run

    def to_json(self) -> str:
        """The document."""
        return json.dumps(
            {
                "format": FORMAT,
                "run": _dict(self.run),
                "request_id": self.request_id,
                "request_digest": self.request_digest,
                "references": self.references,
                "rounds": self.rounds,
                "cancel_requested": self.cancel_requested,
                "owed": self.owed,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> RunRecord:
        """The inverse of `to_json`.

        Raises:
            FailedPrecondition: a newer format.
        """
        data = _load(text, "run")
        return cls(
            run=json_format.ParseDict(data["run"], pb.Run(), ignore_unknown_fields=True),
            request_id=data["request_id"],
            request_digest=data["request_digest"],
            references=data["references"],
            rounds=data["rounds"],
            cancel_requested=data["cancel_requested"],
            owed=[(stage, name) for stage, name in data["owed"]],
        )


@dataclass
class EndpointRecord:
    """An endpoint and its roll-out.

    Attributes:
        endpoint: as the API shows it, replicas left out (they are observed).
        generation: counts what was ever desired of it.
        rollout: names the roll-out in progress or the last one.
        settled: whether that roll-out ended (its gate judged, or skipped).
        previous: what it served before, until the roll-out settles.
        restored: the last roll-out was taken back: `previous` serves again.
        error: why the last roll-out did not succeed.
    """

    endpoint: pb.Endpoint
    generation: int = 0
    rollout: str = ""
    settled: bool = True
    previous: pb.Endpoint | None = None
    restored: bool = False
    error: str = ""

    def to_json(self) -> str:
        """The document."""
        return json.dumps(
            {
                "format": FORMAT,
                "endpoint": _dict(self.endpoint),
                "generation": self.generation,
                "rollout": self.rollout,
                "settled": self.settled,
                "previous": None if self.previous is None else _dict(self.previous),
                "restored": self.restored,
                "error": self.error,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> EndpointRecord:
        """The inverse of `to_json`.

        Raises:
            FailedPrecondition: a newer format.
        """
        data = _load(text, "endpoint")
        previous = data["previous"]
        return cls(
            endpoint=_endpoint(data["endpoint"]),
            generation=data["generation"],
            rollout=data["rollout"],
            settled=data["settled"],
            previous=None if previous is None else _endpoint(previous),
            restored=data["restored"],
            error=data["error"],
        )


class Records:
    """The documents of one orchestrator; it is their only writer.

    Args:
        database_url: DBOS's: for SQLite the documents lie in a file beside it,
            on PostgreSQL in tables of the same database.

    Raises:
        InvalidArgument: the URL is none that is understood.
        FailedPrecondition: written by a newer version.

    Every method raises Unavailable where the database is away or refuses; nothing
    was written then.
    """

    def __init__(self, database_url: str) -> None:
        try:
            self._engine = open_engine(database_url)
        except OSError as error:
            raise explained(error, shown(database_url)) from error
        with connected(self._engine) as db:
            _metadata.create_all(db)
            found = db.execute(sa.select(_meta.c.value).where(_meta.c.name == "format")).scalar()
            if found is None:
                db.execute(sa.insert(_meta).values(name="format", value=str(FORMAT)))
            elif int(found) > FORMAT:
                raise FailedPrecondition(
                    f"the run database has format {found}, this version knows up to {FORMAT}; "
                    "use the newer Arriero that wrote it"
                )

    def close(self) -> None:
        """Close the connections."""
        self._engine.dispose()

    def create_run(self, record: RunRecord) -> None:
        """Write a new run.

        Raises:
            AlreadyExists: its id or `request_id` is taken.
        """
        row = {**_row(record), "id": record.run.id, "request_id": record.request_id or None}
        try:
            with connected(self._engine) as db:
                db.execute(sa.insert(_runs).values(**row))
        except IntegrityError as error:
            raise AlreadyExists(f"run {record.run.id} exists") from error

    def save_run(self, record: RunRecord) -> None:
        """Write a run that exists; durable when this returns."""
        with connected(self._engine) as db:
            db.execute(sa.update(_runs).where(_runs.c.id == record.run.id).values(**_row(record)))

    def run(self, run_id: str) -> RunRecord | None:
        """A run by id."""
        return self._one(_runs.c.id == run_id)

    def run_by_request(self, request_id: str) -> RunRecord | None:
        """The run that a creation with this `request_id` made."""
        return self._one(_runs.c.request_id == request_id)

    def active_runs(self) -> Iterator[RunRecord]:
        """Runs that a restart has to take up, oldest first."""
        query = sa.select(_runs.c.document).where(_runs.c.active).order_by(_runs.c.number)
        with connected(self._engine) as db:
            found = db.execute(query).all()
        for (text,) in found:
            yield RunRecord.from_json(text)

    def list_runs(self, size: int, before: int | None) -> tuple[list[RunRecord], int | None]:
        """At most `size` runs, newest first, and where the next page begins."""
        query = sa.select(_runs.c.number, _runs.c.document).order_by(_runs.c.number.desc())
        if before is not None:
            query = query.where(_runs.c.number < before)
        with connected(self._engine) as db:
            rows = db.execute(query.limit(size + 1)).all()
        found = [RunRecord.from_json(text) for _, text in rows[:size]]
        return found, (rows[size - 1][0] if len(rows) > size else None)

    def save_endpoint(self, record: EndpointRecord) -> None:
        """Write an endpoint; durable when this returns."""
        name, text = record.endpoint.name, record.to_json()
        with connected(self._engine) as db:
            changed = db.execute(
                sa.update(_endpoints).where(_endpoints.c.name == name).values(document=text)
            )
            if changed.rowcount == 0:
                db.execute(sa.insert(_endpoints).values(name=name, document=text))

    def delete_endpoint(self, name: str) -> None:
        """Forget an endpoint."""
        with connected(self._engine) as db:
            db.execute(sa.delete(_endpoints).where(_endpoints.c.name == name))

    def endpoints(self) -> list[EndpointRecord]:
        """Every endpoint, by name."""
        with connected(self._engine) as db:
            query = sa.select(_endpoints.c.document).order_by(_endpoints.c.name)
            return [EndpointRecord.from_json(text) for (text,) in db.execute(query).all()]

    def _one(self, condition: sa.ColumnElement[bool]) -> RunRecord | None:
        with connected(self._engine) as db:
            text = db.execute(sa.select(_runs.c.document).where(condition)).scalar()
        return None if text is None else RunRecord.from_json(text)


def _row(record: RunRecord) -> dict[str, Any]:
    return {"active": record.active, "document": record.to_json()}


def _dict(message: Message) -> dict[str, Any]:
    data: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return data


def _endpoint(data: dict[str, Any]) -> pb.Endpoint:
    return json_format.ParseDict(data, pb.Endpoint(), ignore_unknown_fields=True)


def _load(text: str, what: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(text)
    if data["format"] > FORMAT:
        raise FailedPrecondition(
            f"the {what} has format {data['format']}, this version knows up to {FORMAT}; "
            "use the newer Arriero that wrote it"
        )
    return data
