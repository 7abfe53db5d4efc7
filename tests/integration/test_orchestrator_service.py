"""The orchestrator's services as clients see them, over gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import json_format

from arriero.gates import GateResult, Mode, Verdict
from arriero.llama.activations import Activations
from arriero.quantization import imatrix
from arriero.rpc import connect, from_rpc_error
from arriero.settings import ClientSettings
from arriero.store import ManifestDraft
from arriero.testing.orchestrator import LocalOrchestrator
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import orchestrator_pb2_grpc, pipeline_pb2


class Stubs:
    """The three services' stubs over one channel."""

    def __init__(self, home: LocalOrchestrator, channel: Any) -> None:
        self.home = home
        self.runs: Any = orchestrator_pb2_grpc.RunServiceStub(channel)
        self.endpoints: Any = orchestrator_pb2_grpc.EndpointServiceStub(channel)
        self.artifacts: Any = orchestrator_pb2_grpc.ArtifactServiceStub(channel)

    def publish(self, kind: str, name: str, **more: Any) -> str:
        directory = self.home.store.staging("test", name)
        (directory / "a.txt").write_text(name)
        (directory / "empty").touch()
        (directory / "sub").mkdir()
        (directory / "sub" / "big.bin").write_bytes(b"x" * 2_500_000)
        draft = ManifestDraft(kind=kind, name=name, **more)
        return self.home.store.publish(directory, draft).digest


@pytest.fixture
async def stubs(tmp_path: Path) -> AsyncIterator[Stubs]:
    async with (
        LocalOrchestrator(tmp_path) as home,
        connect(home.address, ClientSettings(timeout_seconds=60)) as channel,
    ):
        yield Stubs(home, channel)


async def refused(call: Any, code: str) -> Any:
    """The error that a call ends with, checked for its code and for tracebacks."""
    with pytest.raises(grpc.RpcError) as caught:
        await call
    error = from_rpc_error(caught.value)
    assert error.code == code, error.message
    assert "Traceback" not in error.message
    return error


def pipeline(*stages: dict[str, Any]) -> pipeline_pb2.Pipeline:
    return json_format.ParseDict({"name": "p", "stages": stages}, pipeline_pb2.Pipeline())


async def test_a_run_is_created_watched_listed_and_read(stubs):
    base = {"name": "base", "import": {"source": "/m"}}
    request = pb.CreateRunRequest(pipeline=pipeline(base), request_id="r")
    run = (await stubs.runs.CreateRun(request)).run
    assert run.owner == "local"
    seen = [m.run async for m in stubs.runs.WatchRun(pb.WatchRunRequest(id=run.id))]
    assert seen[-1].state == pb.RUN_STATE_SUCCEEDED
    assert len({r.etag for r in seen}) == len(seen)
    assert (await stubs.runs.GetRun(pb.GetRunRequest(id=run.id))).run == seen[-1]
    listed = await stubs.runs.ListRuns(pb.ListRunsRequest())
    assert [r.id for r in listed.runs] == [run.id]
    lines = [
        (m.stage, m.message) async for m in stubs.runs.ReadRunLogs(pb.ReadRunLogsRequest(id=run.id))
    ]
    assert lines == [("base", "base begins"), ("base", "base works")]
    await refused(stubs.runs.RetryRun(pb.RetryRunRequest(id=run.id)), "FAILED_PRECONDITION")
    await refused(stubs.runs.GetRun(pb.GetRunRequest(id="p-none")), "NOT_FOUND")
    await refused(stubs.runs.CancelRun(pb.CancelRunRequest(id="../x")), "NOT_FOUND")


async def test_a_bad_pipeline_comes_back_with_every_field(stubs):
    request = pb.CreateRunRequest(
        pipeline=pipeline(
            {"name": "a", "train": {"model": "b", "dataset": "x"}},
            {"name": "a", "deploy": {"model": "gguf/x:y", "endpoint": "E"}},
        )
    )
    error = await refused(stubs.runs.CreateRun(request), "INVALID_ARGUMENT")
    assert {v.field for v in error.violations} == {
        "stages[1].name",
        "stages[0].train.model",
        "stages[0].train.dataset",
    }
    request.validate_only = True
    await refused(stubs.runs.CreateRun(request), "INVALID_ARGUMENT")


async def test_a_deployments_own_fields_are_checked_before_anything_starts(stubs):
    digest = stubs.publish("gguf", "g")
    request = pb.CreateRunRequest(
        pipeline=pipeline({"name": "a", "deploy": {"model": digest, "endpoint": "E"}})
    )
    error = await refused(stubs.runs.CreateRun(request), "INVALID_ARGUMENT")
    assert error.violations[0].field == "stages[0].deploy.endpoint"


async def test_artifacts_are_found_listed_and_traced(stubs):
    parent = stubs.publish("model", "m", labels={"a": "b"}, metrics={"loss": 1.5})
    child = stubs.publish("gguf", "g", parents=[parent], spec={"types": ["Q8_0"]})
    stubs.home.store.tag("model/m:prod", parent)
    get = stubs.artifacts.GetArtifact
    for ref in (parent, "model/m:prod", parent[7:17], f"model/m@{parent}"):
        assert (await get(pb.GetArtifactRequest(ref=ref))).artifact.digest == parent
    artifact = (await get(pb.GetArtifactRequest(ref=parent))).artifact
    assert artifact.tags == ["model/m:prod"]
    assert artifact.present
    assert artifact.metrics == {"loss": 1.5}
    assert {f.path for f in artifact.files} == {"a.txt", "empty", "sub/big.bin"}
    listed = await stubs.artifacts.ListArtifacts(pb.ListArtifactsRequest(page_size=1))
    assert listed.artifacts[0].digest == child
    listed = await stubs.artifacts.ListArtifacts(
        pb.ListArtifactsRequest(page_size=1, page_token=listed.next_page_token)
    )
    assert (listed.artifacts[0].digest, listed.next_page_token) == (parent, "")
    lineage = await stubs.artifacts.GetLineage(pb.GetLineageRequest(ref=child))
    assert [a.digest for a in lineage.artifacts] == [child, parent]
    assert lineage.artifacts[0].spec_json == '{"types": ["Q8_0"]}'
    await refused(get(pb.GetArtifactRequest(ref="model/m:none")), "NOT_FOUND")
    await refused(get(pb.GetArtifactRequest(ref="model/../m:x")), "INVALID_ARGUMENT")
    bad = pb.ListArtifactsRequest(kind="modl")
    await refused(stubs.artifacts.ListArtifacts(bad), "INVALID_ARGUMENT")


async def test_tags_are_set_with_compare_and_set_and_never_on_quarantined_ones(stubs):
    first, second = stubs.publish("model", "a"), stubs.publish("model", "b")
    tag = stubs.artifacts.TagArtifact
    await tag(pb.TagArtifactRequest(ref=first, tag="model/x:prod", expected_digest="none"))
    await refused(
        tag(pb.TagArtifactRequest(ref=second, tag="model/x:prod", expected_digest="none")),
        "ABORTED",
    )
    await tag(pb.TagArtifactRequest(ref=second, tag="model/x:prod", expected_digest=first))
    tags = (await stubs.artifacts.ListTags(pb.ListTagsRequest(kind="model"))).tags
    assert [(t.tag, t.digest) for t in tags] == [("model/x:prod", second)]
    gate = GateResult("merge.delta", Mode.ENFORCE, Verdict.FAILED)
    bad = stubs.publish("model", "c", gates=[gate])
    request = pb.TagArtifactRequest(ref=bad, tag="model/x:bad")
    await refused(tag(request), "FAILED_PRECONDITION")
    await refused(tag(pb.TagArtifactRequest(ref=first, tag="gguf/x:y")), "INVALID_ARGUMENT")


async def test_gc_lists_first_and_a_collected_artifact_is_still_described(stubs, monkeypatch):
    digest = stubs.publish("model", "m")
    monkeypatch.setattr("arriero.store.store.Store.gc.__kwdefaults__", {"grace": 0.0})
    gc = stubs.artifacts.CollectGarbage
    listed = await gc(pb.CollectGarbageRequest(dry_run=True))
    assert any(digest[7:] in r.path for r in listed.removals)
    assert listed.freed_bytes >= 2_500_000
    assert stubs.home.store.get(digest)
    await gc(pb.CollectGarbageRequest())
    found = await stubs.artifacts.GetArtifact(pb.GetArtifactRequest(ref=digest))
    assert not found.artifact.present


async def pulled(stubs: Stubs, ref: str) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    path = ""
    async for message in stubs.artifacts.PullArtifact(pb.PullArtifactRequest(ref=ref)):
        if message.HasField("artifact"):
            continue
        path = message.path or path
        assert len(message.chunk) <= 1024 * 1024
        files[path] = files.get(path, b"") + message.chunk
    return files


async def test_an_artifact_is_pulled_whole(stubs):
    files = await pulled(stubs, stubs.publish("model", "m"))
    assert files == {"a.txt": b"m", "empty": b"", "sub/big.bin": b"x" * 2_500_000}
    assert list((stubs.home.store.root / "leases").iterdir()) == []
    await refused(_drain(stubs.artifacts.PullArtifact(pb.PullArtifactRequest(ref="model/n:x"))),
                  "NOT_FOUND")  # fmt: skip


async def _drain(stream: Any) -> None:
    async for _ in stream:
        pass


def push(
    header: pb.PushHeader | None, files: list[tuple[str, bytes]]
) -> Iterator[pb.PushArtifactRequest]:
    if header is not None:
        yield pb.PushArtifactRequest(header=header)
    for path, data in files:
        for start in range(0, max(1, len(data)), 700_000):
            chunk = data[start : start + 700_000]
            yield pb.PushArtifactRequest(path="" if start else path, chunk=chunk)


_HEADER = b'{"w": {"dtype": "U8", "shape": [1500000], "data_offsets": [0, 1500000]}}'
_WEIGHTS = len(_HEADER).to_bytes(8, "little") + _HEADER + b"w" * 1_500_000
MODEL = [("config.json", b"{}"), ("model.safetensors", _WEIGHTS), ("empty.txt", b"")]


def header(files: list[tuple[str, bytes]], **more: Any) -> pb.PushHeader:
    size = sum(len(data) for _, data in files)
    return pb.PushHeader(**{"kind": "model", "name": "m", "size_bytes": size, **more})


async def test_an_artifact_is_pushed_tagged_and_pulled_back(stubs):
    request = header(MODEL, tag="model/m:prod", labels={"from": "test"})
    pushed = (await stubs.artifacts.PushArtifact(push(request, MODEL))).artifact
    assert (pushed.kind, pushed.name, pushed.labels["from"]) == ("model", "m", "test")
    assert pushed.tags == ["model/m:prod"]
    assert pushed.owner == "local"
    assert await pulled(stubs, "model/m:prod") == dict(MODEL)


async def test_an_importance_matrix_made_elsewhere_is_pushed_as_a_report(stubs, tmp_path):
    name = "blk.0.attn_q.weight"
    found = Activations({name: np.ones(64)}, {name: 1}, 1)
    imatrix.write(tmp_path / "imatrix.gguf", found, dataset="x", window=8)
    files = [("imatrix.gguf", (tmp_path / "imatrix.gguf").read_bytes())]
    request = header(files, kind="report", tag="report/m:imatrix")
    pushed = (await stubs.artifacts.PushArtifact(push(request, files))).artifact
    assert (pushed.kind, pushed.tags) == ("report", ["report/m:imatrix"])
    data = bytearray(files[0][1])
    at = data.index(b"imatrix")  # the value of general.type
    data[at : at + 7] = b"adapter"
    for other, said in (
        (("report.json", b"{}"), "llama-imatrix -o imatrix.gguf"),
        (("x.gguf", bytes(data)), "is no importance matrix"),
    ):
        call = stubs.artifacts.PushArtifact(push(header([other], kind="report"), [other]))
        error = await refused(call, "INVALID_ARGUMENT")
        assert said in error.message


@pytest.mark.parametrize(
    ("files", "more", "what"),
    [
        (MODEL, {"kind": "checkpoint"}, "header.kind"),
        (MODEL, {"name": "../m"}, "header.name"),
        (MODEL, {"tag": "gguf/m:x"}, "header.tag"),
        (MODEL, {"size_bytes": 0}, "header.size_bytes"),
        (MODEL, {"size_bytes": 5}, "header.size_bytes"),
        (MODEL, {"size_bytes": 5_000_000}, "header.size_bytes"),
        ([("../config.json", b"{}")], {}, "path"),
        ([("/etc/x", b"{}")], {}, "path"),
        ([("a", b"1"), ("a", b"2")], {}, "path"),
        ([("a", b"1"), ("a/b", b"2")], {}, "path"),
        ([("pytorch_model.bin", b"1")], {}, "path"),
        ([("", b"1")], {}, "path"),
        ([("config.json", b"{}")], {}, "header.kind"),
        ([("x.gguf", b"GGUF"), ("y.gguf", b"GGUF")], {"kind": "gguf"}, "header.kind"),
        ([("adapter_config.json", b"{}")], {"kind": "adapter"}, "header.kind"),
        ([("imatrix.dat", b"1")], {"kind": "report"}, "header.kind"),
    ],
)
async def test_a_bad_push_publishes_nothing(stubs, files, more, what):
    call = stubs.artifacts.PushArtifact(push(header(files, **more), files))
    error = await refused(call, "INVALID_ARGUMENT")
    assert error.violations[0].field == what
    assert stubs.home.store.list() == []
    staging = stubs.home.store.root / "staging" / "orchestrator"
    assert not staging.exists() or list(staging.iterdir()) == []


async def test_a_push_without_header_or_that_breaks_off_publishes_nothing(stubs):
    error = await refused(stubs.artifacts.PushArtifact(push(None, MODEL)), "INVALID_ARGUMENT")
    assert error.violations[0].field == "header"

    async def broken() -> AsyncIterator[pb.PushArtifactRequest]:
        for message in list(push(header(MODEL), MODEL))[:2]:
            yield message
        call.cancel()

    call = stubs.artifacts.PushArtifact(broken())
    with pytest.raises(BaseException):  # noqa: B017  gRPC raises CancelledError here
        await call
    assert stubs.home.store.list() == []


async def test_a_push_that_does_not_fit_is_refused_with_the_figures(stubs, monkeypatch):
    monkeypatch.setenv("ARRIERO_STORE_QUOTA_BYTES", "1000000")
    call = stubs.artifacts.PushArtifact(push(header(MODEL), MODEL))
    error = await refused(call, "RESOURCE_EXHAUSTED")
    assert error.needed > error.free


async def test_endpoints_over_grpc(stubs):
    digest = stubs.publish("gguf", "g")
    spec = pipeline_pb2.DeploySpec(model=digest, endpoint="e")
    create = stubs.endpoints.CreateEndpoint
    made = (await create(pb.CreateEndpointRequest(spec=spec, run="r-1"))).endpoint
    assert (made.name, made.run, made.owner) == ("e", "r-1", "local")
    await refused(create(pb.CreateEndpointRequest(spec=spec)), "ALREADY_EXISTS")
    scale = pb.ScaleEndpointRequest(name="e", replicas=2)
    assert (await stubs.endpoints.ScaleEndpoint(scale)).endpoint.desired_replicas == 2
    listed = await stubs.endpoints.ListEndpoints(pb.ListEndpointsRequest())
    assert [e.name for e in listed.endpoints] == ["e"]
    await refused(
        stubs.endpoints.GetEndpoint(pb.GetEndpointRequest(name="e", score=True)),
        "FAILED_PRECONDITION",
    )
    await stubs.endpoints.DeleteEndpoint(pb.DeleteEndpointRequest(name="e"))
    await refused(stubs.endpoints.GetEndpoint(pb.GetEndpointRequest(name="e")), "NOT_FOUND")


async def test_a_flipped_byte_is_found_and_named(stubs):
    digest = stubs.publish("model", "m")
    place = stubs.home.store.get(digest).path

    async def verify() -> list[pb.VerifyArtifactResponse]:
        return [
            m async for m in stubs.artifacts.VerifyArtifact(pb.VerifyArtifactRequest(ref=digest))
        ]

    last = (await verify())[-1]
    assert (last.done, list(last.problems)) == (True, [])
    assert last.bytes_done == last.bytes_total == 2_500_001
    big = place / "sub" / "big.bin"
    for path in (big, place / "sub", place):
        path.chmod(0o755)
    data = bytearray(big.read_bytes())
    data[1_234_567] ^= 1
    big.write_bytes(data)
    (place / "a.txt").unlink()
    (place / "more").write_text("x")
    (missing, changed, strange) = (await verify())[-1].problems
    assert missing == "a.txt is missing"
    assert changed.startswith("sub/big.bin has sha256")
    assert strange == "more does not belong"
    call = stubs.artifacts.VerifyArtifact(pb.VerifyArtifactRequest(ref="model/none:v1"))
    await refused(call.read(), "NOT_FOUND")
