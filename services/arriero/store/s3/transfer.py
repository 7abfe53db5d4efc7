"""Files to a bucket and back, in parts side by side, with their sha256.

Responsibility: bytes. An upload is there whole or not at all; a fetch that was cut
off goes on where it was. Does not know artifacts.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

from arriero.errors import DataLoss, FailedPrecondition
from arriero.store.files import os_errors, sha256_file
from arriero.store.s3.bucket import THREADS, Bucket, checksum

# Of one request; grows with the file, since S3 takes 10,000 parts at most.
PART_BYTES = 16 << 20
_MOST_PARTS = 9_000
# The most that one request copies within the bucket.
_COPY_BYTES = 1 << 30


def upload(bucket: Bucket, path: Path, key: str) -> tuple[int, str]:
    """Upload a file, reading it once; its size in bytes and sha256 in hex.

    The server compares the sha256 of each part with what arrived.
    """
    size = path.stat().st_size
    if size <= PART_BYTES:
        data = path.read_bytes()
        bucket.put(key, data)
        return len(data), hashlib.sha256(data).hexdigest()
    with bucket.errors(key):
        begun = bucket.client.create_multipart_upload(**bucket.at(key), ChecksumAlgorithm="SHA256")
    number = begun["UploadId"]
    try:
        with path.open("rb") as file:
            parts, done, sha256 = _send(bucket, key, number, file, part_bytes(size))
        with bucket.errors(key):
            bucket.client.complete_multipart_upload(
                **bucket.at(key), UploadId=number, MultipartUpload={"Parts": parts}
            )
        return done, sha256
    except BaseException:
        with contextlib.suppress(Exception):
            bucket.abort(key, number)
        raise


def _send(
    bucket: Bucket, key: str, number: str, file: Any, size: int
) -> tuple[list[dict[str, Any]], int, str]:
    room = BoundedSemaphore(THREADS + 2)  # parts in memory
    hasher, done = hashlib.sha256(), 0
    sent: list[Future[dict[str, Any]]] = []

    def send(part: int, data: bytes) -> dict[str, Any]:
        try:
            with bucket.errors(key):
                answer = bucket.client.upload_part(
                    **bucket.at(key),
                    UploadId=number,
                    PartNumber=part,
                    Body=data,
                    ChecksumSHA256=checksum(data),
                )
            found = {"PartNumber": part, "ETag": answer["ETag"]}
            if "ChecksumSHA256" in answer:
                found["ChecksumSHA256"] = answer["ChecksumSHA256"]
            return found
        finally:
            room.release()

    try:
        while data := file.read(size):
            room.acquire()
            sent.append(bucket.pool.submit(send, len(sent) + 1, data))
            hasher.update(data)
            done += len(data)
            if sent[0].done():
                sent[0].result()  # refused: read no further
        return [part.result() for part in sent], done, hasher.hexdigest()
    except BaseException:
        for part in sent:
            if part.cancel():
                room.release()
        for part in sent:
            if not part.cancelled():
                part.exception()
        raise


@dataclass
class _Fetch:
    """A file on its way: which parts are still missing."""

    key: str
    path: Path
    size: int
    sha256: str
    journal: Path
    left: list[Future[None]] = field(default_factory=list)


@dataclass(frozen=True)
class Wanted:
    """A file to fetch: its key, where it goes, and what it must be."""

    key: str
    path: Path
    size: int
    sha256: str


def reserve(files: list[Wanted]) -> None:
    """Make the files with their full size (without content), so that others see what they take."""
    for wanted in files:
        wanted.path.parent.mkdir(parents=True, exist_ok=True)
        with os_errors(wanted.path, wanted.size), wanted.path.open("ab") as file:
            file.truncate(wanted.size)


def fetch(bucket: Bucket, files: list[Wanted], on_bytes: Callable[[int], None]) -> None:
    """Fetch files that were reserved, whose parts that are there already stay.

    Args:
        bucket: where they are.
        files: what is wanted.
        on_bytes: called with the bytes of each part that came.

    Raises:
        DataLoss: other bytes than expected, twice.
        FileNotFoundError: not in the bucket.
    """
    for attempt in (1, 2):
        begun = [_begin(bucket, wanted, on_bytes) for wanted in files]
        try:
            for item in begun:
                for part in item.left:
                    part.result()
        except BaseException:
            for item in begun:
                for part in item.left:
                    part.cancel()
            for item in begun:
                for part in item.left:
                    if not part.cancelled():
                        part.exception()
            raise
        found = bucket.pool.map(lambda item: sha256_file(item.path), begun)
        wrong = [
            item
            for item, (size, sha256) in zip(begun, found, strict=True)
            if (size, sha256) != (item.size, item.sha256)
        ]
        if not wrong:
            for item in begun:
                item.journal.unlink(missing_ok=True)
            return
        for item in wrong:  # what an earlier attempt left may be at fault: once more, from nothing
            item.journal.unlink(missing_ok=True)
        if attempt == 2:
            names = ", ".join(bucket.shown(item.key) for item in wrong)
            raise DataLoss(
                f"other bytes than were published: {names}; somebody changed the bucket behind "
                "the store's back: restore them, or make the artifact again"
            )


def _begin(bucket: Bucket, wanted: Wanted, on_bytes: Callable[[int], None]) -> _Fetch:
    journal = wanted.path.with_name(f".{wanted.path.name}.parts")
    item = _Fetch(wanted.key, wanted.path, wanted.size, wanted.sha256, journal)
    size = part_bytes(wanted.size)
    done = _journaled(journal, size)
    for part, first in enumerate(range(0, wanted.size, size)):
        last = min(first + size, wanted.size) - 1
        if part in done:
            on_bytes(last + 1 - first)
        else:
            item.left.append(
                bucket.pool.submit(_get, bucket, item, part, first, last, size, on_bytes)
            )
    return item


def _get(
    bucket: Bucket,
    item: _Fetch,
    part: int,
    first: int,
    last: int,
    size: int,
    on_bytes: Callable[[int], None],
) -> None:
    data = read_range(bucket, item.key, first, last)
    with os_errors(item.path, len(data)):
        fd = os.open(item.path, os.O_WRONLY)
        try:
            os.pwrite(fd, data, first)
        finally:
            os.close(fd)
        with item.journal.open("ab", buffering=0) as journal:
            journal.write(f"{size} {part}\n".encode())
    on_bytes(len(data))


def read_range(bucket: Bucket, key: str, first: int, last: int) -> bytes:
    """Bytes `first` to `last` of an object, both included.

    Raises:
        DataLoss: the object has fewer. FileNotFoundError: it is not there.
    """
    try:
        with bucket.errors(key):
            answer = bucket.client.get_object(**bucket.at(key), Range=f"bytes={first}-{last}")
            data: bytes = answer["Body"].read()
    except FailedPrecondition as error:  # 416: it ends before
        if error.metadata.get("code") not in ("InvalidRange", "416"):
            raise
        data = b""
    if len(data) != last + 1 - first:
        raise DataLoss(
            f"{bucket.shown(key)} is shorter than what was published: {len(data)} bytes at "
            f"{first}, expected {last + 1 - first}; somebody changed the bucket"
        )
    return data


def _journaled(path: Path, size: int) -> set[int]:
    """Parts of that size that are whole in the file."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return set()
    return {int(line.split()[1]) for line in lines if line.startswith(f"{size} ")}


def chunks(bucket: Bucket, key: str, size: int) -> Iterator[bytes]:
    """An object's bytes in order, a few parts ahead."""
    step = part_bytes(size)
    waiting: list[Future[bytes]] = []
    for first in range(0, size, step):
        last = min(first + step, size) - 1
        waiting.append(bucket.pool.submit(read_range, bucket, key, first, last))
        if len(waiting) == 4:
            yield waiting.pop(0).result()
    for part in waiting:
        yield part.result()


def copy(bucket: Bucket, source: str, target: str, size: int) -> None:
    """Copy an object within the bucket, without its bytes coming here."""
    place = {"Bucket": bucket.name, "Key": bucket.key(source)}
    with bucket.errors(source):
        if size <= _COPY_BYTES:
            bucket.client.copy_object(**bucket.at(target), CopySource=place)
            return
        number = bucket.client.create_multipart_upload(**bucket.at(target))["UploadId"]
        try:

            def part(index: int) -> dict[str, Any]:
                first = index * _COPY_BYTES
                last = min(first + _COPY_BYTES, size) - 1
                answer = bucket.client.upload_part_copy(
                    **bucket.at(target),
                    CopySource=place,
                    CopySourceRange=f"bytes={first}-{last}",
                    UploadId=number,
                    PartNumber=index + 1,
                )
                return {"PartNumber": index + 1, "ETag": answer["CopyPartResult"]["ETag"]}

            parts = list(bucket.pool.map(part, range(-(-size // _COPY_BYTES))))
            bucket.client.complete_multipart_upload(
                **bucket.at(target), UploadId=number, MultipartUpload={"Parts": parts}
            )
        except BaseException:
            with contextlib.suppress(Exception):
                bucket.abort(target, number)
            raise


def part_bytes(size: int) -> int:
    """Bytes of each part of a file of that size."""
    return max(PART_BYTES, -(-size // _MOST_PARTS))
