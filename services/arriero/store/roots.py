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
from arriero.store.files import read_json, safe_name, safe_relative, to_json, write_atomic
from arriero.store.layout import Layout
from arriero.store.manifest import FORMAT, check_digest


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
    the store's root), `expires` in Unix seconds.
    """

    owner: str
    digests: tuple[str, ...]
    paths: tuple[str, ...]
    ttl: float
    expires: float
    _file: Path

    def renew(self, ttl: float | None = None) -> None:
        """Hold on for another `ttl` seconds from now.

        Raises:
            Aborted: expired and forgotten; what it held may be gone.
        """
        self.ttl = self.ttl if ttl is None else ttl
        if not self._file.exists():
            raise Aborted(
                f"the lease of {self.owner} had expired and was dropped; look again whether what "
                "it held is still in the store"
            )
        self._write()

    def release(self) -> None:
        """Let go; more than once is fine."""
        self._file.unlink(missing_ok=True)

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
        write_atomic(self._file, to_json(record), durable=False)

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

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def pin(self, owner: str, name: str, digests: Sequence[str], expires: float | None) -> None:
        """Keep digests; replaces the pin of that owner and name.

        Raises:
            InvalidArgument: names or digests that are none.
        """
        for digest in digests:
            check_digest(digest, field="digests")
        directory = self._layout.under("roots", owner, field="owner")
        record = {"format": FORMAT, "digests": list(digests), "expires": expires}
        write_atomic(directory / f"{safe_name(name, field='name')}.json", to_json(record))

    def unpin(self, owner: str, name: str) -> None:
        """Forget a pin; none is fine."""
        directory = self._layout.root / "roots" / safe_name(owner, field="owner")
        (directory / f"{safe_name(name, field='name')}.json").unlink(missing_ok=True)

    def pins(self) -> list[Pin]:
        """Every pin, expired ones too.

        Raises:
            DataLoss, FailedPrecondition: an unreadable record.
        """
        found = []
        for path in sorted((self._layout.root / "roots").glob("*/[!.]*.json")):
            value = _read(path, "the pin")
            if value is not None:
                digests = tuple(value["digests"])
                found.append(Pin(path.parent.name, path.stem, digests, value["expires"]))
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
        file = self._layout.root / "leases" / f"{owner}-{secrets.token_hex(8)}.json"
        lease = Lease(owner, tuple(digests), tuple(paths), ttl, 0.0, file)
        lease._write()
        return lease

    def leases(self) -> Iterator[tuple[Path, Lease]]:
        """Every lease with its file, expired ones too.

        Raises:
            DataLoss, FailedPrecondition: an unreadable record.
        """
        for path in sorted((self._layout.root / "leases").glob("[!.]*.json")):
            value = _read(path, "the lease")
            if value is not None:
                yield (
                    path,
                    Lease(
                        value["owner"],
                        tuple(value["digests"]),
                        tuple(value["paths"]),
                        0.0,
                        value["expires"],
                        path,
                    ),
                )

    def _inside(self, path: Path) -> str:
        if path.is_absolute():
            try:
                path = path.relative_to(self._layout.root)
            except ValueError:
                raise InvalidArgument.field(
                    "paths", f"{path} is outside of the store at {self._layout.root}"
                ) from None
        return str(safe_relative(path.as_posix(), field="paths"))


def _read(path: Path, what: str) -> dict[str, Any] | None:
    try:
        return read_json(path, FORMAT, what)
    except FileNotFoundError:
        return None  # released meanwhile
