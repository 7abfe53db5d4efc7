"""The dataset service's face: proto in, operation out.

Responsibility: hand requests to the engine. Does not know what preparing is.
"""

from __future__ import annotations

from typing import Any

import grpc.aio
from google.longrunning import operations_pb2

from arriero.dataset.extension import spec as extension_spec
from arriero.dataset.spec import SEMANTICS, check, resolve
from arriero.dataset.transform import spec as transform_spec
from arriero.errors import Unimplemented
from arriero.operations.engine import Engine
from arriero.operations.kinds import WorkKind
from arriero.v1 import dataset_pb2, dataset_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]

DATASET = WorkKind(
    name="dataset",
    job_module="arriero.dataset.job",
    spec_type=dataset_pb2.DatasetSpec,
    semantics=SEMANTICS,
    resolve=resolve,
    check=check,
)

EXTEND_TOKENIZER = WorkKind(
    name="extend_tokenizer",
    job_module="arriero.dataset.job",
    spec_type=dataset_pb2.ExtendTokenizerSpec,
    semantics=extension_spec.SEMANTICS,
    resolve=extension_spec.resolve,
    check=extension_spec.check,
)
TRANSFORM = WorkKind(
    name="transform",
    job_module="arriero.dataset.job",
    spec_type=dataset_pb2.TransformSpec,
    semantics=transform_spec.SEMANTICS,
    resolve=transform_spec.resolve,
    check=transform_spec.check,
)


class DatasetServicer(dataset_pb2_grpc.DatasetServiceServicer):
    """Serves `arriero.v1.DatasetService`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def PrepareDataset(
        self,
        request: dataset_pb2.PrepareDatasetRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> operations_pb2.Operation:
        """Start preparing a dataset."""
        return await self._engine.start(DATASET.name, request.spec, request.context)

    async def PreviewDataset(
        self,
        request: dataset_pb2.PreviewDatasetRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> dataset_pb2.PreviewDatasetResponse:
        """Render and count the first rows."""
        raise Unimplemented("previews are not part of this build yet")

    async def ExtendTokenizer(
        self,
        request: dataset_pb2.ExtendTokenizerRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> operations_pb2.Operation:
        """Start extending a vocabulary."""
        return await self._engine.start(EXTEND_TOKENIZER.name, request.spec, request.context)

    async def Transform(
        self,
        request: dataset_pb2.TransformRequest,
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> operations_pb2.Operation:
        """Start rewriting rows through a model."""
        return await self._engine.start(TRANSFORM.name, request.spec, request.context)
