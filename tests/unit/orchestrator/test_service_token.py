"""The orchestrator's own credentials are no fault of those who call it."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.longrunning import operations_pb2_grpc

from arriero.errors import FailedPrecondition
from arriero.orchestrator.clients import Rooms
from arriero.rpc import Server
from arriero.settings import ClientSettings, ServerSettings


async def test_a_room_that_refuses_the_orchestrators_token_is_named(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("right-token ada\n")
    server = Server(ServerSettings(token_file=tokens), name="dataset")
    server.add(
        operations_pb2_grpc.OperationsServicer(),
        operations_pb2_grpc.add_OperationsServicer_to_server,
        "google.longrunning.Operations",
    )
    rooms = Rooms({"dataset": await server.start()}, ClientSettings(token="wrong-token"))
    try:
        with pytest.raises(FailedPrecondition, match="the dataset service does not accept"):
            await rooms.cancel("dataset", "operations/x")
    finally:
        await rooms.close()
        await server.stop()
