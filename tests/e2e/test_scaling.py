"""Replicas come and go under load, and no caller notices."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest

TOKENS = 40


class Load:
    """Callers that ask again and again; what went wrong, and who answered."""

    def __init__(self, client: Any, callers: int) -> None:
        self.failures: list[BaseException] = []
        self.answered: Counter[str] = Counter()
        self._client = client
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(callers)]

    def _ask(self) -> None:
        endpoint = self._client.endpoint("herd")
        number = 0
        while not self._over.is_set():
            number += 1
            stream = endpoint.generate(
                f"Question {number}", temperature=0, max_tokens=TOKENS, ignore_eos=True
            )
            try:
                for _ in stream:
                    pass
                assert stream.finish_reason == "length"
                assert stream.usage.completion_tokens == TOKENS
                self.answered[stream.replica] += 1
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

    def newly(self) -> set[str]:
        """Who has answered since the last call."""
        found = set(self.answered)
        self.answered.clear()
        return found


@pytest.fixture(scope="module")
def served(platform: Any, tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A platform that serves the tiny model as `herd`."""
    files = tmp_path_factory.mktemp("herd")
    os.link(tiny_gguf, files / "herd.F16.gguf")
    platform.cli("artifacts", "push", str(files), "gguf/herd:v1")
    platform.cli("endpoints", "create", "herd", "gguf/herd:v1", "--context", "256")
    return platform


def replicas(served: Any) -> list[psutil.Process]:
    found: list[psutil.Process] = served.processes("arriero.inference")
    return found


def test_an_endpoint_scales_up_and_down_under_load_without_one_failed_request(
    served: Any, wait_until: Callable[..., Any]
) -> None:
    with served.client() as client, Load(client, 6) as load:
        wait_until(lambda: sum(load.answered.values()) > 6, what="answers")
        served.cli("endpoints", "scale", "herd", "--replicas", "3")
        load.newly()
        # New ones are found within seconds.
        wait_until(lambda: len(load.answered) == 3, 300, "answers of all three")
        served.cli("endpoints", "scale", "herd", "--replicas", "1")
        wait_until(lambda: len(replicas(served)) == 1, what="the end of two")
        load.newly()
        wait_until(lambda: sum(load.answered.values()) > 6, what="what they answered is told")
        load.newly()
        wait_until(lambda: sum(load.answered.values()) > 6, what="answers")
    assert load.failures == []
    assert len(load.newly()) == 1


def test_a_replica_that_is_killed_costs_what_it_was_answering_and_is_replaced(
    served: Any, wait_until: Callable[..., Any]
) -> None:
    served.cli("endpoints", "scale", "herd", "--replicas", "2")
    with served.client() as client, Load(client, 6) as load:
        wait_until(lambda: len(load.answered) == 2, what="answers of both")
        replicas(served)[0].kill()
        load.newly()
        wait_until(lambda: sum(load.answered.values()) > 20, what="answers of the other")
        wait_until(
            lambda: served.json("endpoints", "get", "herd", "--no-score")["ready_replicas"] == 2,
            what="another replica",
        )
        load.newly()
        wait_until(lambda: len(load.answered) == 2, what="answers of both again")
    # Half an answer cannot be taken back; whoever had none yet was served elsewhere.
    assert all(getattr(error, "code", "") == "UNAVAILABLE" for error in load.failures)
    assert len(load.failures) <= 6


def test_openais_client_and_tools_that_scrape_see_the_same_endpoint(served: Any) -> None:
    state = served.home.running()
    with openai.OpenAI(base_url=state["gateway"], api_key="none", max_retries=0) as client:
        answer = client.completions.create(model="herd", prompt="Hello", max_tokens=5)
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 5
    replicas = served.json("endpoints", "get", "herd", "--no-score")["replicas"]
    pages = [
        httpx2.get(f"http://{replica['metrics_address']}/metrics", timeout=120).text
        for replica in replicas
    ]
    assert any('arriero_num_requests_running{model_name="herd"} 0.0' in page for page in pages)
