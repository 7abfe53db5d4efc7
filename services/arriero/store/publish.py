"""Publishing: from a directory that a job filled to an artifact, at one instant.

Responsibility: the order of things: leases first, then verified bytes, then the
manifest, then being there. A kill at any point leaves either no artifact or a
complete one, and publishing again finishes. Does not know who made the files, or
where their bytes lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arriero.errors import NotFound
from arriero.store.artifacts import Artifact, Artifacts
from arriero.store.backend import Backend
from arriero.store.manifest import Manifest, ManifestDraft, check_draft, resolve_draft
from arriero.store.roots import Roots
from arriero.store.sealing import checked

# Hashing a large model takes minutes; a dead publisher's files wait for so long.
LEASE_SECONDS = 3600.0


def publish(
    backend: Backend, artifacts: Artifacts, roots: Roots, source: Path, draft: ManifestDraft
) -> Artifact:
    """Turn `source` into an artifact; see `Store.publish`."""
    check_draft(draft)
    inside = backend.inside(source)
    inherited = _inherited(artifacts, draft.parents)
    with roots.lease("publish", [source] if inside else [], LEASE_SECONDS):
        if draft.files is not None and draft.created is not None:
            known = resolve_draft(draft, checked(draft.files), inherited)
            done = _existing(artifacts, roots, known)
            if done is not None:
                backend.drop(source)
                return done
        if not backend.is_source(source):
            raise NotFound(f"nothing to publish: {source} is not a directory")
        backend.check_quota(backend.source_size(source), inside=inside)
        sealed = backend.seal(source, draft.files)
        manifest = resolve_draft(draft, sealed.entries, inherited)
        with roots.lease("publish", [manifest.digest], LEASE_SECONDS):
            backend.place(sealed, manifest)
            return artifacts.get(manifest.digest)


def _existing(artifacts: Artifacts, roots: Roots, manifest: Manifest) -> Artifact | None:
    with roots.lease("publish", [manifest.digest], LEASE_SECONDS):
        artifacts.touch(manifest.digest)
        if not artifacts.claim(manifest.digest):
            return None
        return artifacts.get(manifest.digest)


def _inherited(artifacts: Artifacts, parents: Sequence[str]) -> list[str]:
    licenses: list[str] = []
    for parent in parents:
        try:
            licenses += artifacts.manifest(parent).licenses
        except NotFound:  # made in another store
            continue
    return licenses
