"""Small records as objects of a bucket.

Responsibility: `store.objects.Objects` over S3. Does not know what a record says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from arriero.store.objects import Found
from arriero.store.s3.bucket import Bucket


class S3Objects:
    """The records of a store in S3; see `Objects`."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def read(self, key: str) -> bytes:
        """See `Objects`."""
        return self._bucket.get(key)

    def write(self, key: str, data: bytes, *, durable: bool = True) -> None:
        """See `Objects`. All that was put is durable."""
        self._bucket.put(key, data)

    def create(self, key: str, make: Callable[[], bytes]) -> bool:
        """See `Objects`. A record is there whole, or not at all."""
        return self._bucket.create(key, make())

    def delete(self, key: str) -> None:
        """See `Objects`."""
        self._bucket.delete([key])

    def touch(self, key: str) -> None:
        """See `Objects`. Only for records that nobody changes: it is put again."""
        with contextlib.suppress(FileNotFoundError):
            self._bucket.put(key, self._bucket.get(key))

    def time_ns(self, key: str) -> int | None:
        """See `Objects`."""
        found = self._bucket.head(key)
        return None if found is None else int(found["LastModified"].timestamp() * 1e9)

    def find(self, prefix: str) -> Iterator[Found]:
        """See `Objects`."""
        return self._bucket.find(prefix)

    def shown(self, key: str) -> str:
        """See `Objects`."""
        return self._bucket.shown(key)
