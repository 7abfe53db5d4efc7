"""A server of S3 in a process of its own: moto's, with conditional puts that are atomic.

`python tests/s3server.py PORT_FILE [ADDRESS]`: serves until its parent is gone.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

CONDITIONAL = threading.Lock()


class Handler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *_: Any) -> None:
        """Say nothing."""


def application(inner: Any) -> Any:
    def serve(environ: dict[str, Any], start: Any) -> Any:
        if environ["PATH_INFO"].startswith("/careless-"):  # as servers that know no conditions
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if "HTTP_IF_NONE_MATCH" not in environ:
            return inner(environ, start)
        with CONDITIONAL:  # moto looks, then writes
            return [b"".join(inner(environ, start))]

    return serve


def main() -> None:
    server = make_server(
        sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1",
        0,
        application(DomainDispatcherApplication(create_backend_app)),
        threaded=True,
        request_handler=Handler,
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = Path(sys.argv[1])
    path.with_suffix(".new").write_text(str(server.port))
    path.with_suffix(".new").rename(path)
    sys.stdin.read()  # its parent holds the other end
    os._exit(0)


if __name__ == "__main__":
    main()
