"""Copies of the database: whole, consistent, and as many as are asked for."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from arriero.orchestrator.backup import copy


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "orchestrator.db"
    path.parent.mkdir()
    with sqlite3.connect(path) as made:
        made.execute("PRAGMA journal_mode=WAL")
        made.execute("CREATE TABLE pairs (a INTEGER, b INTEGER)")
    made.close()
    return path


def test_a_copy_made_under_writes_is_consistent(database: Path, tmp_path: Path) -> None:
    stop = threading.Event()

    def write() -> None:
        connection = sqlite3.connect(database, timeout=120)
        number = 0
        while not stop.is_set():
            with connection:  # both rows, or none
                connection.execute("INSERT INTO pairs VALUES (?, 0)", (number,))
                connection.execute("INSERT INTO pairs VALUES (?, 1)", (number,))
            number += 1
        connection.close()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        copies = [copy(database, tmp_path / "copies", keep=9) for _ in range(5)]
    finally:
        stop.set()
        writer.join()
    for made in copies:
        with sqlite3.connect(made) as opened:
            odd = opened.execute("SELECT a FROM pairs GROUP BY a HAVING count(*) != 2").fetchall()
        opened.close()
        assert odd == []


def test_old_copies_go_and_a_restored_one_is_the_database(database: Path, tmp_path: Path) -> None:
    made = []
    for number in range(4):
        with sqlite3.connect(database) as opened:
            opened.execute("INSERT INTO pairs VALUES (?, 0)", (number,))
        opened.close()
        made.append(copy(database, tmp_path / "copies", keep=2))
    assert sorted((tmp_path / "copies").iterdir()) == made[-2:]
    with sqlite3.connect(made[-1]) as opened:
        assert opened.execute("SELECT a FROM pairs").fetchall() == [(0,), (1,), (2,), (3,)]
    opened.close()


def test_nothing_is_left_when_there_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "broken.db").write_bytes(b"not a database, and long enough to look at" * 100)
    for path, said in (("absent.db", "is not there"), ("broken.db", "not a database")):
        command = [sys.executable, "-m", "arriero.orchestrator.backup"]
        ended = subprocess.run(
            [*command, str(tmp_path / path), str(tmp_path / "copies")],
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 1
        assert said in ended.stderr
        assert "Traceback" not in ended.stderr
    assert not list(tmp_path.glob("copies/*"))
    assert not (tmp_path / "absent.db").exists()
