"""The model store: immutable artifacts, and the records that give them meaning.

Responsibility: the one door to a store; composes artifacts, tags, roots,
waivers, results and gc. Does not know gRPC, nor what is inside of a file.
"""

from __future__ import annotations

import builtins
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from arriero import refs
from arriero.errors import FailedPrecondition, InvalidArgument, NotFound
from arriero.gates import GateResult, remedy
from arriero.refs import Ref
from arriero.store import gc, publish
from arriero.store.artifacts import Artifact, Artifacts
from arriero.store.backend import Backend, FileBackend, Sealed
from arriero.store.files import make_directories, safe_name
from arriero.store.layout import Layout
from arriero.store.manifest import Manifest, ManifestDraft
from arriero.store.objects import Objects
from arriero.store.results import Result, Results
from arriero.store.roots import Lease, Pin, Roots
from arriero.store.tags import TagEntry, Tags, parse_tag
from arriero.store.waivers import Waiver, Waivers, applied

GRACE_SECONDS = 3600.0
_TAG_LEASE_SECONDS = 60.0


class Store:
    """A store, on a filesystem or in S3.

    Safe to use from several threads and processes at once.

    Attributes:
        url: as `open` takes it; holds no credentials.
        root: a local directory with `staging/` in it: the store itself on a
            filesystem, else this machine's cache of it.
        remote: whether the store is elsewhere, so that what lies below `root` is lost
            with this machine unless it was published or kept.
    """

    def __init__(self, backend: Backend) -> None:
        self.url = backend.url
        self.root: Path = backend.root
        self.remote = backend.remote
        self._backend = backend
        self._waivers = Waivers(backend.objects)
        self._artifacts = Artifacts(backend, self._waivers)
        self._tags = Tags(backend.objects)
        self._roots = Roots(backend.objects, backend.root)
        self._results = Results(backend.objects, self._artifacts)

    @classmethod
    def open(cls, url: str | Path) -> Store:
        """Open the store at a path, `file:///path` or `s3://bucket/prefix`, or make one there.

        Where S3 is, and where this machine keeps its cache, the environment says; see
        `arriero.settings.S3Settings`.

        Raises:
            FailedPrecondition: written by a newer version, or not a directory.
            InvalidArgument, Unimplemented: a URL that this version can't use.
            NotFound: no such bucket. Unavailable: S3 does not answer.
            PermissionDenied, Unauthenticated: none there, and none can be made.
            DataLoss: damaged `format.json`.
        """
        if isinstance(url, str) and url.startswith("s3://"):
            from arriero.store.s3 import open_backend  # boto3 takes half a second

            return cls(open_backend(url))
        return cls(FileBackend(Layout.open(url)))

    # Artifacts

    def publish(self, source: Path, manifest: ManifestDraft) -> Artifact:
        """Turn a directory into an artifact, at one instant or not at all.

        Files are checked against the draft's (or hashed), made durable and
        read-only; then the directory is renamed into place, or uploaded, so `source`
        is gone afterwards. An equal digest that is there already is returned, and
        `source` deleted. A draft with `files` and `created` may be published
        again after a crash, even when its source is gone.

        Args:
            source: a directory in the store's filesystem, best from `staging`.

        Raises:
            DataLoss: files are not as announced.
            InvalidArgument: a wrong draft, no files, links or special files.
            FailedPrecondition: another filesystem. DiskFull: over the quota.
            NotFound: no such source.
        """
        return publish.publish(self._backend, self._artifacts, self._roots, source, manifest)

    def receive(self, artifact: Artifact) -> Artifact:
        """Take an artifact of another store, at one instant; its cache gives the files away.

        Both have to be on one filesystem. What is here already stays.

        Raises:
            NotFound, DataLoss, DiskFull, Unavailable: the other store can't fetch it.
        """
        if not self._backend.has(artifact.digest):
            files = Sealed(artifact.path, artifact.manifest.files)
            self._backend.place(files, artifact.manifest)
        return self._artifacts.get(artifact.digest)

    def get(self, ref: str | Ref, *, wait: float = 0) -> Artifact:
        """An artifact by digest, digest prefix (8 digits or more), or reference.

        Args:
            wait: seconds to go on looking, for network filesystems, which may
                remember for a while that something was not there.

        Raises:
            NotFound: not there, or collected.
            InvalidArgument: not a reference, or an ambiguous prefix.
            DataLoss, FailedPrecondition: damaged, or newer.
        """
        deadline = time.monotonic() + wait
        pause = 0.05
        while True:
            try:
                return self._artifacts.get(self.resolve(ref))
            except NotFound:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
            time.sleep(min(pause, left))
            pause = min(2 * pause, 2.0)

    def resolve(self, ref: str | Ref) -> str:
        """The digest that a reference means; its files may have been collected.

        Raises:
            NotFound, InvalidArgument: as `get`.
        """
        if isinstance(ref, str):
            digest = None if refs.is_digest(ref) else self._artifacts.by_prefix(ref)
            ref = Ref(digest=digest) if digest else refs.parse(ref)
        if ref.digest is None:
            return self._tags.get(str(ref)).digest
        manifest = self._artifacts.manifest(ref.digest)
        if ref.kind is not None and (ref.kind, ref.name) != (manifest.kind, manifest.name):
            raise NotFound(f"no artifact {ref}: {ref.digest} is {manifest.kind}/{manifest.name}")
        return ref.digest

    def manifest(self, digest: str) -> Manifest:
        """The manifest of an artifact, also of one that was collected.

        Raises:
            NotFound: the store never had it. DataLoss, FailedPrecondition:
            damaged, or newer. InvalidArgument: not a digest.
        """
        return self._artifacts.manifest(digest)

    def list(self, kind: str | None = None) -> builtins.list[Artifact]:
        """Every artifact whose files are there (of one kind), newest first.

        What can't be read is left out, with a warning in the log.
        """
        found = [
            artifact
            for artifact in self._artifacts.all()
            if kind is None or artifact.manifest.kind == kind
        ]
        found.sort(key=lambda artifact: artifact.digest)
        return sorted(found, key=lambda artifact: artifact.manifest.created, reverse=True)

    def lineage(self, digest: str) -> builtins.list[Manifest]:
        """An artifact's manifest and its ancestors', nearest first.

        Collected ancestors are there; those of another store are left out.

        Raises:
            NotFound: the store never had the artifact itself.
        """
        found = [self._artifacts.manifest(digest)]
        seen = {digest}
        queue = deque(found[0].parents)
        while queue:
            parent = queue.popleft()
            if parent in seen:
                continue
            seen.add(parent)
            try:
                manifest = self._artifacts.manifest(parent)
            except NotFound:
                continue
            found.append(manifest)
            queue.extend(manifest.parents)
        return found

    def verify(self, digest: str) -> None:
        """Read every byte of an artifact again.

        Raises:
            DataLoss: naming each file that is not what it was. NotFound.
        """
        self._artifacts.verify(digest)

    def problems(
        self, digest: str, on_bytes: Callable[[int], None] = lambda done: None
    ) -> builtins.list[str]:
        """As `verify`, but giving what is wrong, a file each.

        Args:
            digest: of the artifact.
            on_bytes: called with the bytes read so far; what it raises ends it.

        Raises:
            DataLoss: the manifest itself is damaged. NotFound.
        """
        return self._artifacts.problems(digest, on_bytes)

    def waive(self, digest: str, gate: str, reason: str, who: str) -> None:
        """Let a failed gate pass, for a reason, on a person's word.

        Raises:
            FailedPrecondition: that gate did not fail. InvalidArgument: no
            reason or person. NotFound: no such artifact.
        """
        self._waivers.add(self._artifacts.manifest(digest), gate, reason, who)

    def waivers(self, digest: str) -> builtins.list[Waiver]:
        """The waivers of an artifact, oldest first."""
        return self._waivers.of(digest)

    def gates(self, manifest: Manifest) -> tuple[GateResult, ...]:
        """What was proved about an artifact, collected or not, waivers applied."""
        if not manifest.quarantined:
            return manifest.gates
        return applied(manifest.gates, self._waivers.of(manifest.digest))

    # Tags

    def tag(self, tag: str, digest: str, *, expected: str | None = None) -> None:
        """Point `kind/name:tag` at an artifact.

        Args:
            expected: what it must point at now: a digest, `none`, or None for any.

        Raises:
            Aborted: it points elsewhere, or another setter was faster.
            FailedPrecondition: the artifact is quarantined.
            InvalidArgument: not a tag, or of another kind than the artifact.
            NotFound: no such artifact.
        """
        ref = parse_tag(tag)
        # With the lease first, gc either sees it or has removed the files before we look.
        with self.lease("tag", [digest], _TAG_LEASE_SECONDS):
            artifact = self._artifacts.get(digest)
            if artifact.manifest.kind != ref.kind:
                raise InvalidArgument.field(
                    "tag", f"{ref} is for a {ref.kind}, but {digest} is a {artifact.manifest.kind}"
                )
            if artifact.quarantined:
                failed = artifact.manifest.failed_gates
                raise FailedPrecondition(
                    f"{artifact.manifest.kind} {digest} is quarantined, it can't be tagged: "
                    f"failed {', '.join(failed)}; {remedy(failed)}",
                    reason="QUARANTINED",
                )
            self._tags.set(str(ref), digest, expected)

    def tags(self, kind: str | None = None) -> builtins.list[TagEntry]:
        """Every tag (of one kind) and what it points at, by name."""
        return self._tags.all(kind)

    def tag_history(self, tag: str) -> builtins.list[TagEntry]:
        """Every value that a tag had, newest first."""
        return self._tags.history(tag)

    # Roots and garbage

    def lease(self, owner: str, items: Iterable[str | Path], ttl: float = 3600.0) -> Lease:
        """Keep digests and staging paths from gc for `ttl` seconds; renewable.

        Take the lease first, then look whether the artifact is there.
        """
        return self._roots.lease(owner, items, ttl)

    def pin(
        self, owner: str, name: str, digests: Sequence[str], *, expires: float | None = None
    ) -> None:
        """Keep digests from gc until unpinned, or until `expires` (Unix seconds).

        Replaces the pin of that owner (`endpoints`, `runs`) and name. Pin
        first, then look whether the artifacts are there.
        """
        self._roots.pin(owner, name, digests, expires)

    def unpin(self, owner: str, name: str) -> None:
        """Forget a pin; none is fine."""
        self._roots.unpin(owner, name)

    def pins(self) -> builtins.list[Pin]:
        """Every pin, expired ones too until gc removes them."""
        return self._roots.pins()

    def gc(self, *, dry_run: bool, grace: float = GRACE_SECONDS) -> builtins.list[gc.Removal]:
        """Remove what no root holds; manifests stay. See `gc.collect`."""
        return gc.collect(
            self._backend,
            self._artifacts,
            self._tags,
            self._roots,
            dry_run=dry_run,
            grace=grace,
        )

    # Results

    def put_result(
        self,
        service: str,
        key: str,
        outputs: Mapping[str, str],
        gates: Sequence[GateResult] = (),
    ) -> None:
        """Record what the work with this key made: digests by output name."""
        self._results.put(service, key, outputs, gates)

    def get_result(self, service: str, key: str) -> Result | None:
        """What the work with this key made; None unless all of it can be used."""
        return self._results.get(service, key)

    # Room and places

    def staging(self, service: str, execution: str) -> Path:
        """The local directory `staging/<service>/<execution>/`, made if missing.

        gc removes it when nothing was written there for a while: hold a lease, or
        write an operation record that names it, before asking for it.
        """
        return self._backend.staging(service, execution)

    def keep(self, path: Path, *, hidden: bool = False) -> None:
        """Let a file or directory of the staging survive this machine, as it is now.

        Where the store is elsewhere, what changed is uploaded, and what is gone is
        forgotten. On a filesystem there is nothing to do. Names that begin with a
        dot count as half-written, unless `hidden`.

        Raises:
            Unavailable, PermissionDenied: it can't be uploaded now.
        """
        self._backend.keep(path, hidden=hidden)

    def bring(self, path: Path) -> None:
        """Bring a file or directory of the staging back that was kept.

        What is there and not older stays. On a filesystem there is nothing to do.
        """
        self._backend.bring(path)

    def forget(self, path: Path) -> None:
        """Forget what was kept of a file or directory of the staging."""
        self._backend.forget(path)

    def record_dir(self, service: str) -> Path:
        """A local directory of a service's own, made if missing: its logs, say.

        On a filesystem it is where its records are, too.
        """
        path = self.root / "operations" / safe_name(service, field="service")
        make_directories(path, below=self.root)
        return path

    @property
    def objects(self) -> Objects:
        """Records by key; a service's own are below `operations/<service>/`."""
        return self._backend.objects

    def preflight(self, needed: int) -> None:
        """Refuse work that would write more bytes than there is room for.

        Raises:
            DiskFull: with needed and free bytes.
        """
        self._backend.preflight(needed)

    def usage(self) -> dict[str, int]:
        """Bytes by artifact kind, and of `staging`."""
        sizes = dict.fromkeys(refs.KINDS, 0)
        for artifact in self.list():
            sizes[artifact.manifest.kind] += artifact.manifest.size
        sizes["staging"] = sum(staged.size for staged in self._backend.staged())
        return sizes

    def lock(self, service: str) -> AbstractContextManager[None]:
        """Be the one writer of a service's records, for as long as the context lasts.

        Raises:
            FailedPrecondition: another process is; names its pid.
        """
        name = safe_name(service, field="service")
        return self._backend.lock(name, f"{service} service")

    def __repr__(self) -> str:
        return f"Store({self.url!r})"
