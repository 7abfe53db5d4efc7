"""Endpoints, asyncio: create, change, scale, delete.

Responsibility: one method per thing that a caller may ask about what is served. Does
not know replicas, nor how text is asked of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from arriero import rpc
from arriero.client.connection import Connection
from arriero.client.reading import word_for
from arriero.errors import InvalidArgument
from arriero.v1 import inference_pb2, pipeline_pb2
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import orchestrator_pb2_grpc as stubs

__all__ = ["AsyncEndpoints"]

# Inside of the class `list` means its method.
_Endpoints: TypeAlias = list[pb.Endpoint]


class AsyncEndpoints:
    """What is served; `AsyncClient.endpoints`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def create(
        self, name: str, model: str, *, replicas: int = 1, **settings: Any
    ) -> pb.Endpoint:
        """Serve a gguf artifact under a new name.

        Args:
            name: of the endpoint.
            model: digest or reference of the gguf artifact.
            replicas: processes to serve it with.
            settings: further fields of a deploy stage: `context=8192`, `slots=8`,
                `rope="ntk"`, ...

        Raises:
            AlreadyExists: the name is in use; `update` replaces.
            FailedPrecondition: the artifact is quarantined.
        """
        spec = _deploy_spec(name, model, replicas, settings)
        with rpc.translated():
            answer = await self._stub.CreateEndpoint(pb.CreateEndpointRequest(spec=spec))
            return answer.endpoint

    async def update(
        self, name: str, model: str, *, replicas: int = 1, **settings: Any
    ) -> pb.Endpoint:
        """Replace what an endpoint serves, one replica after the other; as `create`.

        Replicas and settings that are not given take their defaults, not what they were.
        """
        spec = _deploy_spec(name, model, replicas, settings)
        with rpc.translated():
            answer = await self._stub.UpdateEndpoint(pb.UpdateEndpointRequest(spec=spec))
            return answer.endpoint

    async def get(self, name: str, *, score: bool = False) -> pb.Endpoint:
        """An endpoint; with `score` its live replicas are compared with the golden logits."""
        request = pb.GetEndpointRequest(name=name, score=score)
        with rpc.translated():
            return (await self._stub.GetEndpoint(request)).endpoint

    async def list(self) -> _Endpoints:
        """All endpoints."""
        with rpc.translated():
            return [*(await self._stub.ListEndpoints(pb.ListEndpointsRequest())).endpoints]

    async def scale(self, name: str, replicas: int) -> pb.Endpoint:
        """Set the number of replicas; `get` tells when ready equals desired."""
        request = pb.ScaleEndpointRequest(name=name, replicas=replicas)
        with rpc.translated():
            return (await self._stub.ScaleEndpoint(request)).endpoint

    async def add_adapter(
        self, name: str, adapter: str, *, called: str = "", scale: float = 1.0
    ) -> pb.Endpoint:
        """Load a LoRA adapter into every replica, while it serves.

        Args:
            name: of the endpoint.
            adapter: digest or reference of what `quantize` with `adapter_only` made.
            called: name that requests choose it by; default: the artifact's own.
            scale: its change of the model is multiplied by this.

        Raises:
            AlreadyExists: the name is another adapter's.
            FailedPrecondition: it belongs to another model.
        """
        spec = inference_pb2.AdapterSpec(adapter=adapter, name=called, scale=scale)
        request = pb.AddEndpointAdapterRequest(name=name, adapter=spec)
        with rpc.translated():
            return (await self._stub.AddEndpointAdapter(request)).endpoint

    async def remove_adapter(
        self, name: str, called: str, *, allow_missing: bool = False
    ) -> pb.Endpoint:
        """Take an adapter away from every replica; answers under way are finished."""
        request = pb.RemoveEndpointAdapterRequest(
            name=name, adapter=called, allow_missing=allow_missing
        )
        with rpc.translated():
            return (await self._stub.RemoveEndpointAdapter(request)).endpoint

    async def delete(self, name: str, *, allow_missing: bool = False) -> None:
        """Drain and remove the replicas, and the name."""
        request = pb.DeleteEndpointRequest(name=name, allow_missing=allow_missing)
        with rpc.translated():
            await self._stub.DeleteEndpoint(request)

    @property
    def _stub(self) -> stubs.EndpointServiceAsyncStub:
        return stubs.EndpointServiceStub(self._connection.channel)


def _deploy_spec(
    name: str, model: str, replicas: int, settings: Mapping[str, Any]
) -> pipeline_pb2.DeploySpec:
    words = {
        field.name: {word: settings[field.name]}
        for field in pipeline_pb2.DeploySpec.DESCRIPTOR.fields
        if (word := word_for(field)) and isinstance(settings.get(field.name), str)
    }
    fields = {**settings, **words}
    try:
        return pipeline_pb2.DeploySpec(endpoint=name, model=model, replicas=replicas, **fields)
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"no deployment can be set like that: {error}") from None
