"""The dataset service's face: proto in, operation out.

Responsibility: hand requests to the engine. Does not know what preparing is.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import grpc.aio
from google.longrunning import operations_pb2

from arriero.dataset import preview, sources
from arriero.dataset.extension import spec as extension_spec
from arriero.dataset.report import NAMED_IN_MESSAGE, histogram
from arriero.dataset.spec import SEMANTICS, check, hub_token, resolve
from arriero.dataset.transform import spec as transform_spec
from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.operations.defaults import with_defaults
from arriero.operations.engine import Engine
from arriero.operations.inputs import check_inputs
from arriero.operations.kinds import ResolveContext, WorkKind
from arriero.settings import SourceSettings
from arriero.store import Store
from arriero.v1 import dataset_pb2, dataset_pb2_grpc

# Defaults and limits of previews.
SAMPLES, MOST_SAMPLES = 3, 20
ROWS, MOST_ROWS = 1000, 10_000
MOST_FETCHED = 64 * 1024 * 1024

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

    def __init__(self, engine: Engine, store: Store, allowed: SourceSettings) -> None:
        self._engine = engine
        self._store, self._sources = store, allowed

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
        return await asyncio.to_thread(self._preview, request)

    def _preview(
        self, request: dataset_pb2.PreviewDatasetRequest
    ) -> dataset_pb2.PreviewDatasetResponse:
        samples, rows = request.samples or SAMPLES, request.rows or ROWS
        for name, value, most in (("samples", samples, MOST_SAMPLES), ("rows", rows, MOST_ROWS)):
            if not 0 < value <= most:
                raise InvalidArgument.field(name, f"{value}; expected 1 to {most}")
        spec = with_defaults(request.spec)
        check(spec, ResolveContext(self._store, {}, self._sources))
        inputs = check_inputs(spec, self._store)
        located = sources.look_up(
            sources.locate_all(spec.sources, inputs.get("rows", ()), self._store, self._sources),
            hub_token(spec),
        )
        away = sum(source.size for source in located if not source.here)
        if away > MOST_FETCHED:
            raise FailedPrecondition(
                f"sources: {away} bytes of them are elsewhere; a preview fetches at most "
                f"{MOST_FETCHED}: name a smaller file, or a copy of the first rows"
            )
        with tempfile.TemporaryDirectory(prefix="arriero-preview-") as place:
            located = sources.fetch(located, Path(place), token=hub_token(spec))
            found = preview.preview(
                spec, inputs["tokenizer"][0], located, samples=samples, rows=rows
            )
        return dataset_pb2.PreviewDatasetResponse(
            samples=[_sample(sample, found.special) for sample in found.samples],
            rows=found.rows,
            all_rows=found.all_rows,
            tokens=found.tokens,
            trained_tokens=found.trained_tokens,
            truncated_rows=found.truncated,
            duplicate_rows=found.duplicates,
            lengths=[
                dataset_pb2.LengthBucket(**bucket) for bucket in histogram(found.lengths.items())
            ],
            bad_rows=[str(problem) for problem in found.bad.named[:NAMED_IN_MESSAGE]],
            bad_row_count=found.bad.count,
            template=found.template,
            format=", ".join(found.formats),
        )

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


def _sample(sample: preview.Sample, special: frozenset[int]) -> dataset_pb2.PreviewSample:
    tokens = [
        dataset_pb2.PreviewToken(text=text, id=number, trained=trained, special=number in special)
        for number, text, trained in zip(sample.ids, sample.texts, sample.trained, strict=True)
    ]
    return dataset_pb2.PreviewSample(
        file=sample.row.file, row=sample.row.number, truncated=sample.truncated, tokens=tokens
    )
