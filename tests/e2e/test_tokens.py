"""Who has no token, or a wrong one, gets in nowhere; who has one is known by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.errors import Unauthenticated
from arriero.gates.golden import Golden
from arriero.rpc.channel import connect_sync
from arriero.rpc.status import translated
from arriero.settings import ClientSettings
from arriero.store import ManifestDraft, Store
from arriero.testing.models import VOCABULARY
from arriero.v1 import inference_pb2, inference_pb2_grpc

Write = Callable[..., Path]

TOKEN = "a-token-of-the-tests-0123456789"


@pytest.fixture(scope="module")
def guarded(platform_at: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """All services, asking for a token."""
    tokens = tmp_path_factory.mktemp("tokens") / "tokens"
    tokens.write_text(f"# who may call\n{TOKEN} ada\nanother-{TOKEN} bob\n")
    with platform_at(ARRIERO_SERVER_TOKEN_FILE=str(tokens)) as made:
        yield made


@pytest.mark.parametrize(
    ("token", "says"),
    [("", "no bearer token"), (f"{TOKEN}x", "is not one that this server")],
    ids=["missing", "wrong"],
)
def test_without_a_right_token_nobody_gets_in(
    token: str, says: str, guarded: Any, tiny_pipeline: Write, tmp_path: Path
) -> None:
    path = tiny_pipeline(tmp_path)
    for arguments in (["run", str(path)], ["artifacts", "gc"]):
        done = guarded.cli(*arguments, "--output", "json", check=False, ARRIERO_TOKEN=token)
        assert done.returncode == 2
        error = json.loads(done.stderr)["error"]
        assert error["code"] == "UNAUTHENTICATED"
        assert says in error["message"]
        assert "ARRIERO_TOKEN" in error["message"]
        assert TOKEN not in done.stderr
    assert not [*(guarded.home.root / "store").glob("operations/*/*/operation.json")]


@pytest.mark.parametrize("token", [None, "wrong"])
def test_each_room_asks_for_itself(token: str | None, start: tuple[Any, ...], guarded: Any) -> None:
    room, stub, method, request = start
    address = guarded.home.running()["services"][room]["address"]
    channel = connect_sync(address, ClientSettings(token=token))
    with channel, pytest.raises(Unauthenticated), translated():
        getattr(stub(channel), method)(request())


def test_with_a_token_everything_works_between_the_services_too(
    guarded: Any, tiny_gguf: Path, tmp_path: Path
) -> None:
    store = Store.open(guarded.home.store)
    staging = store.staging("tests", "golden")
    even = np.full((4, VOCABULARY), -np.log(VOCABULARY), dtype=np.float16)
    Golden(np.arange(4, dtype=np.int32), np.array([4], dtype=np.int32), even).write(staging)
    golden = store.publish(staging, ManifestDraft(kind="report")).digest
    path = tmp_path / "serve.yaml"
    path.write_text(
        f"""
name: serve
stages:
- {{name: file, import: {{source: {tiny_gguf}}}}}
- {{name: live, deploy: {{model: file, endpoint: live, golden: "{golden}", context: 256,
    gates: {{serve.smoke: warn}}}}}}
"""
    )
    done = guarded.cli("run", str(path), "--output", "json", ARRIERO_TOKEN=TOKEN)
    run = json.loads(done.stdout)
    assert run["state"] == "RUN_STATE_SUCCEEDED"
    assert run["owner"] == "ada"
    shown = guarded.cli("endpoints", "get", "live", "--output", "json", ARRIERO_TOKEN=TOKEN)
    (replica,) = json.loads(shown.stdout)["replicas"]
    assert replica["kl_divergence"] > 0  # the orchestrator was let in
    text = guarded.cli("generate", "live", "Name", "--max-tokens", "3", ARRIERO_TOKEN=TOKEN)
    assert text.stdout.strip("\n")
    with connect_sync(replica["address"]) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(Unauthenticated), translated():
            stub.GetModel(inference_pb2.GetModelRequest())
    for log in guarded.home.logs.iterdir():
        assert TOKEN not in log.read_text(), log
