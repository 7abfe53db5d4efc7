"""The `arriero` command against a running platform, and proof that it started nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from arriero.cli.app import app
from arriero.v1 import (
    dataset_pb2,
    dataset_pb2_grpc,
    merging_pb2,
    merging_pb2_grpc,
    quantization_pb2,
    quantization_pb2_grpc,
    training_pb2,
    training_pb2_grpc,
)

Arriero = Callable[..., Result]
ROW = '{"instruction": "a", "output": "b"}\n'
# Room, stub, method and request of every start call.
STARTS = [
    ("merging", merging_pb2_grpc.MergingServiceStub, "Import", merging_pb2.ImportRequest),
    ("merging", merging_pb2_grpc.MergingServiceStub, "Merge", merging_pb2.MergeRequest),
    (
        "dataset",
        dataset_pb2_grpc.DatasetServiceStub,
        "PrepareDataset",
        dataset_pb2.PrepareDatasetRequest,
    ),
    ("training", training_pb2_grpc.TrainingServiceStub, "Train", training_pb2.TrainRequest),
    (
        "quantization",
        quantization_pb2_grpc.QuantizationServiceStub,
        "Quantize",
        quantization_pb2.QuantizeRequest,
    ),
    (
        "quantization",
        quantization_pb2_grpc.QuantizationServiceStub,
        "Evaluate",
        quantization_pb2.EvaluateRequest,
    ),
]


@pytest.fixture(params=STARTS, ids=[s[2] for s in STARTS])
def start(request: pytest.FixtureRequest) -> Any:
    """One start call: room, stub, method and request."""
    return request.param


@pytest.fixture(scope="module")
def arriero(platform: Any) -> Arriero:
    """The `arriero` command in this process, which saves its start; answers as `Result`."""

    def run(*arguments: str, **extra: str) -> Result:
        env = {"ARRIERO_HOME": platform.env["ARRIERO_HOME"], "COLUMNS": "160", **extra}
        done = CliRunner().invoke(app, list(arguments), env=env)
        assert isinstance(done.exception, SystemExit | None), done.exception
        assert "Traceback" not in done.output
        return done

    return run


@pytest.fixture(scope="module")
def untouched(platform: Any, arriero: Arriero, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a platform holds that must not change: a function to look at it."""
    raw = tmp_path_factory.mktemp("raw") / "rows.jsonl"
    raw.write_text(ROW)
    assert arriero("artifacts", "push", str(raw), "dataset/raw:v1").exit_code == 0
    store = platform.home.root / "store"

    def look() -> tuple[Any, ...]:
        places = ("operations/*/*", "staging/*/*", "artifacts/*", "manifests/*", "tags/*/*/*")
        found = [str(path) for place in places for path in sorted(store.glob(place))]
        with platform.client() as client:
            return [run.id for run in client.list_runs()], client.endpoints.list(), found

    return look


@pytest.fixture
def nothing_starts(untouched: Callable[[], Any]) -> Iterator[None]:
    """No run is recorded, no job started, nothing written to the store."""
    before = untouched()
    yield
    assert untouched() == before
