"""A replica's files, out of a store elsewhere into a volume: what its init container does.

Responsibility: the artifacts that a replica will read, and no others, verified and whole
before it starts, as a store of its own. So the replica needs no access to the bucket.
Does not know what the artifacts are.

    ARRIERO_STORE       the store, s3://...
    ARRIERO_DELIVERY    the volume
    ARRIERO_ARTIFACTS   digests, with spaces between them
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from arriero import rpc
from arriero.errors import ArrieroError, InvalidArgument
from arriero.settings import StoreSettings
from arriero.store import Store

__all__ = ["deliver"]

logger = logging.getLogger(__name__)


def deliver(source: Store, digests: Sequence[str], target: Path) -> None:
    """Bring artifacts, each at one instant; those that are there already stay.

    Raises:
        NotFound, DataLoss, DiskFull, Unavailable: one cannot be brought; it is named.
    """
    volume = Store.open(target)
    for number, digest in enumerate(digests, 1):
        found = source.get(digest)
        manifest = found.manifest
        logger.info(
            "%d of %d: %s %s, %s, %d bytes",
            *(number, len(digests), manifest.kind, manifest.name, digest, manifest.size),
        )
        volume.receive(found)
    logger.info("all is there, verified")


def run(env: Mapping[str, str]) -> None:
    """Deliver what the environment says.

    Raises:
        InvalidArgument: a variable is missing. Otherwise as `deliver`.
    """
    for name in ("ARRIERO_DELIVERY", "ARRIERO_ARTIFACTS"):
        if not env.get(name):
            raise InvalidArgument.field(name, "is not set; the orchestrator sets it")
    source = Store.open(StoreSettings.from_env(env).url)
    deliver(source, env["ARRIERO_ARTIFACTS"].split(), Path(env["ARRIERO_DELIVERY"]))


def main() -> None:
    """Exit 1 with one line when something cannot be delivered."""
    rpc.logs.configure("inference")
    try:
        run(os.environ)
    except ArrieroError as error:
        logger.error("%s", error.message)
        sys.exit(1)


if __name__ == "__main__":
    main()
