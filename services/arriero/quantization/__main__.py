"""`python -m arriero.quantization`: the quantization service.

Responsibility: wiring. Knows nothing of the work.
"""

from __future__ import annotations

from arriero import operations, rpc
from arriero.operations import Engine
from arriero.quantization.kinds import WORK_KINDS
from arriero.quantization.service import QuantizationServicer
from arriero.v1 import quantization_pb2, quantization_pb2_grpc


def register(server: rpc.Server, engine: Engine) -> None:
    """Put the room's service on its server."""
    name = quantization_pb2.DESCRIPTOR.services_by_name["QuantizationService"].full_name
    server.add(
        QuantizationServicer(engine),
        quantization_pb2_grpc.add_QuantizationServiceServicer_to_server,
        name,
    )


def main() -> None:
    """Run until a signal."""
    operations.serve(service="quantization", kinds=WORK_KINDS, register=register)


if __name__ == "__main__":
    main()
