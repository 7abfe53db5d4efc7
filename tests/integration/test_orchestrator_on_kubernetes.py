"""An orchestrator and real replicas on a cluster that is a fake: models change, numbers change,
and no caller notices."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arriero.client import Client
from arriero.errors import FailedPrecondition
from arriero.testing.cluster import FakeCluster


@pytest.fixture(params=["sharing", "fetching"])
def client(request: pytest.FixtureRequest) -> Any:
    """Of an orchestrator whose replicas share its store, or have their models brought."""
    return request.getfixturevalue(request.param)


class Load:
    """Callers that ask again and again, and what went wrong."""

    def __init__(self, client: Client, callers: int = 2) -> None:
        self.failures: list[BaseException] = []
        self.answers = 0
        self._client = client
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(callers)]

    def _ask(self) -> None:
        endpoint = self._client.endpoint("herd")
        while not self._over.is_set():
            try:
                for _ in endpoint.generate("llama", temperature=0, max_tokens=8):
                    pass
                self.answers += 1
            except BaseException as error:
                self.failures.append(error)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)


def test_models_and_numbers_change_under_load_without_one_failed_request(
    client: Client,
    cluster: FakeCluster,
    tiny_gguf: Path,
    tmp_path: Path,
    wait_until: Callable[..., Any],
) -> None:
    made = []
    for version in ("v1", "v2"):
        files = tmp_path / version
        files.mkdir()
        os.link(tiny_gguf, files / "herd.gguf")
        (files / "version.txt").write_text(version)  # another artifact
        made.append(client.artifacts.push(files, kind="gguf", name="herd").digest)

    def settled(digest: str, count: int) -> bool:
        found = client.endpoints.get("herd")
        ready = found.ready_replicas == found.desired_replicas == len(found.replicas) == count
        return ready and {r.digest for r in found.replicas} == {digest}

    client.endpoints.create("herd", made[0], context=256)
    wait_until(lambda: settled(made[0], 1), 300, "the first replica")
    with Load(client) as load:
        wait_until(lambda: load.answers > 5, what="answers")
        client.endpoints.update("herd", made[1], context=256)
        wait_until(lambda: settled(made[1], 1), 300, "the other model")
        for count in (3, 1):
            client.endpoints.scale("herd", count)
            wait_until(lambda n=count: settled(made[1], n), 300, f"{count} replicas")
        asked = load.answers
        wait_until(lambda: load.answers > asked, what="answers at the end")
    assert load.failures == []

    replica = client.endpoints.get("herd").replicas[0]
    assert replica.address.endswith(":50051")
    client.endpoints.delete("herd")
    wait_until(lambda: not cluster.all("deployments") and not cluster.all("pods"), what="its end")


def test_a_number_above_an_autoscalers_is_refused(
    sharing: Client, cluster: FakeCluster, tiny_gguf: Path, wait_until: Callable[..., Any]
) -> None:
    client = sharing
    digest = client.artifacts.push(tiny_gguf, kind="gguf", name="herd").digest
    client.endpoints.create("herd", digest, context=256)
    target = {"kind": "Deployment", "name": "herd-endpoint-herd"}
    spec = {"scaleTargetRef": target, "minReplicas": 1, "maxReplicas": 2}
    cluster.put("horizontalpodautoscalers", {"metadata": {"name": "theirs"}, "spec": spec})

    def refused() -> bool:
        try:
            client.endpoints.scale("herd", 3)
        except FailedPrecondition as error:
            return "scaled by theirs, up to 2 replicas" in error.message
        return False

    wait_until(refused, what="the refusal")
