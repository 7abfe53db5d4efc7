"""The gRPC face of the merging room.

Responsibility: hand requests to the engine. Has no logic; does not know how
weights are read or written.
"""

from __future__ import annotations

import grpc.aio
from google.longrunning import operations_pb2

from arriero.merging.export_spec import check_export, resolve_export
from arriero.merging.specs import check_import, check_merge, resolve_import, resolve_merge
from arriero.operations.engine import Engine
from arriero.operations.kinds import WorkKind
from arriero.rpc import Server
from arriero.v1 import merging_pb2, merging_pb2_grpc

__all__ = ["KINDS", "MergingService", "register"]

_JOB = "arriero.merging.job"
KINDS = (
    WorkKind(
        name="import",
        job_module=_JOB,
        spec_type=merging_pb2.ImportSpec,
        semantics=3,
        resolve=resolve_import,
        check=check_import,
    ),
    WorkKind(
        name="merge",
        job_module=_JOB,
        spec_type=merging_pb2.MergeSpec,
        semantics=4,
        resolve=resolve_merge,
        check=check_merge,
    ),
    WorkKind(
        name="export",
        job_module=_JOB,
        spec_type=merging_pb2.ExportSpec,
        semantics=1,
        resolve=resolve_export,
        check=check_export,
    ),
)


class MergingService(merging_pb2_grpc.MergingServiceServicer):
    """`arriero.v1.MergingService`; its promises are in the proto."""

    def __init__(self, engine: Engine) -> None:
        """Serve what the engine does."""
        self.engine = engine

    async def Import(
        self,
        request: merging_pb2.ImportRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> operations_pb2.Operation:
        """Start bringing weights in."""
        return await self.engine.start("import", request.spec, request.context)

    async def Merge(
        self,
        request: merging_pb2.MergeRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> operations_pb2.Operation:
        """Start folding adapters into a model."""
        return await self.engine.start("merge", request.spec, request.context)

    async def Export(
        self,
        request: merging_pb2.ExportRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> operations_pb2.Operation:
        """Start writing a model in another layout."""
        return await self.engine.start("export", request.spec, request.context)


def register(server: Server, engine: Engine) -> None:
    """Put the service on a server."""
    server.add(
        MergingService(engine),
        merging_pb2_grpc.add_MergingServiceServicer_to_server,
        "arriero.v1.MergingService",
    )
