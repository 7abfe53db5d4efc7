"""Publishing: from a directory that a job filled to an artifact, at one instant.

Responsibility: verify, make durable and read-only, rename. A kill at any point
leaves either no artifact or a complete one, and publishing again finishes.
Does not know who made the files, or what they mean.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from arriero.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from arriero.store import disk
from arriero.store.artifacts import Artifact, Artifacts
from arriero.store.files import (
    DIRECTORY_MODE,
    fsync_directory,
    fsync_tree,
    is_temporary,
    os_errors,
    remove_tree,
    safe_relative,
    seal_tree,
    sha256_file,
    tree_files,
    write_atomic,
)
from arriero.store.layout import Layout
from arriero.store.manifest import (
    FileEntry,
    Manifest,
    ManifestDraft,
    check_draft,
    resolve_draft,
)
from arriero.store.roots import Roots

# Hashing a large model takes minutes; a dead publisher's files wait for so long.
LEASE_SECONDS = 3600.0


def publish(
    layout: Layout, artifacts: Artifacts, roots: Roots, source: Path, draft: ManifestDraft
) -> Artifact:
    """Turn `source` into an artifact; see `Store.publish`."""
    check_draft(draft)
    inside = _check_place(layout, source)
    inherited = _inherited(artifacts, draft.parents)
    with roots.lease("publish", [source] if inside else [], LEASE_SECONDS):
        if draft.files is not None and draft.created is not None:
            known = resolve_draft(draft, _checked(draft.files), inherited)
            done = _existing(artifacts, roots, known)
            if done is not None:
                remove_tree(source)
                return done
        if not source.is_dir():
            raise NotFound(f"nothing to publish: {source} is not a directory")
        entries = _seal(source, draft.files)
        manifest = resolve_draft(draft, entries, inherited)
        disk.check_quota(layout.root, manifest.size, inside=inside)
        with roots.lease("publish", [manifest.digest], LEASE_SECONDS):
            _place(layout, artifacts, source, manifest)
            return artifacts.get(manifest.digest)


def _existing(artifacts: Artifacts, roots: Roots, manifest: Manifest) -> Artifact | None:
    with roots.lease("publish", [manifest.digest], LEASE_SECONDS):
        artifacts.touch(manifest.digest)
        if not artifacts.claim(manifest.digest):
            return None
        return artifacts.get(manifest.digest)


def _check_place(layout: Layout, source: Path) -> bool:
    """Whether the source lies in the store; it may there be in staging alone."""
    if source.is_symlink():
        raise InvalidArgument.field("source", f"{source} is a symbolic link; give the directory")
    place = source.resolve()
    root = layout.root.resolve()
    if root.is_relative_to(place):
        raise InvalidArgument.field("source", f"{source} holds the store itself")
    if not place.is_relative_to(root):
        return False
    if root / "staging" not in place.parents:
        raise InvalidArgument.field(
            "source", f"{source} is part of the store; expected a directory below its staging/"
        )
    return True


def _inherited(artifacts: Artifacts, parents: Sequence[str]) -> list[str]:
    licenses: list[str] = []
    for parent in parents:
        try:
            licenses += artifacts.manifest(parent).licenses
        except NotFound:  # made in another store
            continue
    return licenses


def _checked(entries: Sequence[FileEntry]) -> list[FileEntry]:
    found = [
        FileEntry(str(safe_relative(e.path, field="files")), e.size, e.sha256) for e in entries
    ]
    if len({entry.path for entry in found}) != len(found):
        raise InvalidArgument.field("files", "the same path twice")
    return found


def _seal(source: Path, expected: Sequence[FileEntry] | None) -> list[FileEntry]:
    """Make the source durable and read-only, then read what it holds."""
    with os_errors(source):
        for relative, status in tree_files(source).items():
            path = source / relative
            if is_temporary(path.name):
                path.unlink()
            elif status.st_nlink > 1:
                _own(path, status.st_size)
        seal_tree(source, keep_writable=source)
        fsync_tree(source)
    found = []
    for relative in tree_files(source):
        size, sha256 = sha256_file(source / relative)
        found.append(FileEntry(relative, size, sha256))
    if not found:
        raise InvalidArgument.field("source", f"{source} holds no files")
    if expected is not None:
        _compare(found, _checked(expected))
    return found


def _own(path: Path, size: int) -> None:
    """Replace a hard link by a copy: the other name's owner could change our bytes."""
    copy = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    with os_errors(path, size):
        try:
            shutil.copyfile(path, copy)
            copy.replace(path)
        except BaseException:
            copy.unlink(missing_ok=True)
            raise


def _compare(found: Sequence[FileEntry], expected: Sequence[FileEntry]) -> None:
    there = {entry.path: entry for entry in found}
    wrong = []
    for entry in expected:
        other = there.pop(entry.path, None)
        if other is None:
            wrong.append(f"{entry.path} is missing")
        elif other.size != entry.size:
            wrong.append(f"{entry.path} has {other.size} bytes, expected {entry.size}")
        elif other.sha256 != entry.sha256:
            wrong.append(f"{entry.path} has sha256 {other.sha256}, expected {entry.sha256}")
    wrong += [f"{path} was not announced" for path in there]
    if wrong:
        raise DataLoss(f"not published, the files are not what was announced: {'; '.join(wrong)}")


def _place(layout: Layout, artifacts: Artifacts, source: Path, manifest: Manifest) -> None:
    """The manifest first, so that an artifact that is there can always be read."""
    final = layout.artifact(manifest.digest)
    write_atomic(layout.manifest(manifest.digest), manifest.to_bytes())
    mode = stat.S_IMODE(source.stat().st_mode)
    if not mode & stat.S_IWUSR:  # moving a directory rewrites its `..`
        source.chmod(mode | stat.S_IRWXU)
    while not _rename(source, final):
        if artifacts.claim(manifest.digest):  # somebody was faster
            remove_tree(source)
            return
    final.chmod(DIRECTORY_MODE)
    fsync_directory(final.parent)
    fsync_directory(source.parent)


def _rename(source: Path, final: Path) -> bool:
    """Whether the source is in place; False when something is there already."""
    try:
        source.rename(final)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        if error.errno == errno.EXDEV:
            raise FailedPrecondition(
                f"{source} is on another filesystem than the store that it is published to "
                f"({final.parent.parent}); fill a directory that Store.staging made"
            ) from error
        raise
    return True
