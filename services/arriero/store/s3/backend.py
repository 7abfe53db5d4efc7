"""The backend of a store in S3.

Responsibility: `store.backend.Backend` over a bucket and this machine's cache. Does
not know the rules that it serves.

Published bytes are never changed nor shared: each publication has a prefix of its
own, so that deleting one can't take a file from another (S3 deletes without
asking whether an object is still the one that was meant).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from arriero.errors import DataLoss, FailedPrecondition, NotFound
from arriero.settings import S3Settings
from arriero.store import disk
from arriero.store.backend import Leftover, Sealed, Staged, manifest_key
from arriero.store.files import (
    free_bytes,
    now,
    parse_json,
    remove_tree,
    safe_name,
    to_json,
    tree_files,
    tree_newest,
    tree_size,
)
from arriero.store.layout import Layout
from arriero.store.manifest import FORMAT, FileEntry, Manifest, check_digest
from arriero.store.objects import Objects
from arriero.store.roots import Roots
from arriero.store.s3 import lease, mirror, outline, transfer
from arriero.store.s3.bucket import Bucket
from arriero.store.s3.cache import DIRECTORIES, Cache, Use
from arriero.store.s3.objects import S3Objects
from arriero.store.s3.places import Places
from arriero.store.s3.progress import Progress
from arriero.store.sealing import checked, compare, seal
from arriero.store.trash import Trash

# How long a publisher that was killed keeps what it uploaded from gc.
_LEASE = 3600.0


def open_backend(url: str, settings: S3Settings | None = None) -> S3Backend:
    """The backend of `s3://bucket/prefix`; a new store is made where there is none.

    Raises:
        InvalidArgument: no such URL. NotFound: no such bucket.
        Unauthenticated, PermissionDenied, Unavailable: as the server says.
        FailedPrecondition: a newer format, or a server without conditional puts.
        DataLoss: a damaged `format.json`.
    """
    settings = settings or S3Settings.from_env()
    bucket = Bucket(url, settings.endpoint_url)
    name = f"{bucket.url}\0{settings.endpoint_url or ''}"
    root = settings.cache / hashlib.sha256(name.encode()).hexdigest()[:16]
    _check_format(bucket)
    return S3Backend(bucket, Layout.open(root, DIRECTORIES), settings.cache_bytes)


def _check_format(bucket: Bucket) -> None:
    what = f"the store {bucket.shown('format.json')}"
    try:
        parse_json(bucket.get("format.json"), FORMAT, what)
    except FileNotFoundError:
        record = to_json({"format": FORMAT, "created": now()})
        bucket.create("format.json", record)
        # Tags and locks rest on it, and some servers ignore what they don't know.
        if bucket.create("format.json", to_json({"format": FORMAT})):
            bucket.delete(["format.json"])
            raise FailedPrecondition(
                f"the server of {bucket.url} ignores If-None-Match: it replaced an object that "
                "was to be made only if it is not there; expected one with conditional puts",
                reason="NO_CONDITIONAL_PUT",
            ) from None
        parse_json(bucket.get("format.json"), FORMAT, what)


@contextlib.contextmanager
def _missing_is_loss() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DataLoss(
            f"{error} is gone: somebody changed the bucket behind the store's back; "
            "restore it, or make the artifact again"
        ) from error


class S3Backend:
    """A store in a bucket; see `Backend`."""

    remote = True

    def __init__(self, bucket: Bucket, layout: Layout, limit: int | None) -> None:
        self.url = bucket.url
        self.root = layout.root
        self.objects: Objects = S3Objects(bucket)
        self._bucket = bucket
        self._layout = layout
        self._cache = Cache(layout.root, limit)
        self._trash = Trash(layout)
        self._places = Places(bucket)
        self._uploaded: mirror.Uploaded = {}

    # Artifacts

    def claim(self, digest: str) -> bool:
        """See `Backend`."""
        return self._places.claim(check_digest(digest)) is not None

    def has(self, digest: str) -> bool:
        """See `Backend`."""
        return bool(self._places.there(check_digest(digest)))

    def digests(self) -> Iterator[str]:
        """See `Backend`."""
        for name in self._places.all():
            yield "sha256:" + name

    def opener(self, manifest: Manifest) -> Callable[[], Path]:
        """See `Backend`. Nothing is fetched before it is called."""
        made: list[Use] = []
        one = threading.Lock()

        def open_() -> Path:
            with one:
                if not made:
                    made.append(self._fetched(manifest))
                return made[0].path

        return open_

    def outliner(self, manifest: Manifest) -> Callable[[], Path]:
        """See `Backend`. Kept as long as the outliner lives, and not beside the whole."""
        name = check_digest(manifest.digest)
        made: list[Use | TemporaryDirectory[str]] = []
        one = threading.Lock()

        def open_() -> Path:
            with one:
                if not made:
                    made.append(self._cache.known(name) or self._outlined(manifest))
                [there] = made
                return there.path if isinstance(there, Use) else Path(there.name, name)

        return open_

    def _outlined(self, manifest: Manifest) -> TemporaryDirectory[str]:
        made = TemporaryDirectory(prefix="arriero-", ignore_cleanup_errors=True)
        directory = Path(made.name, check_digest(manifest.digest))
        with _missing_is_loss():
            outline.fill(self._bucket, manifest, self._place(manifest), directory)
        return made

    def _fetched(self, manifest: Manifest) -> Use:
        name = check_digest(manifest.digest)

        def wanted(directory: Path, place: str = "") -> list[transfer.Wanted]:
            return [
                transfer.Wanted(place + e.path, directory / e.path, e.size, e.sha256)
                for e in manifest.files
            ]

        def fill(directory: Path) -> None:
            with _missing_is_loss():
                files = wanted(directory, self._place(manifest))
                transfer.fetch(self._bucket, files, Progress(manifest).add)

        return self._cache.get(
            name, manifest.size, lambda directory: transfer.reserve(wanted(directory)), fill
        )

    def _place(self, manifest: Manifest) -> str:
        """Where in the bucket an artifact's files are."""
        found = self._places.there(check_digest(manifest.digest))
        if not found:
            raise NotFound(
                f"the files of {manifest.kind} {manifest.name} ({manifest.digest}) are not in the "
                "store: collected as garbage while nothing held them; run again what made it",
                reason="ARTIFACT_COLLECTED",
            )
        return f"files/{found[0]}/"

    def location(self, digest: str) -> str:
        """See `Backend`."""
        return self._bucket.shown(manifest_key(digest))

    def size(self, digest: str) -> int:
        """See `Backend`."""
        places = self._places.there(check_digest(digest))
        return sum(f.size for place in places for f in self._bucket.find(f"files/{place}/"))

    def problems(self, manifest: Manifest, on_bytes: Callable[[int], None]) -> list[str]:
        """See `Backend`. Reads the bucket; a copy in the cache that differs is thrown away."""
        wrong: list[str] = []
        done = 0
        place = self._place(manifest)
        there = {f.key.removeprefix(place): f.size for f in self._bucket.find(place)}
        for entry in manifest.files:
            size = there.pop(entry.path, None)
            if size is None:
                wrong.append(f"{entry.path} is missing")
                continue
            hasher = hashlib.sha256()
            for chunk in transfer.chunks(self._bucket, place + entry.path, size):
                hasher.update(chunk)
                done += len(chunk)
                on_bytes(done)
            if size != entry.size:
                wrong.append(f"{entry.path} has {size} bytes, expected {entry.size}")
            elif hasher.hexdigest() != entry.sha256:
                found = hasher.hexdigest()
                wrong.append(f"{entry.path} has sha256 {found}, expected {entry.sha256}")
        return [*wrong, *(f"{name} does not belong" for name in sorted(there))]

    # Publishing

    def inside(self, source: Path) -> bool:
        """See `Backend`."""
        return self._layout.holds(source)

    def is_source(self, source: Path) -> bool:
        """See `Backend`. It may be in the bucket alone, where a job on another machine left it."""
        return source.is_dir() or any(True for _ in self._kept(source))

    def source_size(self, source: Path) -> int:
        """See `Backend`."""
        if source.is_dir():
            return tree_size(source)
        return sum(found.size for found in self._kept(source))

    def _kept(self, source: Path) -> Iterator[transfer.Wanted]:
        if not source.is_relative_to(self.root):
            return
        prefix = self._layout.relative(source) + "/"
        for found in self._bucket.find(prefix):
            yield transfer.Wanted(found.key, Path(found.key.removeprefix(prefix)), found.size, "")

    def seal(self, source: Path, expected: Sequence[FileEntry] | None) -> Sealed:
        """See `Backend`. Uploads, or copies within the bucket."""
        publication = secrets.token_hex(12)
        prefix = f"files/{publication}/"
        # Until its record is there; see `leftovers`.
        held = Roots(self.objects, self.root).lease("upload", [prefix[:-1]], _LEASE)

        def send(path: Path) -> tuple[int, str]:
            if held.expires - time.time() < _LEASE / 2:
                held.renew()
            key = prefix + path.relative_to(source).as_posix()
            return transfer.upload(self._bucket, path, key)

        try:
            if source.is_dir():
                self._check_sizes(source, expected)
                entries = seal(source, expected, send, durable=False)
            else:
                entries = self._copied(source, prefix, expected)
        except BaseException:
            self._forget_prefix(prefix)
            held.release()
            raise
        return Sealed(source, tuple(entries), publication, held.release)

    def _check_sizes(self, source: Path, expected: Sequence[FileEntry] | None) -> None:
        """Refuse before hours of uploading what can be seen to be wrong."""
        if expected is None:
            return
        sizes = {path: status.st_size for path, status in tree_files(source).items()}
        known = {entry.path: entry.sha256 for entry in expected}
        compare(
            [FileEntry(path, size, known.get(path, "")) for path, size in sizes.items()],
            checked(expected),
        )

    def _copied(
        self, source: Path, prefix: str, expected: Sequence[FileEntry] | None
    ) -> list[FileEntry]:
        """Copy what a job left in the bucket; its sha256 is what the job said when it uploaded."""
        known = {entry.path: entry.sha256 for entry in expected or ()}
        entries = []
        for found in self._kept(source):
            path = found.path.as_posix()
            entries.append(FileEntry(path, found.size, known.get(path, "")))
        compare(entries, checked(expected or ()))
        for entry in entries:
            key = f"{self._layout.relative(source)}/{entry.path}"
            transfer.copy(self._bucket, key, prefix + entry.path, entry.size)
        return entries

    def place(self, sealed: Sealed, manifest: Manifest) -> None:
        """See `Backend`. The manifest before the record that says that it is there."""
        name = check_digest(manifest.digest)
        self.objects.write(manifest_key(manifest.digest), manifest.to_bytes())
        if self.claim(manifest.digest):  # somebody was faster
            self._forget_prefix(f"files/{sealed.place}/")
        else:
            self._places.add(name, sealed.place)
        sealed.release()
        if sealed.source.is_dir():
            self._cache.adopt(sealed.source, name, manifest.size)

    def drop(self, source: Path) -> None:
        """See `Backend`."""
        remove_tree(source)

    # Garbage

    def remover(self) -> AbstractContextManager[None]:
        """See `Backend`. One that lost its place meanwhile takes nothing; see `places`."""
        return lease.hold(self._bucket, "gc", "garbage collector", lambda: None)

    def settle(self) -> None:
        """See `Backend`."""
        self._places.settle()
        with self._trash.remover():
            self._trash.settle()

    def doom(self, key: str) -> None:
        """See `Backend`."""
        if key.startswith("artifacts/"):
            self._places.doom(key.removeprefix("artifacts/"))
        elif (self.root / key).is_dir():
            self._trash.doom(self.root / key)

    def spare(self, key: str) -> None:
        """See `Backend`."""
        if key.startswith("artifacts/"):
            self._places.spare(key.removeprefix("artifacts/"))
        else:
            self._trash.spare(self.root / key)

    def take(self, key: str) -> bool:
        """See `Backend`."""
        if key.startswith("artifacts/"):
            name = key.removeprefix("artifacts/")
            gone = self._places.take(name)
            for publication in gone:
                self._forget_prefix(f"files/{publication}/")
            if gone:
                self._cache.remove(name)
            return bool(gone)
        if (self.root / key).is_dir() and not self._trash.take(self.root / key):
            return False
        self._forget_prefix(key + "/")
        return True

    def staged(self) -> Iterator[Staged]:
        """See `Backend`. What is in the bucket, and what only this machine has."""
        newest: dict[str, float] = defaultdict(float)
        size: dict[str, int] = defaultdict(int)
        for found in self._bucket.find("staging/"):
            key = "/".join(found.key.split("/")[:3])
            newest[key] = max(newest[key], found.time)
            size[key] += found.size
        for path in (self.root / "staging").glob("*/*"):
            key = self._layout.relative(path)
            newest[key] = max(newest[key], tree_newest(path))
            size[key] = max(size[key], tree_size(path))
        for key in sorted(newest):
            yield Staged(key, newest[key], size[key])

    def leftovers(self, older: float) -> Iterator[Leftover]:
        """See `Backend`."""
        before = time.time() - older
        sizes: dict[str, int] = defaultdict(int)
        newest: dict[str, float] = defaultdict(float)
        for found in self._bucket.find("files/"):
            publication = found.key.split("/")[1]
            sizes[publication] += found.size
            newest[publication] = max(newest[publication], found.time)
        uploads = [item for kind in ("files/", "staging/") for item in self._bucket.uploads(kind)]
        # After what was uploaded, and before what is there: a publisher holds its
        # lease until the record is.
        leases = [item for _, item in Roots(self.objects, self.root).leases()]
        held = {path for item in leases if item.expires > time.time() for path in item.paths}
        known = set(chain.from_iterable(self._places.all().values()))
        for publication in sorted(sizes.keys() - known):
            key = f"files/{publication}"
            if newest[publication] <= before and key not in held:
                yield Leftover(
                    key,
                    sizes[publication],
                    "uploaded by a publisher that was killed",
                    partial(self._forget_prefix, key + "/"),
                )
        for key, number, begun in uploads:
            if begun <= before and not any(key.startswith(f"{path}/") for path in held):
                yield Leftover(
                    key,
                    0,
                    "upload that was never finished",
                    partial(self._bucket.abort, key, number),
                )

    def _forget_prefix(self, prefix: str) -> None:
        self._bucket.delete([found.key for found in self._bucket.find(prefix)])

    # Places

    def staging(self, service: str, execution: str) -> Path:
        """See `Backend`."""
        parent = self._layout.under("staging", service, field="service")
        self._trash.claim(parent / safe_name(execution, field="execution"))
        return self._layout.under("staging", service, execution, field="execution")

    def keep(self, path: Path, *, hidden: bool = False) -> None:
        """See `Backend`."""
        key = self._layout.relative(path)
        mirror.keep(self._bucket, path, key, self._uploaded, hidden=hidden)

    def bring(self, path: Path) -> None:
        """See `Backend`."""
        mirror.bring(self._bucket, path, self._layout.relative(path))

    def forget(self, path: Path) -> None:
        """See `Backend`."""
        key = self._layout.relative(path)
        self._bucket.delete([key])
        self._forget_prefix(key + "/")

    def preflight(self, needed: int) -> None:
        """See `Backend`. What is only cached makes room on this machine's disk."""
        if needed > free_bytes(self.root):
            self._cache.free(needed)
        disk.preflight_disk(self.root, needed)
        limit = disk.quota()
        if limit is not None:
            disk.check_quota(limit, needed, self._bytes())

    def check_quota(self, size: int, *, inside: bool) -> None:
        """See `Backend`."""
        limit = disk.quota()
        if limit is not None:
            disk.check_quota(limit, size, self._bytes())

    def _bytes(self) -> int:
        return sum(found.size for found in self._bucket.find(""))

    def lock(self, name: str, what: str) -> AbstractContextManager[None]:
        """See `Backend`. A process that loses it is told to leave, as by SIGTERM."""

        def lost() -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        return lease.hold(self._bucket, name, what, lost)
