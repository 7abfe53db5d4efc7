"""One writer per service.

Responsibility: an exclusive lock that dies with its process and names its
holder. Does not know what the holder writes. On network filesystems the lock
holds between processes of one host at least; across hosts the deployment
starts one replica of a service only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from arriero.errors import FailedPrecondition
from arriero.store.files import os_errors

log = logging.getLogger(__name__)


@contextlib.contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` for as long as the context lasts.

    Raises:
        FailedPrecondition: another process (or this one, elsewhere) holds it.
    """
    with os_errors(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
                log.warning("%s has no file locks: nothing guards against a second %s", path, what)
            elif error.errno in (errno.EAGAIN, errno.EACCES):
                holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
                raise FailedPrecondition(
                    f"another process (pid {holder}) is the {what} of this store; stop it first, "
                    "or use a store of its own",
                    reason="LOCKED",
                    metadata={"pid": holder},
                ) from error
            else:
                raise
        with contextlib.suppress(OSError):  # a full disk: gc must get its lock all the same
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)  # and with it the lock; the file stays, so that no two are ever made
