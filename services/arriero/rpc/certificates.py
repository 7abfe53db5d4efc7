"""A server's certificate, read again when its files change.

Responsibility: from PEM files to what a TLS handshake shows, so that a renewed
certificate needs no restart. Does not know who renews it, nor any service.
"""

from __future__ import annotations

import logging
import os
import re
import ssl
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from arriero.errors import InvalidArgument
from arriero.settings import ServerSettings

__all__ = ["Certificate", "not_after", "server_credentials"]

_log = logging.getLogger(__name__)
# `Validity` of RFC 5280: two times, one after the other, as UTCTime or GeneralizedTime.
_TIME = rb"(?:\x17\x0d\d{12}Z|\x18\x0f\d{14}Z)"
_VALIDITY = re.compile(_TIME + rb"(" + _TIME + rb")")
_PEM = re.compile("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


class Certificate:
    """Certificate and key of a server, and the CA of its callers where they show one.

    Args:
        cert: PEM file with the chain.
        key: PEM file with its key.
        ca: PEM file of the CA that callers' certificates come from.

    Raises:
        InvalidArgument: a file cannot be read, is no PEM, or they do not belong together.
    """

    def __init__(self, cert: Path, key: Path, ca: Path | None = None) -> None:
        self.cert, self.key, self.ca = cert, key, ca
        self._lock = threading.Lock()  # handshakes are threads of gRPC's own
        self._stamp = self._stat()
        self._current = self._read()

    @property
    def current(self) -> grpc.ServerCertificateConfiguration:
        """What handshakes show now."""
        return self._current

    def renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """The certificate if it is another one than when this was last asked.

        Files that do not fit (half of them replaced yet) are left for the next time,
        and the old certificate holds.
        """
        with self._lock:
            try:
                stamp = self._stat()
                if stamp == self._stamp:
                    return None
                found = self._read()
                if self._stat() != stamp:
                    return None
            except InvalidArgument as error:
                _log.warning("certificate not read again: %s", error.message)
                return None
            self._stamp, self._current = stamp, found
            _log.info("certificate read again from %s", self.cert)
            return found

    def _stat(self) -> tuple[tuple[int, int, int], ...]:
        stamps = []
        for path in (self.cert, self.key, self.ca):
            if path is not None:
                try:
                    stat = os.stat(path)
                except OSError as error:
                    raise InvalidArgument.field(
                        self._field(path), f"cannot be read: {error}"
                    ) from error
                stamps.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
        return tuple(stamps)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        cert, key = self._pem(self.cert), self._pem(self.key)
        ca = self._pem(self.ca) if self.ca else None
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.cert, self.key)
        except (OSError, ssl.SSLError) as error:
            raise InvalidArgument.field(
                "tls_cert", f"{self.cert} and {self.key} do not belong together: {error}"
            ) from error
        return grpc.ssl_server_certificate_configuration([(key, cert)], ca)

    def _pem(self, path: Path) -> bytes:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InvalidArgument.field(self._field(path), f"cannot be read: {error}") from error
        if b"-----BEGIN" not in data:
            raise InvalidArgument.field(self._field(path), f"{path} is not a PEM file")
        return data

    def _field(self, path: Path) -> str:
        return {self.ca: "tls_client_ca", self.cert: "tls_cert", self.key: "tls_key"}[path]


def not_after(path: Path) -> float | None:
    """When the first certificate of a PEM file ends, in Unix seconds; None if it can't be read."""
    try:
        first = _PEM.search(path.read_text(encoding="ascii"))
        found = first and _VALIDITY.search(ssl.PEM_cert_to_DER_cert(first[0]))
    except (OSError, ValueError):
        return None
    if not found:
        return None
    text = found[1][2:].decode()
    if len(text) == len("YYMMDDhhmmssZ"):
        text = ("19" if text[:2] >= "50" else "20") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def server_credentials(settings: ServerSettings) -> grpc.ServerCredentials | None:
    """Credentials of a gRPC server; None for plain text.

    Raises:
        InvalidArgument: one file without the other, or as `Certificate`.
    """
    if settings.tls_cert is None and settings.tls_key is None:
        if settings.tls_client_ca is not None:
            raise InvalidArgument.field(
                "tls_client_ca", "needs the server's own certificate and key as well"
            )
        return None
    if settings.tls_cert is None or settings.tls_key is None:
        missing = "tls_cert" if settings.tls_cert is None else "tls_key"
        raise InvalidArgument.field(missing, "TLS needs both a certificate and its key")
    certificate = Certificate(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    # None, for no change, is not in the stubs.
    renewed: Any = certificate.renewed
    return grpc.dynamic_ssl_server_credentials(
        certificate.current,
        renewed,
        require_client_authentication=settings.tls_client_ca is not None,
    )
