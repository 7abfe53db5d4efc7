"""Who calls: bearer tokens from a file, or the name in a client certificate.

Responsibility: from a call's metadata and transport to a subject. Does not know
what a subject may do.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from arriero.errors import InvalidArgument, Unauthenticated
from arriero.rpc import logs

__all__ = ["LOCAL", "TokenFile", "authenticate", "bearer_token", "caller"]

LOCAL = "local"
_log = logging.getLogger(__name__)

_SCHEME = "bearer "
_RECHECK_SECONDS = 1.0

_caller: ContextVar[str] = ContextVar("arriero_caller", default=LOCAL)


def caller() -> str:
    """Subject of the call that this task answers; `local` where nobody is asked."""
    return _caller.get()


def bearer_token(metadata: Iterable[tuple[str, Any]] | None) -> str | None:
    """The token of an `authorization: Bearer <token>` header."""
    for key, value in metadata or ():
        if key == "authorization" and isinstance(value, str):
            if value[: len(_SCHEME)].lower() == _SCHEME:
                return value[len(_SCHEME) :].strip()
            return None
    return None


class TokenFile:
    """Accepted tokens; the file is read again when it changes.

    A line holds `token subject`; empty lines and lines that start with `#` are
    left out. The subject goes to records and the audit log.

    Raises:
        InvalidArgument: the file cannot be read, holds no token, or a line is
            not of that form (the number is named, never the content).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._stat()
        self._subjects = self._read()
        self._checked = time.monotonic()

    def subject(self, token: str) -> str | None:
        """Whose token this is; None when it is nobody's.

        Digests of equal length are compared in constant time, all of them, so
        that the time tells neither a prefix nor a place in the file.
        """
        self._refresh()
        digest = _digest(token)
        found = None
        for known, subject in self._subjects.items():
            if hmac.compare_digest(known, digest):
                found = subject
        return found

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._checked < _RECHECK_SECONDS:
            return
        self._checked = now
        try:
            stamp = self._stat()
            if stamp != self._stamp:
                self._subjects, self._stamp = self._read(), stamp
        except InvalidArgument as error:
            # A half-written file must not lock everybody out: the old tokens hold.
            _log.warning("token file not read again: %s", error.message)

    def _stat(self) -> tuple[int, int, int]:
        try:
            stat = os.stat(self._path)
        except OSError as error:
            raise InvalidArgument.field("token_file", f"cannot be read: {error}") from error
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> dict[bytes, str]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument.field("token_file", f"cannot be read: {error}") from error
        subjects: dict[bytes, str] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2:
                raise InvalidArgument.field(
                    "token_file",
                    f"line {number} of {self._path} has {len(words)} words; "
                    "expected 'token subject'",
                )
            logs.add_secret(words[0])
            subjects[_digest(words[0])] = words[1]
        if not subjects:
            raise InvalidArgument.field(
                "token_file", f"{self._path} holds no token; expected lines 'token subject'"
            )
        return subjects


def authenticate(
    metadata: Iterable[tuple[str, Any]] | None,
    peer_identities: Iterable[bytes] | None,
    tokens: TokenFile | None,
) -> str:
    """The subject of a call, which `caller()` gives from then on.

    Raises:
        Unauthenticated: tokens are asked for, and none or a wrong one came.
    """
    if tokens is not None:
        token = bearer_token(metadata)
        if token is None:
            raise Unauthenticated(
                "no bearer token; send one as 'authorization: Bearer <token>' "
                "(clients: ARRIERO_TOKEN or ARRIERO_TOKEN_FILE)",
                reason="TOKEN_MISSING",
            )
        subject = tokens.subject(token)
        if subject is None:
            raise Unauthenticated(
                "the bearer token is not one that this server accepts; "
                "check ARRIERO_TOKEN or ARRIERO_TOKEN_FILE",
                reason="TOKEN_WRONG",
            )
    else:
        names = [name.decode("utf-8", errors="replace") for name in peer_identities or ()]
        subject = names[0] if names else LOCAL
    _caller.set(subject)
    return subject


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", errors="surrogatepass")).digest()
