"""A directory that survives its machine: the same files below a prefix of the bucket.

Responsibility: bring both to the same state, one way or the other. Does not know
what the files are, nor who writes them.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from arriero.store.files import tree_files
from arriero.store.objects import Found
from arriero.store.s3 import transfer
from arriero.store.s3.bucket import Bucket

# What this process uploaded: key -> (bytes, modified in ns). Clocks of machines differ.
Uploaded = dict[str, tuple[int, int]]


def keep(bucket: Bucket, path: Path, key: str, uploaded: Uploaded, *, hidden: bool) -> None:
    """Upload what changed since it was uploaded, as it was written, then forget what is gone.

    So a file that says that others are whole, and was written after them, is there after them.

    Names that begin with a dot are being written, and left out unless `hidden`. What
    changes or vanishes meanwhile is for the next call.
    """
    if path.is_file():
        with contextlib.suppress(FileNotFoundError):
            transfer.upload(bucket, path, key)
        return
    there = {found.key.removeprefix(key + "/"): found for found in bucket.find(key + "/")}
    local: dict[str, os.stat_result] = {}
    if path.is_dir():
        with contextlib.suppress(FileNotFoundError):
            local = {
                name: status
                for name, status in tree_files(path).items()
                if hidden or not any(part.startswith(".") for part in Path(name).parts)
            }
    for name, status in sorted(local.items(), key=lambda item: item[1].st_mtime_ns):
        place, seen = f"{key}/{name}", (status.st_size, status.st_mtime_ns)
        if uploaded.get(place) != seen if place in uploaded else _differs(there.get(name), status):
            with contextlib.suppress(FileNotFoundError):
                transfer.upload(bucket, path / name, place)
                uploaded[place] = seen
    bucket.delete([found.key for name, found in there.items() if name not in local])


def bring(bucket: Bucket, path: Path, key: str) -> None:
    """Fetch what is not here, or is older here than there."""
    found = bucket.head(key) if path.suffix else None
    if found is not None:
        time = found["LastModified"].timestamp()
        _fetch(bucket, path, Found(key, int(found["ContentLength"]), time))
        return
    for item in bucket.find(key + "/"):
        _fetch(bucket, path / item.key.removeprefix(key + "/"), item)


def _fetch(bucket: Bucket, path: Path, found: Found) -> None:
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        if status.st_mtime >= found.time or not _differs(found, status):
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")
    try:
        with aside.open("wb") as file:
            for chunk in transfer.chunks(bucket, found.key, found.size):
                file.write(chunk)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _differs(found: Found | None, status: os.stat_result) -> bool:
    """Whether a file is another than what was uploaded; S3 tells times in seconds."""
    return found is None or found.size != status.st_size or status.st_mtime > found.time + 1
