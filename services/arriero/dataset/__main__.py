"""`python -m arriero.dataset`: the dataset service.

Responsibility: wiring only. Does not know any domain.
"""

from arriero import rpc
from arriero.dataset.service import DATASET, EXTEND_TOKENIZER, TRANSFORM, DatasetServicer
from arriero.operations.engine import Engine
from arriero.operations.serving import serve
from arriero.v1 import dataset_pb2, dataset_pb2_grpc


def register(server: rpc.Server, engine: Engine) -> None:
    """Add the service to a server."""
    server.add(
        DatasetServicer(engine, engine.store, engine.sources),
        dataset_pb2_grpc.add_DatasetServiceServicer_to_server,
        dataset_pb2.DESCRIPTOR.services_by_name["DatasetService"].full_name,
    )


if __name__ == "__main__":
    serve(service="dataset", kinds=[DATASET, EXTEND_TOKENIZER, TRANSFORM], register=register)
