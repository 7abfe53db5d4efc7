"""What a kind of store does its own way, and how one on a filesystem does it.

Responsibility: the one interface between the store's rules (`publish`, `gc`,
`artifacts`) and the place where bytes lie. Does not know the rules.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from arriero.store import disk, lock
from arriero.store.files import (
    DIRECTORY_MODE,
    fsync_directory,
    is_temporary,
    remove_tree,
    safe_name,
    sha256_file,
    tree_files,
    tree_newest,
    tree_size,
)
from arriero.store.layout import Layout
from arriero.store.manifest import FileEntry, Manifest, check_digest
from arriero.store.objects import FileObjects, Objects
from arriero.store.sealing import rename, seal
from arriero.store.trash import Trash

_HEX = frozenset("0123456789abcdef")
_HEX_DIGITS = 64
# No writer of a small file takes so long between its first byte and its rename.
_WRITING_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Sealed:
    """Files that nobody changes any more, about to become an artifact.

    `place` is the backend's own: where it keeps them until then, and `release` ends
    what keeps them from gc.
    """

    source: Path
    entries: tuple[FileEntry, ...]
    place: str = ""
    release: Callable[[], object] = lambda: None


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a process that was killed left behind; `remove` does."""

    key: str
    size: int
    reason: str
    remove: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Staged:
    """A staging directory: key, when something was last written there (Unix s), bytes."""

    key: str
    newest: float
    size: int


class Backend(Protocol):
    """Where a store's bytes lie. Keys are relative paths, such as `artifacts/<hex>`."""

    url: str
    """As `Store.open` takes it; without credentials."""
    root: Path
    """A local directory; what jobs write lies in its `staging/`."""
    objects: Objects
    remote: bool
    """Whether the bytes lie elsewhere, and `root` is this machine's own."""

    # Artifacts

    def claim(self, digest: str) -> bool:
        """Whether an artifact's files are there, and stay if a root was written before."""

    def has(self, digest: str) -> bool:
        """Whether an artifact's files are there; gc may be about to remove them."""

    def digests(self) -> Iterator[str]:
        """Every artifact whose files are there, in no order."""

    def opener(self, manifest: Manifest) -> Callable[[], Path]:
        """What gives the local directory of an artifact's files, verified if it was fetched.

        As long as the opener lives, the directory that it gave stays.
        """

    def outliner(self, manifest: Manifest) -> Callable[[], Path]:
        """As `opener`, of what is known without the weights; see `Artifact.outline`."""

    def location(self, digest: str) -> str:
        """Where an artifact's files are, for people."""

    def size(self, digest: str) -> int:
        """Bytes of an artifact's files."""

    def problems(self, manifest: Manifest, on_bytes: Callable[[int], None]) -> list[str]:
        """What is not as the manifest says, a file each; reads every byte."""

    # Publishing

    def inside(self, source: Path) -> bool:
        """Whether a source lies in this store's staging. Raises `InvalidArgument`."""

    def is_source(self, source: Path) -> bool:
        """Whether there is something to publish."""

    def source_size(self, source: Path) -> int:
        """Bytes of a source's files."""

    def seal(self, source: Path, expected: Sequence[FileEntry] | None) -> Sealed:
        """Make a source's files durable and unchangeable, and say what they are.

        Raises:
            DataLoss: they are not what was expected; nothing was published.
            InvalidArgument: links, special files, or no files.
        """

    def place(self, sealed: Sealed, manifest: Manifest) -> None:
        """Make the artifact be there, at one instant; the source is gone afterwards."""

    def drop(self, source: Path) -> None:
        """Forget a source, since its artifact is there already."""

    # Garbage

    def remover(self) -> AbstractContextManager[None]:
        """Be the one who removes. Raises `FailedPrecondition`, naming the other."""

    def settle(self) -> None:
        """As the remover: finish what one that was killed had begun."""

    def doom(self, key: str) -> None:
        """Mark an artifact or staging directory; users may claim it from now on."""

    def spare(self, key: str) -> None:
        """Take the mark off again."""

    def take(self, key: str) -> bool:
        """Delete what is marked; False when somebody claimed it or it is gone."""

    def staged(self) -> Iterator[Staged]:
        """Every staging directory."""

    def leftovers(self, older: float) -> Iterator[Leftover]:
        """What was begun `older` seconds ago or before, and never finished."""

    # Places

    def staging(self, service: str, execution: str) -> Path:
        """The local directory `staging/<service>/<execution>/`, made if missing."""

    def keep(self, path: Path, *, hidden: bool = False) -> None:
        """Let a file or directory of the staging survive this machine, as it is now.

        Names that begin with a dot count as half-written, unless `hidden`.
        """

    def bring(self, path: Path) -> None:
        """Bring what was kept back, where it is not there or older."""

    def forget(self, path: Path) -> None:
        """Forget what was kept."""

    def preflight(self, needed: int) -> None:
        """Refuse work that will not fit. Raises `DiskFull`."""

    def check_quota(self, size: int, *, inside: bool) -> None:
        """Refuse to publish what makes, or has made, the store too large. Raises `DiskFull`."""

    def lock(self, name: str, what: str) -> AbstractContextManager[None]:
        """Be the only one of that name. Raises `FailedPrecondition`, naming the holder."""


class FileBackend:
    """A store in a directory, which several machines may share; see `Backend`.

    What is published lies where it was renamed to: nothing is ever copied or fetched.
    """

    remote = False

    def __init__(self, layout: Layout) -> None:
        self.root = layout.root
        self.url = layout.root.as_uri()
        self.objects: Objects = FileObjects(layout.root)
        self._layout = layout
        self._trash = Trash(layout)

    def claim(self, digest: str) -> bool:
        """See `Backend`."""
        return self._trash.claim(self._layout.artifact(digest))

    def has(self, digest: str) -> bool:
        """See `Backend`."""
        return self._layout.artifact(digest).is_dir()

    def digests(self) -> Iterator[str]:
        """See `Backend`."""
        for name in os.listdir(self.root / "artifacts"):
            if len(name) == _HEX_DIGITS and _HEX.issuperset(name):
                yield "sha256:" + name

    def opener(self, manifest: Manifest) -> Callable[[], Path]:
        """See `Backend`."""
        path = self._layout.artifact(manifest.digest)
        with contextlib.suppress(OSError):
            if path.stat().st_mode & 0o222:  # its publisher died between rename and chmod
                path.chmod(DIRECTORY_MODE)
        return lambda: path

    def outliner(self, manifest: Manifest) -> Callable[[], Path]:
        """See `Backend`. Here all is there, and nothing is read that is not looked at."""
        return self.opener(manifest)

    def location(self, digest: str) -> str:
        """See `Backend`."""
        return str(self._layout.artifact(digest))

    def size(self, digest: str) -> int:
        """See `Backend`."""
        return tree_size(self._layout.artifact(digest))

    def problems(self, manifest: Manifest, on_bytes: Callable[[int], None]) -> list[str]:
        """See `Backend`."""
        return tree_problems(self._layout.artifact(manifest.digest), manifest, on_bytes)

    def inside(self, source: Path) -> bool:
        """See `Backend`."""
        return self._layout.holds(source)

    def is_source(self, source: Path) -> bool:
        """See `Backend`."""
        return source.is_dir()

    def source_size(self, source: Path) -> int:
        """See `Backend`."""
        return tree_size(source)

    def seal(self, source: Path, expected: Sequence[FileEntry] | None) -> Sealed:
        """See `Backend`."""
        return Sealed(source, tuple(seal(source, expected, sha256_file)))

    def place(self, sealed: Sealed, manifest: Manifest) -> None:
        """See `Backend`. The manifest first, so that what is there can always be read."""
        source, final = sealed.source, self._layout.artifact(manifest.digest)
        self.objects.write(manifest_key(manifest.digest), manifest.to_bytes())
        mode = stat.S_IMODE(source.stat().st_mode)
        if not mode & stat.S_IWUSR:  # moving a directory rewrites its `..`
            source.chmod(mode | stat.S_IRWXU)
        while not rename(source, final):
            if self.claim(manifest.digest):  # somebody was faster
                remove_tree(source)
                return
        final.chmod(DIRECTORY_MODE)
        fsync_directory(final.parent)
        fsync_directory(source.parent)

    def drop(self, source: Path) -> None:
        """See `Backend`."""
        remove_tree(source)

    def remover(self) -> AbstractContextManager[None]:
        """See `Backend`."""
        return self._trash.remover()

    def settle(self) -> None:
        """See `Backend`."""
        self._trash.settle()

    def doom(self, key: str) -> None:
        """See `Backend`."""
        self._trash.doom(self.root / key)

    def spare(self, key: str) -> None:
        """See `Backend`."""
        self._trash.spare(self.root / key)

    def take(self, key: str) -> bool:
        """See `Backend`."""
        return self._trash.take(self.root / key)

    def staged(self) -> Iterator[Staged]:
        """See `Backend`."""
        for path in sorted((self.root / "staging").glob("*/*")):
            yield Staged(self._layout.relative(path), tree_newest(path), tree_size(path))

    def leftovers(self, older: float) -> Iterator[Leftover]:
        """See `Backend`."""
        before = time.time() - max(older, _WRITING_SECONDS)
        for name in ("manifests", "results", "roots", "leases", "waivers", "operations"):
            for path in (self.root / name).rglob(".*.tmp"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.lstat()
                    if is_temporary(path.name) and status.st_mtime <= before:
                        yield Leftover(
                            self._layout.relative(path),
                            status.st_size,
                            "left by a writer that was killed",
                            lambda path=path: path.unlink(missing_ok=True),  # type: ignore[misc]
                        )

    def staging(self, service: str, execution: str) -> Path:
        """See `Backend`."""
        parent = self._layout.under("staging", service, field="service")
        self._trash.claim(parent / safe_name(execution, field="execution"))
        return self._layout.under("staging", service, execution, field="execution")

    def keep(self, path: Path, *, hidden: bool = False) -> None:
        """Nothing to do: the staging is in the store."""

    def bring(self, path: Path) -> None:
        """Nothing to do: the staging is in the store."""

    def forget(self, path: Path) -> None:
        """Nothing to do: the staging is in the store."""

    def preflight(self, needed: int) -> None:
        """See `Backend`."""
        disk.preflight(self.root, needed)

    def check_quota(self, size: int, *, inside: bool) -> None:
        """See `Backend`."""
        limit = disk.quota()
        if limit is not None:
            disk.check_quota(limit, size, tree_size(self.root) - (size if inside else 0))

    def lock(self, name: str, what: str) -> AbstractContextManager[None]:
        """See `Backend`."""
        return lock.hold(self.root / "locks" / f"{name}.lock", what)


def manifest_key(digest: str) -> str:
    """The key of an artifact's manifest."""
    return f"manifests/{check_digest(digest)}.json"


def tree_problems(
    directory: Path, manifest: Manifest, on_bytes: Callable[[int], None]
) -> list[str]:
    """What in a directory is not as a manifest says, a file each."""
    wrong = []
    there = set(tree_files(directory))
    done = 0
    for entry in manifest.files:
        if entry.path not in there:
            wrong.append(f"{entry.path} is missing")
            continue
        there.discard(entry.path)
        size, sha256 = sha256_file(directory / entry.path, _from(done, on_bytes))
        done += size
        if size != entry.size:
            wrong.append(f"{entry.path} has {size} bytes, expected {entry.size}")
        elif sha256 != entry.sha256:
            wrong.append(f"{entry.path} has sha256 {sha256}, expected {entry.sha256}")
    return [*wrong, *(f"{name} does not belong" for name in sorted(there))]


def _from(start: int, on_bytes: Callable[[int], None]) -> Callable[[int], None]:
    """Tell bytes read of one file as bytes read of all."""
    return lambda read: on_bytes(start + read)
