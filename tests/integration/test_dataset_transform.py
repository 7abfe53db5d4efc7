"""Transforms through a real service, real jobs and a real endpoint: kills, sharing, retries."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from google.longrunning import operations_pb2, operations_pb2_grpc

from arriero import errors, rpc
from arriero.settings import ClientSettings
from arriero.store import Store
from arriero.v1 import dataset_pb2, dataset_pb2_grpc, types_pb2


class Place:
    """A home, an endpoint, and the service that may be killed and started again."""

    def __init__(self, root: Path, wait_until: Callable[..., Any]) -> None:
        self.root, self._wait_until = root, wait_until
        self.data, self.endpoint = root / "data", root / "endpoint"
        for directory in (self.data, self.endpoint):
            directory.mkdir()
        self.service: subprocess.Popen[bytes] | None = None
        self._chat = subprocess.Popen(
            [sys.executable, "-m", "arriero.testing.chat_server", self.endpoint]
        )
        wait_until((self.endpoint / "address").exists)

    def start(self) -> None:
        address = self.root / "address"
        address.unlink(missing_ok=True)
        self.service = subprocess.Popen(
            [sys.executable, "-m", "arriero.dataset"],
            env=os.environ
            | {
                "ARRIERO_STORE": str(self.root / "store"),
                "ARRIERO_LISTEN": "127.0.0.1:0",
                "ARRIERO_ADDRESS_FILE": str(address),
                "ARRIERO_ALLOWED_PATHS": str(self.data),
            },
        )
        self._wait_until(address.exists, what="the service starts")
        self.channel = rpc.connect_sync(address.read_text().strip(), ClientSettings())
        self.operations = operations_pb2_grpc.OperationsStub(self.channel)

    def begin(self, request_id: str, count: int, **fields: Any) -> str:
        rows = [{"q": f"question {i}"} for i in range(count)]
        (self.data / "rows.json").write_text(json.dumps(rows))
        spec = dataset_pb2.TransformSpec(
            sources=[str(self.data / "rows.json")],
            endpoint=(self.endpoint / "address").read_text(),
            model="tiny",
            prompt="{{ q }}",
            **fields,
        )
        context = types_pb2.StageContext(request_id=request_id, run=request_id, stage="t")
        request = dataset_pb2.TransformRequest(context=context, spec=spec)
        with rpc.translated():
            stub = dataset_pb2_grpc.DatasetServiceStub(self.channel)
            return str(stub.Transform(request, timeout=120).name)

    def wait(self, name: str) -> types_pb2.OperationResult:
        with rpc.translated():
            done = self.operations.WaitOperation(
                operations_pb2.WaitOperationRequest(name=name), timeout=300
            )
        if done.HasField("error"):
            raise rpc.from_status(done.error)
        result = types_pb2.OperationResult()
        assert done.response.Unpack(result)
        return result

    def asked(self) -> list[str]:
        path = self.endpoint / "requests.jsonl"
        return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]

    def logged(self) -> int:
        """Answers that are durable."""
        found = list((self.root / "store/staging/dataset").glob("*/checkpoints/answers.jsonl"))
        return sum(path.read_bytes().count(b"\n") for path in found)

    def rules(self, *rules: dict[str, Any]) -> None:
        new = self.endpoint / "rules.new"
        new.write_text(json.dumps(rules))
        new.replace(self.endpoint / "rules.json")  # read at each request

    def job(self) -> psutil.Process:
        assert self.service is not None
        found = psutil.Process(self.service.pid).children()
        return next(process for process in found if "arriero.dataset.job" in process.cmdline())

    def kill(self) -> None:
        assert self.service is not None
        self.service.kill()
        self.service.wait()
        self.channel.close()

    def close(self) -> None:
        self._chat.kill()
        self._chat.wait()
        if self.service is not None and self.service.poll() is None:
            self.channel.close()
            self.service.send_signal(signal.SIGTERM)
            assert self.service.wait(120) == 0


@pytest.fixture
def place(tmp_path: Path, wait_until) -> Iterator[Place]:
    made = Place(tmp_path, wait_until)
    with contextlib.closing(made):
        made.start()
        yield made


def check_paid_once(place: Place, count: int) -> None:
    """Only what was under way when the kill came may have been asked for twice."""
    times = Counter(place.asked())
    assert len(times) == count
    twice = [prompt for prompt, number in times.items() if number > 1]
    assert len(twice) <= 4
    assert len(place.asked()) <= count + 4


def test_a_killed_job_goes_on_without_paying_twice(place: Place, wait_until) -> None:
    place.rules({"match": "", "delay": 0.5})  # far from done when the kill comes
    name = place.begin("a", 60, concurrency=4)
    wait_until(lambda: place.logged() >= 5, what="answers are kept")
    place.job().kill()
    place.rules({"match": ""})
    result = place.wait(name)
    assert result.outputs[0].metrics["rows"] == 60
    check_paid_once(place, 60)


def test_a_killed_service_goes_on_without_paying_twice(place: Place, wait_until) -> None:
    place.rules({"match": "", "delay": 0.5})  # far from done when the kill comes
    name = place.begin("a", 60, concurrency=4)
    wait_until(lambda: place.logged() >= 5, what="answers are kept")
    job = place.job()
    place.kill()
    wait_until(lambda: not job.is_running(), what="the job follows its service")
    place.rules({"match": ""})
    place.start()
    assert place.wait(name).outputs[0].metrics["rows"] == 60
    check_paid_once(place, 60)


def test_equal_work_in_flight_is_shared_between_runs(place: Place) -> None:
    place.rules({"match": "", "delay": 0.05})
    first = place.begin("run-1", 40, concurrency=4)
    second = place.begin("run-2", 40, concurrency=8)
    one, two = place.wait(first), place.wait(second)
    assert [o.digest for o in one.outputs] == [o.digest for o in two.outputs]
    assert set(Counter(place.asked()).values()) == {1}
    store = Store.open(place.root / "store")
    assert len((store.get(one.outputs[0].digest).path / "rows.jsonl").read_text().split("\n")) == 41


def test_failed_rows_are_named_and_raising_the_share_pays_for_nothing_again(place: Place) -> None:
    place.rules({"match": "question 7", "status": 400, "message": "refused"})
    with pytest.raises(errors.FailedPrecondition, match=r"1 of 9 rows failed.*refused"):
        place.wait(place.begin("a", 9))
    result = place.wait(place.begin("b", 9, max_failed_share=0.2))
    assert [output.name for output in result.outputs] == ["rows", "report"]
    assert result.outputs[0].metrics["failed_rows"] == 1
    times = Counter(place.asked())
    assert {times.pop("question 7"), *times.values()} == {2, 1}
