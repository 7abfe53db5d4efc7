"""The toy room's service: `python -m toyroom_service`."""

import json
import os

from arriero.errors import InvalidArgument
from arriero.operations import Engine, ResolveContext, Resolved, WorkKind, serve
from arriero.rpc import Server
from arriero.v1 import merging_pb2, merging_pb2_grpc


def resolve_import(spec: merging_pb2.ImportSpec, context: ResolveContext) -> Resolved:
    resolved = merging_pb2.ImportSpec()
    resolved.CopyFrom(spec)
    if not spec.HasField("dtype"):
        resolved.dtype = "bfloat16"
    try:
        order = json.loads(spec.source)
    except ValueError as error:
        raise InvalidArgument.field("source", f"is not JSON: {error}") from error
    return Resolved(
        resolved,
        disk_bytes=order.get("disk", 1000),
        cacheable=not order.get("uncacheable"),
        unkeyed=("token_secret",),
    )


def resolve_merge(spec: merging_pb2.MergeSpec, context: ResolveContext) -> Resolved:
    return Resolved(spec)


KINDS = [
    WorkKind("import", "toyroom_job", merging_pb2.ImportSpec, 1, resolve_import),
    WorkKind("merge", "toyroom_job", merging_pb2.MergeSpec, 1, resolve_merge),
]


class Toy(merging_pb2_grpc.MergingServiceServicer):
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def Import(self, request, context):
        return await self.engine.start("import", request.spec, request.context)

    async def Merge(self, request, context):
        return await self.engine.start("merge", request.spec, request.context)


def register(server: Server, engine: Engine) -> None:
    server.add(
        Toy(engine),
        merging_pb2_grpc.add_MergingServiceServicer_to_server,
        "arriero.v1.MergingService",
    )


if __name__ == "__main__":
    os.umask(0o022)
    serve(service="merging", kinds=KINDS, register=register)
