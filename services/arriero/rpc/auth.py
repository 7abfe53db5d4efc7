"""Who calls: bearer tokens from a file, or the name in a client certificate.

Responsibility: from a call's metadata and transport to a subject and its role.
Does not know what a role may do.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import time
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.errors import InvalidArgument, Unauthenticated
from arriero.rpc import logs, roles
from arriero.rpc.roles import Role

__all__ = ["LOCAL", "Identity", "TokenFile", "authenticate", "bearer_token", "caller", "require"]

LOCAL = "local"
_log = logging.getLogger(__name__)

_SCHEME = "bearer "
_RECHECK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Identity:
    """Who somebody is, and as what."""

    subject: str
    role: Role = Role.ADMIN


_NOBODY_ASKED = Identity(LOCAL)
_caller: ContextVar[Identity] = ContextVar("arriero_caller", default=_NOBODY_ASKED)


def caller() -> str:
    """Subject of the call that this task answers; `local` where nobody is asked."""
    return _caller.get().subject


def require(least: Role, what: str) -> None:
    """Refuse a caller for what a request holds, beyond what its method needs.

    Raises:
        PermissionDenied: the caller's role is too low.
    """
    identity = _caller.get()
    roles.check(identity.role, least, identity.subject, what)


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

    A line holds `token subject [role]`, without a role an admin's; empty lines
    and lines that start with `#` are left out. The subject goes to records and
    the audit log.

    Raises:
        InvalidArgument: the file cannot be read, holds no token, or a line is
            not of that form (the number is named, never the content).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._stat()
        self._known = self._read()
        self._checked = time.monotonic()

    def identity(self, token: str) -> Identity | None:
        """Whose token this is; None when it is nobody's.

        Digests of equal length are compared in constant time, all of them, so
        that the time tells neither a prefix nor a place in the file.
        """
        self._refresh()
        digest = _digest(token)
        found = None
        for known, identity in self._known.items():
            if hmac.compare_digest(known, digest):
                found = identity
        return found

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._checked < _RECHECK_SECONDS:
            return
        self._checked = now
        try:
            stamp = self._stat()
            if stamp != self._stamp:
                self._known, self._stamp = self._read(), stamp
        except InvalidArgument as error:
            # A half-written file must not lock everybody out: the old tokens hold.
            _log.warning("token file not read again: %s", error.message)

    def _stat(self) -> tuple[int, int, int]:
        try:
            stat = os.stat(self._path)
        except OSError as error:
            raise InvalidArgument.field("token_file", f"cannot be read: {error}") from error
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> dict[bytes, Identity]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidArgument.field("token_file", f"cannot be read: {error}") from error
        known: dict[bytes, Identity] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            known[_digest(words[0])] = self._line(number, words)
            logs.add_secret(words[0])
        if not known:
            raise InvalidArgument.field(
                "token_file", f"{self._path} holds no token; expected lines 'token subject [role]'"
            )
        return known

    def _line(self, number: int, words: list[str]) -> Identity:
        expected = "expected 'token subject [role]'"
        if not 2 <= len(words) <= 3:
            raise InvalidArgument.field(
                "token_file", f"line {number} of {self._path} has {len(words)} words; {expected}"
            )
        if len(words) == 2:
            return Identity(words[1])
        try:
            return Identity(words[1], roles.parse(words[2]))
        except InvalidArgument:  # which would show the word; it may be a token in the wrong place
            names = ", ".join(role.word for role in Role)
            raise InvalidArgument.field(
                "token_file",
                f"line {number} of {self._path} ends with no role; {expected} with a role "
                f"of {names}",
            ) from None


def authenticate(
    metadata: Iterable[tuple[str, Any]] | None,
    peer_identities: Iterable[bytes] | None,
    tokens: TokenFile | None,
) -> Identity:
    """Who calls, which `caller()` gives from then on.

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
        identity = tokens.identity(token)
        if identity is None:
            raise Unauthenticated(
                "the bearer token is not one that this server accepts; "
                "check ARRIERO_TOKEN or ARRIERO_TOKEN_FILE",
                reason="TOKEN_WRONG",
            )
    else:
        names = [name.decode("utf-8", errors="replace") for name in peer_identities or ()]
        identity = Identity(names[0] if names else LOCAL)
    _caller.set(identity)
    return identity


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", errors="surrogatepass")).digest()
