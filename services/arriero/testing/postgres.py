"""A PostgreSQL server of a test's own, from the machine's own binaries.

Responsibility: a fresh cluster on a free port of loopback, with passwords, that
can be stopped and started again. Does not know what is kept in it. As root it
runs as another user, since initdb refuses root.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote

import psycopg

from arriero.rpc.ports import free_port

__all__ = ["MISSING", "Postgres", "binaries"]

USER, PASSWORD = "arriero", "herd of llamas"
MISSING = "needs PostgreSQL's server: apt-get install postgresql (or have initdb on the PATH)"
_SECONDS = 30.0


def binaries() -> Path | None:
    """Where initdb and postgres are; None where they are not installed."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    places += sorted(debian, key=lambda place: int(place.parent.name), reverse=True)
    return next((place for place in places if (place / "postgres").is_file()), None)


class Postgres:
    """A running server; a context manager.

    Attributes:
        port: of loopback; the same after a restart.
    """

    def __init__(self) -> None:
        place = binaries()
        assert place is not None, MISSING
        self._bin = place
        # Not below pytest's directory, which no other user may enter.
        self._root = Path(tempfile.mkdtemp(prefix="arriero-postgres-"))
        self._data = self._root / "data"
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = _other_user()
            os.chown(self._root, user.pw_uid, user.pw_gid)
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: str, *, user: str = USER, password: str = PASSWORD) -> str:
        """For `ARRIERO_DATABASE_URL`; nothing checks that it is right."""
        return f"postgresql://{user}:{quote(password)}@127.0.0.1:{self.port}/{database}"

    def create(self) -> str:
        """The URL of a new, empty database."""
        name = f"runs_{secrets.token_hex(4)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as db:
            db.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)

    def __enter__(self) -> Postgres:
        word = self._root / "password"
        word.write_text(PASSWORD)
        if self._as:
            os.chown(word, self._as["user"], self._as["group"])
        self._run(
            *("initdb", "--pgdata", str(self._data), "--username", USER, "--no-sync"),
            *("--auth=scram-sha-256", f"--pwfile={word}", "--encoding=UTF8", "--locale=C"),
        )
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        shutil.rmtree(self._root, ignore_errors=True)

    def start(self) -> None:
        """Serve; returns when connections are taken."""
        self._process = subprocess.Popen(
            [str(self._bin / "postgres"), "-D", str(self._data), "-p", str(self.port)]
            + ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
            + ["-c", "fsync=off", "-c", "max_connections=40"],
            stdout=subprocess.DEVNULL,
            stderr=(self._root / "log").open("ab"),
            cwd=self._root,
            **self._as,
        )
        deadline = time.monotonic() + _SECONDS
        while not self._answers():
            log = (self._root / "log").read_text()
            assert self._process.poll() is None, log
            assert time.monotonic() < deadline, log
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url("postgres")).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self) -> None:
        """Go away at once, cutting every connection."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(_SECONDS)
            self._process = None

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._bin / program), *arguments],
            cwd=self._root,
            capture_output=True,
            text=True,
            check=False,
            **self._as,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def _other_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise AssertionError("this machine has neither a user postgres nor nobody")
