"""The run database: where it is, and what its refusals mean.

Responsibility: from ARRIERO_DATABASE_URL to an engine, and from what drivers say
to errors that never show a password. Does not know what is kept in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, IntegrityError, SQLAlchemyError

from arriero.errors import InvalidArgument, Unavailable

__all__ = ["connected", "explained", "open_engine", "shown"]

VARIABLE = "ARRIERO_DATABASE_URL"
# No password in it: logs blot out whatever looks like one.
_FORMS = "sqlite:////absolute/path.db or postgresql://user@host:5432/database"
# How long a host that says nothing may hold everything up.
_CONNECT_SECONDS = 5


def shown(database_url: str) -> str:
    """The URL without its password.

    Raises:
        InvalidArgument: it is none that is understood.
    """
    return _parse(database_url).render_as_string(hide_password=True)


def open_engine(database_url: str) -> sa.Engine:
    """An engine for documents: for SQLite in a file beside DBOS's, else in its database.

    Nothing is connected yet.

    Raises:
        InvalidArgument: the URL is none that is understood.
        OSError: the directory of a SQLite file cannot be made.
    """
    url = _parse(database_url)
    if url.get_backend_name() == "postgresql":
        return sa.create_engine(
            url.set(drivername="postgresql+psycopg"),
            # A database that was started again is noticed before it is asked.
            pool_pre_ping=True,
            connect_args={
                "connect_timeout": _CONNECT_SECONDS,
                "application_name": "arriero-orchestrator",
            },
        )
    if url.database:
        path = Path(url.database)
        path.parent.mkdir(parents=True, exist_ok=True)
        url = url.set(database=str(path.with_name(f"{path.stem}-records{path.suffix}")))
    engine = sa.create_engine(url)
    sa.event.listen(engine, "connect", _wal)
    return engine


@contextmanager
def connected(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that is durable at the end.

    Raises:
        IntegrityError: what must be unique is not.
        Unavailable: the database is away, or refuses; nothing was written.
    """
    try:
        with engine.begin() as connection:
            yield connection
    except IntegrityError:
        raise
    except (SQLAlchemyError, OSError) as error:
        raise explained(error, engine.url.render_as_string(hide_password=True)) from error


def explained(error: Exception, where: str) -> Unavailable:
    """What a driver or DBOS said, in one line, and what to do."""
    said = " ".join(str(getattr(error, "orig", None) or error).split())
    # Drivers ask back and give hints for psql; SQLAlchemy adds its own address.
    said = said.split(" Is the server running")[0].split(" (Background on this error")[0]
    advice = "check that it runs, and what ARRIERO_DATABASE_URL says"
    if "password authentication failed" in said or "no password supplied" in said:
        advice = "check user and password in ARRIERO_DATABASE_URL"
    elif "database" in said and "does not exist" in said:
        advice = "create the database first (createdb), or correct ARRIERO_DATABASE_URL"
    elif "permission denied" in said or "InsufficientPrivilege" in said:
        advice = "make the user the owner of the database, or grant it CREATE on the schema"
    where = where.replace("postgresql+psycopg", "postgresql")
    return Unavailable(
        f"the run database at {where} cannot be used: {said}; {advice}", reason="DATABASE"
    )


def _parse(text: str) -> sa.URL:
    try:
        url = sa.make_url(text)
    except (ArgumentError, ValueError):
        # Not repeated: a broken URL may hold a password anywhere.
        raise InvalidArgument.field(VARIABLE, f"is not a database URL; expected {_FORMS}") from None
    if url.drivername not in ("sqlite", "postgresql", "postgresql+psycopg"):
        raise InvalidArgument.field(
            VARIABLE, f"{url.drivername!r} is not a kind of database known here; expected {_FORMS}"
        )
    if url.get_backend_name() == "postgresql" and not url.database:
        raise InvalidArgument.field(VARIABLE, f"names no database; expected {_FORMS}")
    return url


def _wal(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA busy_timeout=30000")
