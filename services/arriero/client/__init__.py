"""The Python client, blocking and asyncio.

Responsibility: everything that a program may ask of the platform. Does not know
how the platform does it.

    Client, AsyncClient    runs, artifacts, endpoints, and text from endpoints
    load_pipeline          a pipeline file to a message, with positions
    pipeline_schema        the JSON Schema of pipeline files, for editors
    Sampling               parameters of generate and chat

The asyncio client is the implementation; `Client` runs it on a loop of its own
in a thread, so that both behave alike.
"""

from arriero.client.address import orchestrator_address
from arriero.client.aio import AsyncClient
from arriero.client.artifacts import AsyncArtifacts
from arriero.client.endpoint import AsyncEndpoint, AsyncStream, Sampling
from arriero.client.endpoints import AsyncEndpoints
from arriero.client.pipeline import (
    PipelineFile,
    Position,
    absolute_source,
    load_pipeline,
    parse_pipeline,
)
from arriero.client.schema import pipeline_schema
from arriero.client.sync import Artifacts, Client, Endpoints
from arriero.client.sync_endpoint import Endpoint, Stream

__all__ = [
    "Artifacts",
    "AsyncArtifacts",
    "AsyncClient",
    "AsyncEndpoint",
    "AsyncEndpoints",
    "AsyncStream",
    "Client",
    "Endpoint",
    "Endpoints",
    "PipelineFile",
    "Position",
    "Sampling",
    "Stream",
    "absolute_source",
    "load_pipeline",
    "orchestrator_address",
    "parse_pipeline",
    "pipeline_schema",
]
