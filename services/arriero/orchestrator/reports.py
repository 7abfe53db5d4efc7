"""Reports as messages.

Responsibility: from a report artifact to what its stage said. Does not know how
a report was made, nor gRPC calls.
"""

from __future__ import annotations

import json

from google.protobuf import json_format

from arriero.errors import DataLoss, FailedPrecondition, InvalidArgument
from arriero.store import Store
from arriero.v1 import dataset_pb2

__all__ = ["dataset_report"]

_FILE = "report.json"
_FORMAT = 1


def dataset_report(store: Store, ref: str) -> dataset_pb2.DatasetReport:
    """What a stage `dataset` did to its rows. Blocks.

    Args:
        store: that holds the report.
        ref: the stage's output `report`: digest, unique prefix or tag.

    Raises:
        InvalidArgument: an artifact of another kind, or another stage's report.
        NotFound: no such artifact, or its files were collected.
        FailedPrecondition: written by a newer version.
        DataLoss: the file is damaged.
    """
    artifact = store.get(ref)
    manifest = artifact.manifest
    expected = "expected the output `report` of a stage `dataset`"
    if manifest.kind != "report":
        raise InvalidArgument.field("ref", f"{ref!r} is a {manifest.kind}; {expected}")
    if _FILE not in {entry.path for entry in manifest.files}:
        raise InvalidArgument.field("ref", f"{ref!r} holds no {_FILE}; {expected}")
    try:
        found = json.loads(artifact.file(_FILE).read_bytes())
        kind, version = found.get("kind"), found.get("format")
        if kind != "dataset":
            raise InvalidArgument.field("ref", f"{ref!r} is a report of {kind!r}; {expected}")
        if version > _FORMAT:
            raise FailedPrecondition(
                f"{ref!r} has format {version}, this version knows up to {_FORMAT}; "
                "use the newer Arriero that wrote it"
            )
        return json_format.ParseDict(found, dataset_pb2.DatasetReport(), ignore_unknown_fields=True)
    except (ValueError, TypeError, AttributeError, json_format.ParseError) as error:
        raise DataLoss(f"{_FILE} of {ref!r} is damaged: {error}; prepare it again") from error
