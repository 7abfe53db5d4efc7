"""The gRPC face of the training room.

Responsibility: hand requests to the engine. Has no logic; does not know how
models are trained.
"""

from __future__ import annotations

import grpc.aio
from google.longrunning import operations_pb2

from arriero.operations.engine import Engine
from arriero.operations.kinds import WorkKind
from arriero.rpc import Server
from arriero.training.spec import check, resolve
from arriero.v1 import training_pb2, training_pb2_grpc

__all__ = ["KINDS", "TrainingService", "register"]

KINDS = (
    WorkKind(
        "train",
        "arriero.training.job",
        training_pb2.TrainSpec,
        semantics=4,
        resolve=resolve,
        check=check,
    ),
)


class TrainingService(training_pb2_grpc.TrainingServiceServicer):
    """`arriero.v1.TrainingService`; its promises are in the proto."""

    def __init__(self, engine: Engine) -> None:
        """Serve what the engine does."""
        self.engine = engine

    async def Train(
        self,
        request: training_pb2.TrainRequest,
        context: grpc.aio.ServicerContext,  # type: ignore[type-arg]
    ) -> operations_pb2.Operation:
        """Start a training."""
        return await self.engine.start("train", request.spec, request.context)


def register(server: Server, engine: Engine) -> None:
    """Put the service on a server."""
    server.add(
        TrainingService(engine),
        training_pb2_grpc.add_TrainingServiceServicer_to_server,
        "arriero.v1.TrainingService",
    )
