"""Where things lie in a store on a filesystem, and which version of that this is.

Responsibility: paths, and opening a store. Does not know what is written at
those paths.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from arriero.errors import FailedPrecondition, InvalidArgument, Unimplemented
from arriero.store.files import (
    make_directories,
    now,
    os_errors,
    read_json,
    safe_name,
    to_json,
    write_atomic,
)
from arriero.store.manifest import FORMAT, check_digest

DIRECTORIES = (
    "artifacts",  # <hex>/: the files of an artifact; existence means complete
    "manifests",  # <hex>.json: stays when the files go
    "tags",  # <kind>/<name>/<tag>/<n>
    "results",  # <service>/<key>.json
    "operations",  # <service>/<id>/: records of the service, its one writer
    "staging",  # <service>/<execution>/: what jobs write
    "roots",  # <owner>/<name>.json: what gc keeps
    "leases",  # <id>.json: the same, for a while
    "waivers",  # <hex>/<gate>.json
    "locks",  # <service>.lock
    "trash",  # marks of what gc means to delete, and what it deletes
)


@dataclass(frozen=True)
class Layout:
    """The paths of one store, below `root` (absolute)."""

    root: Path

    @classmethod
    def open(cls, url: str | Path, directories: Sequence[str] = DIRECTORIES) -> Layout:
        """Open a store, or make one where there is none.

        Args:
            url: a path, or `file:///absolute/path`.
            directories: that it has, made where they are missing.

        Raises:
            InvalidArgument: not such a URL.
            Unimplemented: neither of the two.
            FailedPrecondition: a newer format, or something that is no directory.
            PermissionDenied: no store there, and none can be made. (One that is
                mounted read-only can be opened, and read.)
        """
        root = _path_of(url)
        if root.exists() and not root.is_dir():
            raise FailedPrecondition(f"{root} is not a directory; expected one for the store")
        layout = cls(root)
        with os_errors(root):
            root.mkdir(parents=True, exist_ok=True)
        version = root / "format.json"
        if version.exists():
            read_json(version, FORMAT, "the store")
        else:
            write_atomic(version, to_json({"format": FORMAT, "created": now()}))
        for name in directories:
            make_directories(root / name, below=root)
        return layout

    def artifact(self, digest: str) -> Path:
        """Directory of an artifact's files."""
        return self.root / "artifacts" / check_digest(digest)

    def under(self, *names: str, field: str = "name") -> Path:
        """A directory below the root, made if missing; names from outside are checked."""
        path = self.root.joinpath(*(safe_name(name, field=field) for name in names))
        make_directories(path, below=self.root)
        return path

    def holds(self, source: Path) -> bool:
        """Whether a directory to publish lies in the store; it may there be in staging alone.

        Raises:
            InvalidArgument: another part of the store, all of it, or a link.
        """
        if source.is_symlink():
            raise InvalidArgument.field(
                "source", f"{source} is a symbolic link; give the directory"
            )
        place, root = source.resolve(), self.root.resolve()
        if root.is_relative_to(place):
            raise InvalidArgument.field("source", f"{source} holds the store itself")
        if not place.is_relative_to(root):
            return False
        if root / "staging" not in place.parents:
            raise InvalidArgument.field(
                "source", f"{source} is part of the store; expected a directory below its staging/"
            )
        return True

    def relative(self, path: Path) -> str:
        """A path as it is shown: relative to the root, with forward slashes."""
        return path.relative_to(self.root).as_posix()


def _path_of(url: str | Path) -> Path:
    if isinstance(url, Path):
        return Path(os.path.abspath(url.expanduser()))
    parts = urlsplit(url)
    if not parts.scheme:
        if not url or "\0" in url:
            raise InvalidArgument.field("store", f"{url!r}: expected a path or file:///path")
        return Path(os.path.abspath(Path(url).expanduser()))
    if parts.scheme != "file":
        raise Unimplemented(
            f"store {url!r}: this version keeps stores on a filesystem or in S3; expected a "
            "path, file:///path or s3://bucket/prefix"
        )
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise InvalidArgument.field("store", f"{url!r}: expected file:///absolute/path")
    return Path(os.path.abspath(unquote(parts.path)))
