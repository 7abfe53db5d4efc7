"""The room's gRPC service: protos in, operations out.

Responsibility: hand requests to the engine. Does not know GGUF.
"""

from __future__ import annotations

from google.longrunning import operations_pb2

from arriero.operations import Engine
from arriero.v1 import quantization_pb2 as pb
from arriero.v1 import quantization_pb2_grpc


class QuantizationServicer(quantization_pb2_grpc.QuantizationServiceServicer):
    """`arriero.v1.QuantizationService`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def Quantize(
        self, request: pb.QuantizeRequest, context: object
    ) -> operations_pb2.Operation:
        """Start converting and quantizing."""
        return await self._engine.start("quantize", request.spec, request.context)

    async def Evaluate(
        self, request: pb.EvaluateRequest, context: object
    ) -> operations_pb2.Operation:
        """Start measuring and choosing."""
        return await self._engine.start("evaluate", request.spec, request.context)
