"""Artifacts as they lie in the store: found by digest, read, checked.

Responsibility: from a digest to a manifest and a directory of files. Does not
know tags, nor how an artifact came to be there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from arriero.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from arriero.gates import GateResult
from arriero.store.backend import Backend, manifest_key
from arriero.store.files import safe_relative
from arriero.store.manifest import Manifest
from arriero.store.waivers import Waiver, Waivers, applied

log = logging.getLogger(__name__)

_HEX = frozenset("0123456789abcdef")
_HEX_DIGITS = 64
_SHORTEST_PREFIX = 8
_NAMES_SHOWN = 10


@dataclass(frozen=True)
class Artifact:
    """A complete artifact.

    Attributes:
        digest: `sha256:...`.
        location: where its files are, for people.
        quarantined: a gate failed that nobody waived.
        waivers: of its failed gates, oldest first.
    """

    digest: str
    manifest: Manifest
    location: str
    quarantined: bool
    waivers: tuple[Waiver, ...] = ()
    _open: Callable[[], Path] = field(kw_only=True, repr=False, compare=False)
    _outline: Callable[[], Path] = field(kw_only=True, repr=False, compare=False)

    @property
    def path(self) -> Path:
        """Directory of its files; read-only, may be memory-mapped in place.

        A store elsewhere fetches them when they are first asked for, and verifies
        them; they stay on this machine as long as somebody holds this object.

        Raises:
            NotFound, DataLoss, DiskFull, Unavailable: they can't be fetched.
        """
        return self._open()

    @property
    def outline(self) -> Path:
        """A directory to look at the artifact without its weights.

        Small files are whole. Safetensors files have their headers and their sizes; do
        not read their tensors. A store elsewhere brings no more than that, unless it is
        here already, and leaves other files out that are large. It stays as `path` does.

        Raises:
            NotFound, DataLoss, DiskFull, Unavailable: it can't be fetched.
        """
        return self._outline()

    @property
    def gates(self) -> tuple[GateResult, ...]:
        """What was proved about it, waivers applied."""
        return applied(self.manifest.gates, self.waivers)

    def file(self, relative: str) -> Path:
        """The path of one of its files.

        Raises:
            InvalidArgument: a path that climbs out.
            NotFound: the artifact has no such file.
        """
        wanted = str(safe_relative(relative))
        if all(entry.path != wanted for entry in self.manifest.files):
            names = [entry.path for entry in self.manifest.files]
            shown = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if names[_NAMES_SHOWN:] else "")
            raise NotFound(
                f"{self.manifest.kind} {self.digest} has no file {wanted!r}; it has: {shown}"
            )
        return self.path / wanted


class Artifacts:
    """The artifacts of one store."""

    def __init__(self, backend: Backend, waivers: Waivers) -> None:
        self._backend = backend
        self._waivers = waivers
        self._cache: dict[str, Manifest] = {}  # manifests never change

    def manifest(self, digest: str) -> Manifest:
        """The manifest of an artifact, collected or not.

        Raises:
            NotFound: the store never had it.
            DataLoss: damaged. FailedPrecondition: newer format.
        """
        known = self._cache.get(digest)
        if known is not None:
            return known
        try:
            data = self._backend.objects.read(manifest_key(digest))
        except FileNotFoundError:
            raise NotFound(f"no artifact {digest} in the store at {self._where}") from None
        manifest = self._cache[digest] = Manifest.from_bytes(data, digest)
        return manifest

    def get(self, digest: str, *, claim: bool = True) -> Artifact:
        """A complete artifact.

        Args:
            claim: take it from a gc that is about to remove it.

        Raises:
            NotFound: not there, or its files were collected.
            DataLoss: damaged manifest. FailedPrecondition: newer format.
        """
        there = self._backend.claim(digest) if claim else self._backend.has(digest)
        manifest = self.manifest(digest)
        if not there:
            raise NotFound(
                f"the files of {manifest.kind} {manifest.name} ({digest}) are not in the store: "
                "collected as garbage, or never completely published; its manifest is kept: run "
                "again what made it",
                reason="ARTIFACT_COLLECTED",
            )
        return self._artifact(manifest)

    def all(self) -> Iterator[Artifact]:
        """Every artifact whose files are there; what can't be read is left out, and logged."""
        for digest in self._backend.digests():
            try:
                yield self._artifact(self.manifest(digest))
            except NotFound:
                continue  # files without a manifest
            except (DataLoss, FailedPrecondition, InvalidArgument) as error:
                log.warning("artifact %s is left out: %s", digest, error)

    def _artifact(self, manifest: Manifest) -> Artifact:
        digest = manifest.digest
        waivers = tuple(self._waivers.of(digest)) if manifest.quarantined else ()
        left = set(manifest.failed_gates) - {waiver.gate for waiver in waivers}
        return Artifact(
            digest,
            manifest,
            self._backend.location(digest),
            bool(left),
            waivers,
            _open=self._backend.opener(manifest),
            _outline=self._backend.outliner(manifest),
        )

    def claim(self, digest: str) -> bool:
        """Whether an artifact is there, and will stay if a root was written before."""
        return self._backend.claim(digest)

    def touch(self, digest: str) -> None:
        """Make an artifact young again for gc; look whether it is there afterwards."""
        self._backend.objects.touch(manifest_key(digest))

    def age_ns(self, digest: str) -> int | None:
        """When it was last published or touched (Unix ns); None without a manifest."""
        return self._backend.objects.time_ns(manifest_key(digest))

    def digests(self) -> Iterator[str]:
        """Every artifact whose files are there, in no order."""
        return self._backend.digests()

    def by_prefix(self, text: str) -> str | None:
        """The one digest that begins with this, or None where `text` is no prefix.

        Raises:
            NotFound: none. InvalidArgument: several, or too short.
        """
        prefix = text.removeprefix("sha256:")
        if not _HEX.issuperset(prefix) or len(prefix) > _HEX_DIGITS or not prefix:
            return None
        if len(prefix) < _SHORTEST_PREFIX:
            if text == prefix:
                return None
            raise InvalidArgument.field(
                "ref", f"{text!r} is too short; expected at least {_SHORTEST_PREFIX} digits"
            )
        names = (
            record.key.removeprefix("manifests/").removesuffix(".json")
            for record in self._backend.objects.find("manifests/")
        )
        found = sorted(name for name in names if name.startswith(prefix))
        if not found:
            raise NotFound(f"no artifact {text} in the store at {self._where}")
        if len(found) > 1:
            raise InvalidArgument.field(
                "ref",
                f"{text!r} is ambiguous: {', '.join(hex_[:16] for hex_ in found[:5])}; "
                "write more digits",
            )
        return "sha256:" + found[0]

    def verify(self, digest: str, on_bytes: Callable[[int], None] = lambda done: None) -> None:
        """Read every byte of an artifact, and of its manifest, again.

        Args:
            digest: of the artifact.
            on_bytes: called with the bytes read so far; what it raises ends it.

        Raises:
            NotFound: not there.
            DataLoss: changed, missing or additional files, all named; see `problems`.
        """
        wrong = self.problems(digest, on_bytes)
        if wrong:
            artifact = self.get(digest)
            raise DataLoss(
                f"{artifact.manifest.kind} {digest} is damaged: {'; '.join(wrong)}; restore "
                f"{artifact.location} from a backup, or make the artifact again"
            )

    def problems(
        self, digest: str, on_bytes: Callable[[int], None] = lambda done: None
    ) -> list[str]:
        """What is not as the manifest says, a file each; as `verify`.

        Raises:
            NotFound: not there. DataLoss: the manifest itself is damaged.
        """
        self._cache.pop(digest, None)  # the manifest, too, is read from the disk
        return self._backend.problems(self.get(digest).manifest, on_bytes)

    @property
    def _where(self) -> str:
        return self._backend.objects.shown("").rstrip("/")
