"""A small S3: what a client asks it for to list and to read objects, over HTTP.

Responsibility: serve objects of buckets to whoever signs with the known key.
Checks no signature; does not know any client.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

__all__ = ["KEY", "serving_s3"]

# The access key that may read.
KEY = "AKIDLLAMA"

# Objects by key, by bucket.
Buckets = Mapping[str, Mapping[str, bytes]]
_DATE = "2026-01-01T00:00:00.000Z"
_HTTP_DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


@contextmanager
def serving_s3(buckets: Buckets) -> Iterator[str]:
    """A server's URL, for `AWS_ENDPOINT_URL`."""

    class Handler(_S3):
        held = buckets

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _S3(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    held: ClassVar[Buckets] = {}

    def do_HEAD(self) -> None:
        """As GET, without the body."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer one request."""
        url = urlsplit(self.path)
        bucket, _, key = unquote(url.path).lstrip("/").partition("/")
        if f"Credential={KEY}/" not in str(self.headers.get("authorization")):
            return self._error(403, "AccessDenied")
        objects = self.held.get(bucket)
        if objects is None:
            return self._error(404, "NoSuchBucket")
        if not key:
            return self._list(bucket, objects, parse_qs(url.query))
        if key not in objects:
            return self._error(404, "NoSuchKey")
        data, code, headers = objects[key], 200, {}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", "")):
            start, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, code = data[start : end + 1], 206
        return self._answer(data, code, headers)

    def _list(self, bucket: str, objects: Mapping[str, bytes], query: Mapping[str, Any]) -> None:
        prefix = query.get("prefix", [""])[0]
        delimiter = query.get("delimiter", [""])[0]
        contents, folders = [], set()
        for key, data in sorted(objects.items()):
            if not key.startswith(prefix):
                continue
            head, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if cut:
                folders.add(prefix + head + cut)
                continue
            contents.append(
                f"<Contents><Key>{escape(key)}</Key><LastModified>{_DATE}</LastModified>"
                f'<ETag>"x"</ETag><Size>{len(data)}</Size></Contents>'
            )
        common = [f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in folders]
        body = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult>'
            f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><MaxKeys>1000</MaxKeys>"
            f"<KeyCount>{len(contents) + len(common)}</KeyCount><IsTruncated>false</IsTruncated>"
            f"{''.join(contents)}{''.join(common)}</ListBucketResult>"
        )
        self._answer(body.encode(), 200, {"Content-Type": "application/xml"})

    def _error(self, code: int, name: str) -> None:
        body = f"<Error><Code>{name}</Code><Message>{name}</Message></Error>"
        self._answer(body.encode(), code, {"Content-Type": "application/xml"})

    def _answer(self, data: bytes, code: int, headers: Mapping[str, str]) -> None:
        self.send_response(code)
        self.send_header("Last-Modified", _HTTP_DATE)
        self.send_header("Content-Length", str(len(data)))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""
