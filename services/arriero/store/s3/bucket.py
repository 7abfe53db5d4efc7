"""A bucket: requests, and what its refusals mean.

Responsibility: the one client, its retries, and errors in this project's words.
Does not know what is in the bucket. Credentials are the SDK's business and never
leave it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.config
import botocore.exceptions as refusals

from arriero.errors import (
    ArrieroError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from arriero.store.files import safe_relative
from arriero.store.objects import Found

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
# Requests at once, of one process.
THREADS = 8
_CONNECT_SECONDS, _READ_SECONDS, _ATTEMPTS = 5, 60, 5
_DELETED_AT_ONCE = 1000
_MISSING = {"NoSuchKey", "404", "NoSuchUpload", "NotFound"}
_DENIED = {
    "403",
    "AccessDenied",
    "AllAccessDisabled",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_ELSEWHERE = {"301", "307", "PermanentRedirect", "AuthorizationHeaderMalformed"}
_AGAIN = {"500", "503", "InternalError", "ServiceUnavailable", "SlowDown", "RequestTimeout"}


class Bucket:
    """The objects below `s3://bucket/prefix`; keys are relative to the prefix.

    Safe to use from several threads, and after a fork.
    """

    def __init__(self, url: str, endpoint: str | None) -> None:
        self.name, self.prefix = parse(url)
        self.url = f"s3://{self.name}/{self.prefix}".rstrip("/")
        self._endpoint = endpoint
        self._at = f" at {endpoint}" if endpoint else ""
        self._clients: dict[int, Any] = {}
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._making = threading.Lock()

    @property
    def client(self) -> Any:
        """The SDK's client of this process: connections do not survive a fork."""
        pid = os.getpid()
        if pid not in self._clients:
            with self._making:
                self._clients[pid] = self._clients.get(pid) or self._client()
        return self._clients[pid]

    def _client(self) -> Any:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        config = botocore.config.Config(
            connect_timeout=_CONNECT_SECONDS,
            read_timeout=_READ_SECONDS,
            retries={"mode": "standard", "max_attempts": _ATTEMPTS},
            max_pool_connections=4 * THREADS,
            s3={"addressing_style": "path"} if self._endpoint else {},
            # Checksums are sha256, given with each request; servers know no other way.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        with self.errors():
            return boto3.session.Session().client(
                "s3",
                endpoint_url=self._endpoint,
                region_name=region or ("us-east-1" if self._endpoint else None),
                config=config,
            )

    @property
    def pool(self) -> ThreadPoolExecutor:
        """Where parts are sent and fetched side by side; threads do not survive a fork either."""
        pid = os.getpid()
        if pid not in self._pools:
            with self._making:
                made = ThreadPoolExecutor(THREADS, thread_name_prefix="s3")
                self._pools.setdefault(pid, made)
        return self._pools[pid]

    def key(self, key: str) -> str:
        """A key as the bucket has it."""
        return f"{self.prefix}/{key}" if self.prefix else key

    def shown(self, key: str) -> str:
        """A key as people see it."""
        return f"{self.url}/{key}"

    def get(self, key: str) -> bytes:
        """The bytes of an object. Raises `FileNotFoundError`."""
        with self.errors(key):
            data: bytes = self.client.get_object(**self.at(key))["Body"].read()
            return data

    def put(self, key: str, data: bytes) -> None:
        """Replace an object."""
        with self.errors(key):
            self.client.put_object(**self.at(key), Body=data, ChecksumSHA256=checksum(data))

    def create(self, key: str, data: bytes) -> bool:
        """Make an object that is not there yet; False when it is."""
        while True:
            try:
                self.client.put_object(
                    **self.at(key), Body=data, ChecksumSHA256=checksum(data), IfNoneMatch="*"
                )
                return True
            except refusals.ClientError as error:
                code = _code(error)
                if code in ("PreconditionFailed", "412"):
                    # A request that was repeated may meet what it did itself.
                    repeated = error.response.get("ResponseMetadata", {}).get("RetryAttempts", 0)
                    return bool(repeated) and self._is(key, data)
                if code not in ("ConditionalRequestConflict", "409"):
                    raise self._error(error, key) from error
                time.sleep(0.05)  # somebody is writing it just now
            except refusals.BotoCoreError as error:
                raise self._error(error, key) from error

    def _is(self, key: str, data: bytes) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self.get(key) == data
        return False

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; what is not there is fine."""
        left = list(keys)
        if len(left) == 1:
            with self.errors(left[0]):
                self.client.delete_object(**self.at(left[0]))
            return
        for first in range(0, len(left), _DELETED_AT_ONCE):
            some = [{"Key": self.key(key)} for key in left[first : first + _DELETED_AT_ONCE]]
            with self.errors(left[first]):
                answer = self.client.delete_objects(
                    Bucket=self.name, Delete={"Objects": some, "Quiet": True}
                )
            for refused in answer.get("Errors", ()):
                raise PermissionDenied(
                    f"{refused.get('Key')} in s3://{self.name} can't be deleted: "
                    f"{refused.get('Code')}"
                )

    def head(self, key: str) -> Any:
        """What the server says of an object; None when it is not there."""
        try:
            with self.errors(key):
                return self.client.head_object(**self.at(key))
        except FileNotFoundError:
            return None

    def find(self, prefix: str) -> Iterator[Found]:
        """Every object whose key begins so, by key."""
        with self.errors(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.name, Prefix=self.key(prefix)
            )
            for page in pages:
                for item in page.get("Contents", ()):
                    time_ = item["LastModified"].timestamp()
                    yield Found(self._relative(item["Key"]), int(item["Size"]), time_)

    def uploads(self, prefix: str) -> Iterator[tuple[str, str, float]]:
        """Multipart uploads that were not completed: (key, id, begun in Unix seconds)."""
        with self.errors(prefix):
            pages = self.client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.name, Prefix=self.key(prefix)
            )
            for page in pages:
                for item in page.get("Uploads", ()):
                    begun = item["Initiated"].timestamp()
                    yield self._relative(item["Key"]), item["UploadId"], begun

    def abort(self, key: str, upload: str) -> None:
        """Forget a multipart upload; none is fine."""
        with contextlib.suppress(FileNotFoundError), self.errors(key):
            self.client.abort_multipart_upload(**self.at(key), UploadId=upload)

    def at(self, key: str) -> dict[str, str]:
        """The arguments that name an object."""
        return {"Bucket": self.name, "Key": self.key(key)}

    def _relative(self, key: str) -> str:
        return key[len(self.prefix) + 1 :] if self.prefix else key

    @contextlib.contextmanager
    def errors(self, key: str = "") -> Iterator[None]:
        """What the SDK raises, in this project's words.

        Raises:
            FileNotFoundError: no such object.
            NotFound: no such bucket. PermissionDenied, Unauthenticated: credentials
            that are wrong, or none. Unavailable: nobody answers, or too busy.
            FailedPrecondition: another region. Unimplemented: not that protocol.
        """
        try:
            yield
        except (refusals.BotoCoreError, refusals.ClientError) as error:
            raise self._error(error, key) from error

    def _error(self, error: Exception, key: str) -> ArrieroError | FileNotFoundError:
        where = f"the store {self.url}{self._at}"
        if isinstance(error, refusals.ClientError):
            return self._refusal(error, key, where)
        if isinstance(error, refusals.NoCredentialsError | refusals.CredentialRetrievalError):
            return Unauthenticated(
                f"there are no credentials for {where}; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or give this service a role",
                reason="NO_CREDENTIALS",
            )
        if isinstance(error, refusals.PartialCredentialsError):
            return Unauthenticated(f"half of the credentials for {where} is missing: {error}")
        if isinstance(error, refusals.NoRegionError):
            return InvalidArgument.field("AWS_REGION", f"is not set; {where} needs a region")
        if isinstance(error, refusals.HTTPClientError | refusals.ConnectionError):
            return Unavailable(
                f"{where} does not answer ({type(error).__name__}); is the endpoint right, and "
                "does its server run?"
            )
        return Unavailable(f"{where} could not be asked: {type(error).__name__}: {error}")

    def _refusal(
        self, error: refusals.ClientError, key: str, where: str
    ) -> ArrieroError | FileNotFoundError:
        code = _code(error)
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code == "NoSuchBucket":
            return NotFound(
                f"there is no bucket {self.name!r}{self._at}; make it, or name another in "
                "ARRIERO_STORE",
                reason="NO_BUCKET",
            )
        if code in _MISSING:
            return FileNotFoundError(self.shown(key))
        if code in _DENIED or status in (401, 403):
            return PermissionDenied(
                f"{where} refuses these credentials ({code}); check the access key and what its "
                "policy allows: to list, get, put and delete objects of this bucket",
                metadata={"code": code},
            )
        if code in _ELSEWHERE:
            return FailedPrecondition(
                f"the bucket {self.name!r} is in another region ({code}); set AWS_REGION"
            )
        if code in _AGAIN or (status >= 500 and status != 501):
            return Unavailable(f"{where} is too busy, or broken ({code}); try again")
        if code == "NotImplemented" or status in (405, 501):
            return Unimplemented(f"{where} does not do what a store needs ({code})")
        return FailedPrecondition(
            f"{where} refuses {key or 'a request'}: {code}", metadata={"code": code}
        )


def parse(url: str) -> tuple[str, str]:
    """Bucket and prefix of `s3://bucket/prefix`.

    Raises:
        InvalidArgument: anything else, or credentials in it.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise InvalidArgument.field(
            "store", "holds credentials; give them by AWS_ACCESS_KEY_ID, a profile or a role"
        )
    if parts.scheme != "s3" or not _BUCKET.fullmatch(parts.netloc) or parts.query or parts.fragment:
        raise InvalidArgument.field("store", f"{url!r}: expected s3://bucket/prefix")
    path = parts.path.strip("/")
    return parts.netloc, str(safe_relative(path, field="store")) if path else ""


def checksum(data: bytes) -> str:
    """The sha256 that the server compares with what arrived."""
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def _code(error: refusals.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
