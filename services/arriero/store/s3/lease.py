"""The only one of a name, on whatever machine: a lease that is renewed.

Responsibility: `locks/<name>/<n>.json`, numbered, each made by conditional put; the
highest counts until it expires or is given back. Does not know what its holder
does.

The holder renews the record that it made. Who finds it expired makes the next
number; should the holder only have been asleep, it meets that number when it
renews, and leaves. A holder that died on this very machine is not waited for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from arriero.errors import ArrieroError, FailedPrecondition
from arriero.store.files import to_json
from arriero.store.manifest import FORMAT
from arriero.store.s3.bucket import Bucket

log = logging.getLogger(__name__)

SECONDS = 30.0


@contextlib.contextmanager
def hold(bucket: Bucket, name: str, what: str, lost: Callable[[], None]) -> Iterator[None]:
    """Hold a name for as long as the context lasts.

    Args:
        bucket: of the store.
        name: of the lock.
        what: the holder is, for people.
        lost: called from a thread when another took over, or the store has not
            answered for so long that another may have.

    Raises:
        FailedPrecondition: another one holds it; names it.
    """
    lease = _Lease(bucket, name, what)
    lease.take()
    ended = threading.Event()
    thread = threading.Thread(target=lease.renew_until, args=(ended, lost), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        lease.give_back()


class _Lease:
    def __init__(self, bucket: Bucket, name: str, what: str) -> None:
        self._bucket = bucket
        self._prefix = f"locks/{name}/"
        self._what = what
        self._number = 0
        self._until = 0.0  # monotonic

    def take(self) -> None:
        """Make the next number, when nobody holds the highest."""
        while True:
            numbers = self._numbers()
            newest = numbers[-1] if numbers else 0
            held = self._read(newest) if newest else None
            if held is not None and not _over(held):
                raise FailedPrecondition(
                    f"another process (pid {held.get('pid')} on {held.get('host')}) is the "
                    f"{self._what} of this store; stop it first, or use a store of its own "
                    f"(one that was killed is waited for until {SECONDS:.0f} s after its last "
                    "sign of life)",
                    reason="LOCKED",
                    metadata={"pid": str(held.get("pid"))},
                )
            began = time.monotonic()
            if self._bucket.create(self._key(newest + 1), self._record(SECONDS)):
                self._number, self._until = newest + 1, began + SECONDS
                self._bucket.delete([self._key(number) for number in numbers])
                return

    def renew_until(self, ended: threading.Event, lost: Callable[[], None]) -> None:
        """Renew until told to stop, or until it is lost."""
        while not ended.wait(SECONDS / 3):
            began = time.monotonic()
            try:
                if self._numbers()[-1:] == [self._number]:
                    self._bucket.put(self._key(self._number), self._record(SECONDS))
                    self._until = began + SECONDS
                    continue
            except ArrieroError as error:
                log.warning("the lock of the %s could not be renewed: %s", self._what, error)
                if time.monotonic() < self._until:
                    continue
            if not ended.is_set():
                log.critical("this is no longer the %s of this store: leaving", self._what)
                lost()
            return

    def give_back(self) -> None:
        """Let the next one have it at once."""
        with contextlib.suppress(ArrieroError):
            if self._numbers()[-1:] == [self._number]:
                self._bucket.put(self._key(self._number), self._record(0.0))

    def _numbers(self) -> list[int]:
        names = (
            found.key.removeprefix(self._prefix).removesuffix(".json")
            for found in self._bucket.find(self._prefix)
        )
        return sorted(int(name) for name in names if name.isdecimal())

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            value = json.loads(self._bucket.get(self._key(number)))
        except (FileNotFoundError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def _key(self, number: int) -> str:
        return f"{self._prefix}{number}.json"

    def _record(self, seconds: float) -> bytes:
        return to_json(
            {
                "format": FORMAT,
                "expires": time.time() + seconds if seconds else 0,
                "host": socket.gethostname(),
                "machine": _machine(),
                "pid": os.getpid(),
                "started": psutil.Process().create_time(),
            }
        )


def _over(record: dict[str, Any]) -> bool:
    """Whether a holder gave back, let its time pass, or is a dead process of this machine."""
    if float(record.get("expires", 0)) <= time.time():
        return True
    if record.get("machine") != _machine():
        return False
    try:
        began = psutil.Process(int(record["pid"])).create_time()
        return abs(began - float(record["started"])) > 1
    except (psutil.NoSuchProcess, KeyError, ValueError, TypeError):
        return True


def _machine() -> str:
    """Tells machines, and containers with processes of their own, apart."""
    boot = ""
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        boot += f"/{os.stat('/proc/self/ns/pid').st_ino}"
    return f"{boot}/{socket.gethostname()}"
