"""What can be known of an artifact without its weights.

Responsibility: a directory with an artifact's small files, and with safetensors files
of which only the headers are there. Does not know what headers say.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from arriero.store.files import os_errors
from arriero.store.manifest import FileEntry, Manifest
from arriero.store.s3 import transfer
from arriero.store.s3.bucket import Bucket

# Read of a safetensors file at first; most headers are shorter.
HEAD_BYTES = 1 << 20
# No header is larger, and no other file that is brought.
LARGEST = 100 << 20
_LENGTH_BYTES = 8


def fill(bucket: Bucket, manifest: Manifest, place: str, directory: Path) -> None:
    """Bring what tells about an artifact's weights.

    Small files are whole and verified. Safetensors files have their header and their
    size; in place of tensors there are zeros. What is large otherwise is left out.

    Args:
        bucket: where the artifact is.
        manifest: of the artifact.
        place: prefix of its files.
        directory: to bring them to.

    Raises:
        DataLoss: other bytes than were published. FileNotFoundError: not in the bucket.
    """
    weights = [
        entry
        for entry in manifest.files
        if entry.path.endswith(".safetensors") and entry.size > HEAD_BYTES
    ]
    small = [
        transfer.Wanted(place + entry.path, directory / entry.path, entry.size, entry.sha256)
        for entry in manifest.files
        if entry not in weights and entry.size <= LARGEST
    ]
    directory.mkdir(parents=True, exist_ok=True)
    transfer.reserve(small)
    transfer.fetch(bucket, small, lambda done: None)
    list(bucket.pool.map(partial(_head, bucket, place, directory), weights))


def _head(bucket: Bucket, place: str, directory: Path, entry: FileEntry) -> None:
    key, path = place + entry.path, directory / entry.path
    data = transfer.read_range(bucket, key, 0, HEAD_BYTES - 1)
    end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    if HEAD_BYTES < end <= min(entry.size, LARGEST):
        data += transfer.read_range(bucket, key, HEAD_BYTES, end - 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with os_errors(path, len(data)), path.open("wb") as file:
        file.write(data)
        file.truncate(entry.size)
