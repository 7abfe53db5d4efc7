"""Artifacts as they lie in the store: found by digest, read, checked.

Responsibility: from a digest to a manifest and a directory of files. Does not
know tags, nor how an artifact came to be there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from arriero.errors import DataLoss, InvalidArgument, NotFound
from arriero.gates import GateResult
from arriero.store.files import DIRECTORY_MODE, safe_relative, sha256_file, tree_files
from arriero.store.layout import Layout
from arriero.store.manifest import Manifest
from arriero.store.trash import Trash
from arriero.store.waivers import Waiver, Waivers, applied

_HEX = frozenset("0123456789abcdef")
_HEX_DIGITS = 64
_SHORTEST_PREFIX = 8
_NAMES_SHOWN = 10


@dataclass(frozen=True)
class Artifact:
    """A complete artifact.

    Attributes:
        digest: `sha256:...`.
        path: directory of its files; read-only, may be memory-mapped in place.
        quarantined: a gate failed that nobody waived.
        waivers: of its failed gates, oldest first.
    """

    digest: str
    manifest: Manifest
    path: Path
    quarantined: bool
    waivers: tuple[Waiver, ...] = ()

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

    def __init__(self, layout: Layout, waivers: Waivers, trash: Trash) -> None:
        self._layout = layout
        self._trash = trash
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
        path = self._layout.manifest(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise NotFound(f"no artifact {digest} in the store at {self._layout.root}") from None
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
        path = self._layout.artifact(digest)
        there = self._trash.claim(path) if claim else path.is_dir()
        manifest = self.manifest(digest)
        if not there:
            raise NotFound(
                f"the files of {manifest.kind} {manifest.name} ({digest}) are not in the store: "
                "collected as garbage, or never completely published; its manifest is kept: run "
                "again what made it",
                reason="ARTIFACT_COLLECTED",
            )
        with contextlib.suppress(OSError):
            if path.stat().st_mode & 0o222:  # its publisher died between rename and chmod
                path.chmod(DIRECTORY_MODE)
        waivers = tuple(self._waivers.of(digest)) if manifest.quarantined else ()
        left = set(manifest.failed_gates) - {waiver.gate for waiver in waivers}
        return Artifact(digest, manifest, path, bool(left), waivers)

    def claim(self, digest: str) -> bool:
        """Whether an artifact is there, and will stay if a root was written before."""
        return self._trash.claim(self._layout.artifact(digest))

    def touch(self, digest: str) -> None:
        """Make an artifact young again for gc; look whether it is there afterwards."""
        with contextlib.suppress(OSError):  # not there, not ours, or read-only
            os.utime(self._layout.manifest(digest))

    def age_ns(self, digest: str) -> int | None:
        """When it was last published or touched (Unix ns); None without a manifest."""
        try:
            return self._layout.manifest(digest).stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def digests(self) -> Iterator[str]:
        """Every artifact whose files are there, in no order."""
        for name in os.listdir(self._layout.root / "artifacts"):
            if len(name) == _HEX_DIGITS and _HEX.issuperset(name):
                yield "sha256:" + name

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
        names = os.listdir(self._layout.root / "manifests")
        found = sorted(
            name.removesuffix(".json")
            for name in names
            if name.startswith(prefix) and name.endswith(".json")
        )
        if not found:
            raise NotFound(f"no artifact {text} in the store at {self._layout.root}")
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
                f"{artifact.path} from a backup, or make the artifact again"
            )

    def problems(
        self, digest: str, on_bytes: Callable[[int], None] = lambda done: None
    ) -> list[str]:
        """What is not as the manifest says, a file each; as `verify`.

        Raises:
            NotFound: not there. DataLoss: the manifest itself is damaged.
        """
        self._cache.pop(digest, None)  # the manifest, too, is read from the disk
        artifact = self.get(digest)
        wrong = []
        there = set(tree_files(artifact.path))
        done = 0
        for entry in artifact.manifest.files:
            if entry.path not in there:
                wrong.append(f"{entry.path} is missing")
                continue
            there.discard(entry.path)
            size, sha256 = sha256_file(artifact.path / entry.path, _from(done, on_bytes))
            done += size
            if size != entry.size:
                wrong.append(f"{entry.path} has {size} bytes, expected {entry.size}")
            elif sha256 != entry.sha256:
                wrong.append(f"{entry.path} has sha256 {sha256}, expected {entry.sha256}")
        return [*wrong, *(f"{name} does not belong" for name in sorted(there))]


def _from(start: int, on_bytes: Callable[[int], None]) -> Callable[[int], None]:
    """Tell bytes read of one file as bytes read of all."""
    return lambda read: on_bytes(start + read)
