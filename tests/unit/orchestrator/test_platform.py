"""The local platform: files between orchestrator and supervisor."""

from __future__ import annotations

import asyncio
import json

import pytest

from arriero.errors import DeadlineExceeded, InvalidArgument
from arriero.orchestrator.platform import Desired, LocalPlatform, Observed, ObservedReplica
from arriero.replica import ReplicaSettings

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64


def replica(state: str, digest: str = A) -> ObservedReplica:
    return ObservedReplica("r", "127.0.0.1:1", state, digest)


def test_a_desire_is_written_and_taken_back(tmp_path):
    platform = LocalPlatform(tmp_path)
    platform.apply(Desired("zh", A, 2, 7, ReplicaSettings(context=512)))
    written = json.loads((tmp_path / "desired" / "zh.json").read_text())
    environment = written.pop("environment")
    assert written == {"name": "zh", "digest": A, "replicas": 2, "generation": 7}
    assert environment["ARRIERO_MODEL"] == A
    assert environment["ARRIERO_MODEL_NAME"] == "zh"
    assert ReplicaSettings.from_env(environment) == ReplicaSettings(context=512)
    platform.remove("zh")
    platform.remove("zh")
    assert list((tmp_path / "desired").iterdir()) == []


def test_what_the_supervisor_wrote_is_read(tmp_path):
    platform = LocalPlatform(tmp_path)
    item = {"name": "zh-1", "address": "127.0.0.1:5", "state": "READY", "digest": A, "pid": 3}
    data = {"name": "zh", "replicas": [item], "generation": 4}
    (tmp_path / "actual" / "zh.json").write_text(json.dumps(data))
    observed = platform.observe("zh")
    assert observed.generation == 4
    assert [r.address for r in observed.ready(A)] == ["127.0.0.1:5"]
    assert observed.ready(B) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"replicas": 5}', '{"replicas": [{}]}'])
def test_a_file_that_is_missing_or_torn_means_nothing_is_there(tmp_path, text):
    platform = LocalPlatform(tmp_path)
    assert platform.observe("zh") == Observed("zh")
    (tmp_path / "actual" / "zh.json").write_text(text)
    assert platform.observe("zh") == Observed("zh")


def test_names_cannot_climb_out(tmp_path):
    platform = LocalPlatform(tmp_path)
    with pytest.raises(InvalidArgument):
        platform.apply(Desired("../x", A, 1, 1))
    with pytest.raises(InvalidArgument):
        platform.remove("../desired/x")


@pytest.mark.parametrize(
    ("replicas", "complete"),
    [
        ([replica("READY")], True),
        ([replica("READY"), replica("DRAINING", B)], True),
        ([replica("READY"), replica("DRAINING")], True),
        ([replica("READY"), replica("STARTING")], False),  # same artifact, other context
        ([replica("READY"), replica("READY", B)], False),  # the old one still serves
        ([replica("FAILED")], False),
        ([], False),
    ],
)
def test_when_one_wanted_replica_is_all_there_is(replicas, complete):
    assert Observed("zh", tuple(replicas)).complete(A, 1) is complete


async def test_waiting_ends_with_the_change_or_the_timeout(tmp_path):
    platform = LocalPlatform(tmp_path)
    wait = asyncio.create_task(platform.wait("zh", lambda o: o.generation == 2, timeout=300))
    await asyncio.sleep(0)
    (tmp_path / "actual" / "zh.json").write_text('{"replicas": [], "generation": 2}')
    assert (await wait).generation == 2
    with pytest.raises(DeadlineExceeded):
        await platform.wait("zh", lambda o: o.generation == 3, timeout=0.05)
