"""Copies of the orchestrator's database, made while it is used.

Responsibility: one consistent file per call, whole or not there, and as many old
ones as are asked for. Does not know what the database holds.

    python -m arriero.orchestrator.backup DATABASE DIRECTORY [--keep 7]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sqlite3
import sys
from datetime import UTC, datetime
from pathlib import Path

_PREFIX = "orchestrator-"


def copy(database: Path, directory: Path, *, keep: int) -> Path:
    """Copy a SQLite database with its own backup API; returns the copy.

    Writers go on meanwhile. The copy is checked before it counts, and only then
    are old ones removed.

    Args:
        database: the file; it is only read.
        directory: made when it is missing.
        keep: how many copies are kept, this one included; at least 1.

    Raises:
        OSError: no such database, or the directory cannot be written.
        sqlite3.Error: not a database, or the copy is damaged.
    """
    if not database.is_file():
        raise FileNotFoundError(f"{database} is not there; expected the orchestrator's database")
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"{_PREFIX}{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}.db"
    part = target.with_name(f".{target.name}.part")
    try:
        with (
            contextlib.closing(sqlite3.connect(database, timeout=60)) as source,
            contextlib.closing(sqlite3.connect(part)) as made,
        ):
            source.backup(made)
            (verdict,) = made.execute("PRAGMA integrity_check").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(f"the copy of {database} is damaged: {verdict}")
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    for old in sorted(directory.glob(f"{_PREFIX}*.db"))[:-keep]:
        old.unlink()
    return target


def main() -> int:
    """0 when the copy is there; 1 with one line of why it is not."""
    parser = argparse.ArgumentParser(description="Copy the orchestrator's SQLite database.")
    parser.add_argument("database", type=Path)
    parser.add_argument("directory", type=Path, help="where copies go")
    parser.add_argument("--keep", type=int, default=7, help="copies to keep (7)")
    arguments = parser.parse_args()
    if arguments.keep < 1:
        parser.error("--keep: expected a number from 1 up")
    try:
        made = copy(arguments.database, arguments.directory, keep=arguments.keep)
    except (OSError, sqlite3.Error) as error:
        print(f"no copy was made: {error}", file=sys.stderr)
        return 1
    print(f"{made} ({made.stat().st_size} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
