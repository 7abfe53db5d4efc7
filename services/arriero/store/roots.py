"""Roots: what gc keeps because somebody said so, for good or for a while.

Responsibility: pins (`roots/<owner>/<name>.json`) and leases (`leases/*.json`).
Does not know what is collected, or when.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from arriero import refs
from arriero.errors import Aborted, InvalidArgument
from arriero.store.files import parse_json, safe_name, safe_relative, to_json
from arriero.store.manifest import FORMAT, check_digest
from arriero.store.objects import Objects


@dataclass(frozen=True, slots=True)
class Pin:
    """Digests that an owner's record keeps; `expires` in Unix seconds, None for never."""

    owner: str
    name: str
    digests: tuple[str, ...]
    expires: float | None


@dataclass
class Lease:
    """Keeps digests and staging paths from gc until released or expired.

    A context manager that releases. Attributes: `digests`, `paths` (relative to
    the store's root), `expires` in Unix seconds, `key` of its record.
    """

    owner: str
    digests: tuple[str, ...]
    paths: tuple[str, ...]
    ttl: float
    expires: float
    _objects: Objects
    key: str

    def renew(self, ttl: float | None = None) -> None:
        """Hold on for another `ttl` seconds from now.

        Raises:
            Aborted: expired and forgotten; what it held may be gone.
        """
        self.ttl = self.ttl if ttl is None else ttl
        if self._objects.time_ns(self.key) is None:
            raise Aborted(
                f"the lease of {self.owner} had expired and was dropped; look again whether what "
                "it held is still in the store"
            )
        self._write()

    def release(self) -> None:
        """Let go; more than once is fine."""
        self._objects.delete(self.key)

    def _write(self) -> None:
        self.expires = time.time() + self.ttl
        record = {
            "format": FORMAT,
            "owner": self.owner,
            "digests": list(self.digests),
            "paths": list(self.paths),
            "expires": self.expires,
            "pid": os.getpid(),
        }
        # After a loss of power whoever held it is gone as well.
        self._objects.write(self.key, to_json(record), durable=False)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Roots:
    """The pins and leases of one store."""

    def __init__(self, objects: Objects, root: Path) -> None:
        self._objects = objects
        self._root = root

    def pin(self, owner: str, name: str, digests: Sequence[str], expires: float | None) -> None:
        """Keep digests; replaces the pin of that owner and name.

        Raises:
            InvalidArgument: names or digests that are none.
        """
        for digest in digests:
            check_digest(digest, field="digests")
        record = {"format": FORMAT, "digests": list(digests), "expires": expires}
        self._objects.write(_pin_key(owner, name), to_json(record))

    def unpin(self, owner: str, name: str) -> None:
        """Forget a pin; none is fine."""
        self._objects.delete(_pin_key(owner, name))

    def pins(self) -> list[Pin]:
        """Every pin, expired ones too.

        Raises:
            DataLoss, FailedPrecondition: an unreadable record.
        """
        found = []
        for record in self._objects.find("roots/"):
            value = self._read(record.key, "the pin")
            if value is not None:
                _, owner, name = record.key.split("/", 2)
                digests = tuple(value["digests"])
                found.append(Pin(owner, name.removesuffix(".json"), digests, value["expires"]))
        return found

    def lease(self, owner: str, items: Iterable[str | Path], ttl: float) -> Lease:
        """Keep digests and staging paths for `ttl` seconds.

        Args:
            items: digests, and paths inside the store (absolute, or relative to
                its root).

        Raises:
            InvalidArgument: neither a digest nor a path inside the store.
        """
        digests: list[str] = []
        paths: list[str] = []
        for item in items:
            if isinstance(item, str) and refs.is_digest(item):
                digests.append(item)
            else:
                paths.append(self._inside(Path(item)))
        owner = safe_name(owner, field="owner")
        key = f"leases/{owner}-{secrets.token_hex(8)}.json"
        lease = Lease(owner, tuple(digests), tuple(paths), ttl, 0.0, self._objects, key)
        lease._write()
        return lease

    def leases(self) -> Iterator[tuple[str, Lease]]:
        """Every lease with its key, expired ones too.

        Raises:
            DataLoss, FailedPrecondition: an unreadable record.
        """
        for record in self._objects.find("leases/"):
            value = self._read(record.key, "the lease")
            if value is not None:
                yield (
                    record.key,
                    Lease(
                        value["owner"],
                        tuple(value["digests"]),
                        tuple(value["paths"]),
                        0.0,
                        value["expires"],
                        self._objects,
                        record.key,
                    ),
                )

    def _inside(self, path: Path) -> str:
        if path.is_absolute():
            try:
                path = path.relative_to(self._root)
            except ValueError:
                raise InvalidArgument.field(
                    "paths", f"{path} is outside of the store at {self._root}"
                ) from None
        return str(safe_relative(path.as_posix(), field="paths"))

    def _read(self, key: str, what: str) -> dict[str, Any] | None:
        try:
            data = self._objects.read(key)
        except FileNotFoundError:
            return None  # released meanwhile
        return parse_json(data, FORMAT, f"{what} {self._objects.shown(key)}")


def _pin_key(owner: str, name: str) -> str:
    return f"roots/{safe_name(owner, field='owner')}/{safe_name(name, field='name')}.json"
