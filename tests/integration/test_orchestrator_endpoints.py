"""Endpoints: roll-outs, their gate, and going back; the supervisor is a fake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from arriero.errors import (
    AlreadyExists,
    Cancelled,
    FailedPrecondition,
    GateFailed,
    InvalidArgument,
    NotFound,
)
from arriero.gates import GateResult, Mode, Verdict
from arriero.orchestrator.clients import Replicas
from arriero.orchestrator.endpoints import Endpoints
from arriero.orchestrator.platform import LocalPlatform
from arriero.orchestrator.records import Records
from arriero.replica import AdapterSettings, ReplicaSettings
from arriero.settings import ClientSettings
from arriero.store import ManifestDraft, Store
from arriero.testing.replicas import WRONG_MODEL, FakeSupervisor
from arriero.v1 import inference_pb2, pipeline_pb2, types_pb2
from arriero.v1 import orchestrator_pb2 as pb


class Home:
    """A store, a supervisor and the endpoints between them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = Store.open(directory / "store")
        self.supervisor = FakeSupervisor(directory / "platform")
        self.golden = self.artifact("report", "golden")

    def open(self) -> None:
        self.records = Records(f"sqlite:///{self.directory / 'x.db'}")
        self.endpoints = Endpoints(
            self.records,
            self.store,
            LocalPlatform(self.directory / "platform"),
            Replicas(ClientSettings(timeout_seconds=60)),
        )
        self.endpoints.load()

    async def close(self) -> None:
        await self.endpoints.close()
        self.records.close()

    def artifact(self, kind: str, name: str, **more: Any) -> str:
        directory = self.store.staging("test", name)
        (directory / "content").write_text(name)
        return self.store.publish(directory, ManifestDraft(kind=kind, name=name, **more)).digest

    def gguf(self, name: str, **more: Any) -> str:
        return self.artifact("gguf", name, golden=self.golden, **more)

    async def deploy(self, model: str, rollout: str = "r", **more: Any) -> Any:
        spec = pipeline_pb2.DeploySpec(model=model, endpoint="zh", **more)
        return await asyncio.wait_for(
            self.endpoints.deploy(
                rollout, spec, run="run-1", owner="me", cancelled=asyncio.Event()
            ),
            20,
        )

    async def until(self, name: str, condition: Any) -> pb.Endpoint:
        async with asyncio.timeout(300):
            while not any(e.name == name and condition(e) for e in self.endpoints.all()):
                await asyncio.sleep(0.02)
        return self.endpoints.get(name)


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[Home]:
    made = Home(tmp_path)
    async with made.supervisor:
        made.open()
        yield made
        await made.close()


async def test_a_deployment_is_ready_proved_and_remembered(home):
    model = home.gguf("a")
    (gate,) = await home.deploy(model, replicas=2, context=512)
    assert gate.verdict == types_pb2.GATE_VERDICT_PASSED
    assert gate.unit == "nats"
    assert "KL 0.05 nats" in gate.detail
    assert home.supervisor.scored == [home.golden, home.golden]
    desired = home.supervisor.desired("zh")
    assert (desired["digest"], desired["replicas"]) == (model, 2)
    assert desired["environment"]["ARRIERO_CONTEXT"] == "512"
    (pin,) = home.store.pins()
    assert set(pin.digests) == {model, home.golden}
    await home.close()
    home.open()
    endpoint = home.endpoints.get("zh")
    assert endpoint.spec.model == model
    assert endpoint.ready_replicas == 2
    assert endpoint.replicas[1].kl_divergence == pytest.approx(0.05)
    assert endpoint.run == "run-1"


async def test_a_failing_gate_gives_the_endpoint_back_what_it_served(home):
    good, bad = home.gguf("good"), home.gguf("bad")
    await home.deploy(good, "one")
    home.supervisor.scores[bad] = WRONG_MODEL
    with pytest.raises(GateFailed, match=r"serve.smoke failed.*serves what it served before"):
        await home.deploy(bad, "two")
    endpoint = await home.until("zh", lambda e: e.ready_replicas == 1)
    assert endpoint.spec.model == good
    assert home.supervisor.desired("zh")["digest"] == good
    assert [g.verdict for g in endpoint.gates] == [
        types_pb2.GATE_VERDICT_PASSED,
        types_pb2.GATE_VERDICT_FAILED,
    ]
    assert f"{bad} was refused" in endpoint.gates[1].detail
    assert "serves what it served before" in endpoint.rollout_error
    with pytest.raises(GateFailed):  # asked again after a crash: the same answer
        await home.deploy(bad, "two")
    assert home.endpoints.get("zh").spec.model == good
    del home.supervisor.scores[bad]
    await home.deploy(bad, "three")
    assert not home.endpoints.get("zh").rollout_error


async def test_a_failing_gate_of_a_new_endpoint_is_shown(home):
    bad = home.gguf("bad")
    home.supervisor.scores[bad] = WRONG_MODEL
    with pytest.raises(GateFailed, match=r"top-1 agreement 0\.050"):
        await home.deploy(bad)
    endpoint = home.endpoints.get("zh")
    assert endpoint.spec.model == bad
    assert endpoint.gates[0].verdict == types_pb2.GATE_VERDICT_FAILED


async def test_a_gate_can_warn_or_be_skipped(home):
    bad = home.gguf("bad")
    home.supervisor.scores[bad] = WRONG_MODEL
    (gate,) = await home.deploy(bad, "1", gates={"serve.smoke": types_pb2.GATE_MODE_WARN})
    assert gate.verdict == types_pb2.GATE_VERDICT_WARNED
    (gate,) = await home.deploy(bad, "2", gates={"serve.smoke": types_pb2.GATE_MODE_SKIP})
    assert gate.verdict == types_pb2.GATE_VERDICT_SKIPPED


async def test_a_replica_is_held_to_what_its_types_explain(home):
    exact = home.gguf("exact", labels={"quant_type": "Q8_0"})
    with pytest.raises(GateFailed, match=r"expected a KL of at most 0\.03"):
        await home.deploy(exact, "1")
    (gate,) = await home.deploy(home.gguf("small", labels={"quant_type": "Q4_0"}), "2")
    assert (gate.verdict, gate.threshold) == (types_pb2.GATE_VERDICT_PASSED, 0.8)
    # A cache costs too, and scaled positions are another function of the model.
    (gate,) = await home.deploy(exact, "3", cache_type_k="Q8_0")
    assert (gate.verdict, gate.threshold) == (types_pb2.GATE_VERDICT_PASSED, 0.06)
    (gate,) = await home.deploy(exact, "4", rope=pipeline_pb2.RopeSpec(type="ntk"))
    assert gate.verdict == types_pb2.GATE_VERDICT_PASSED
    rope = pipeline_pb2.RopeSpec(type="ntk", native_slots=1)
    with pytest.raises(GateFailed, match=r"at most 0\.03"):
        await home.deploy(exact, "5", rope=rope)


async def test_without_golden_logits_the_gate_says_so(home):
    (gate,) = await home.deploy(home.artifact("gguf", "bare"))
    assert gate.verdict == types_pb2.GATE_VERDICT_SKIPPED
    assert "no golden logits" in gate.detail
    with pytest.raises(FailedPrecondition, match="no golden logits"):
        await home.endpoints.score("zh")


async def test_replicas_that_give_up_fail_the_deployment_early(home):
    good, broken = home.gguf("good"), home.gguf("broken")
    await home.deploy(good, "one")
    home.supervisor.broken.add(broken)
    with pytest.raises(FailedPrecondition, match="cannot load the file"):
        await home.deploy(broken, "two", timeout_seconds=60)
    assert home.endpoints.get("zh").spec.model == good


async def test_replicas_that_are_never_ready_run_into_the_timeout(home):
    stuck = home.gguf("stuck")
    home.supervisor.stuck.add(stuck)
    with pytest.raises(FailedPrecondition, match="0 of 1 replicas are ready after 1 s"):
        await home.deploy(stuck, timeout_seconds=1)


async def test_what_must_not_be_deployed_is_refused(home):
    failed = GateResult("quant.kld", Mode.ENFORCE, Verdict.FAILED)
    with pytest.raises(FailedPrecondition, match=r"quarantined by quant.kld"):
        await home.deploy(home.gguf("bad", gates=[failed]))
    with pytest.raises(InvalidArgument, match=r"model: .* is of kind report; expected gguf"):
        await home.deploy(home.golden)
    with pytest.raises(NotFound):
        await home.deploy("gguf/none:prod")
    with pytest.raises(InvalidArgument, match="unknown gate"):
        await home.deploy(home.gguf("a"), gates={"serve.smok": types_pb2.GATE_MODE_SKIP})
    with pytest.raises(InvalidArgument, match="replicas"):
        await home.deploy(home.gguf("a"), replicas=-1)
    assert home.endpoints.all() == []


@pytest.mark.parametrize("name", ["", "../x", "A", "a/b"])
async def test_bad_endpoint_names_are_refused(home, name):
    spec = pipeline_pb2.DeploySpec(model=home.gguf("a"), endpoint=name)
    with pytest.raises(InvalidArgument, match="endpoint"):
        await home.endpoints.create(spec)


async def test_a_cancelled_deployment_leaves_no_new_endpoint(home):
    stuck = home.gguf("stuck")
    home.supervisor.stuck.add(stuck)
    cancelled = asyncio.Event()
    spec = pipeline_pb2.DeploySpec(model=stuck, endpoint="zh")
    task = asyncio.create_task(
        home.endpoints.deploy("r", spec, run="", owner="", cancelled=cancelled)
    )
    await home.until("zh", lambda e: e.spec.model == stuck)
    cancelled.set()
    with pytest.raises(Cancelled):
        await task
    assert home.endpoints.all() == []
    assert home.supervisor.desired("zh") is None
    assert home.store.pins() == []


async def test_a_cancelled_deployment_goes_back_to_what_was_served(home):
    good, stuck = home.gguf("good"), home.gguf("stuck")
    await home.deploy(good, "one")
    home.supervisor.stuck.add(stuck)
    cancelled = asyncio.Event()
    spec = pipeline_pb2.DeploySpec(model=stuck, endpoint="zh")
    task = asyncio.create_task(
        home.endpoints.deploy("two", spec, run="", owner="", cancelled=cancelled)
    )
    await home.until("zh", lambda e: e.spec.model == stuck)
    cancelled.set()
    with pytest.raises(Cancelled):
        await task
    assert home.endpoints.get("zh").spec.model == good


async def test_a_restart_in_the_middle_of_a_roll_out_follows_the_same_one(home):
    model = home.gguf("slow")
    home.supervisor.stuck.add(model)
    task = asyncio.create_task(home.deploy(model))
    await home.until("zh", lambda e: e.spec.model == model)
    task.cancel()
    await home.close()
    home.supervisor.stuck.clear()
    home.open()
    (gate,) = await home.deploy(model)
    assert gate.verdict == types_pb2.GATE_VERDICT_PASSED
    assert home.supervisor.scored == [home.golden]


async def test_endpoints_are_made_scaled_and_deleted_by_hand(home):
    spec = pipeline_pb2.DeploySpec(model=home.gguf("a"), endpoint="hand")
    made = await home.endpoints.create(spec, owner="me")
    assert made.desired_replicas == 1
    with pytest.raises(AlreadyExists):
        await home.endpoints.create(spec)
    await home.until("hand", lambda e: e.gates and e.ready_replicas == 1)
    home.endpoints.scale("hand", 3)
    endpoint = await home.until("hand", lambda e: e.ready_replicas == 3)
    assert endpoint.desired_replicas == 3
    scored = await home.endpoints.score("hand")
    assert all(r.HasField("kl_divergence") for r in scored.replicas)
    with pytest.raises(InvalidArgument):
        home.endpoints.scale("hand", -1)
    home.endpoints.delete("hand")
    with pytest.raises(NotFound, match="no endpoint named 'hand'"):
        home.endpoints.delete("hand")
    home.endpoints.delete("hand", allow_missing=True)
    with pytest.raises(NotFound):
        await home.endpoints.update(spec)
    assert home.store.pins() == []


async def test_gc_keeps_what_an_endpoint_serves(home):
    model = home.gguf("a")
    await home.deploy(model)
    removed = [r.path for r in home.store.gc(dry_run=False, grace=0)]
    assert home.store.get(model).digest == model
    assert home.store.get(home.golden).digest == home.golden
    home.endpoints.delete("zh")
    removed = [r.path for r in home.store.gc(dry_run=False, grace=0)]
    assert len(removed) >= 2


async def test_replicas_that_become_ready_later_are_measured_too(home):
    model = home.gguf("a")
    await home.deploy(model)
    assert len(home.supervisor.scored) == 1
    home.endpoints.scale("zh", 3)
    measured = await home.until(
        "zh", lambda e: [r.HasField("kl_divergence") for r in e.replicas] == [True] * 3
    )
    assert measured.replicas[2].top1_agreement == pytest.approx(0.9)
    # Each of the new ones once, the first one not again.
    assert len(home.supervisor.scored) == 3
    assert [f.kl_divergence for f in home.endpoints.figures()] == [pytest.approx(0.05)]


def lora(home: Home, name: str, **spec: str) -> str:
    directory = home.store.staging("test", name)
    (directory / f"{name}.gguf").write_text(name)
    draft = ManifestDraft(kind="adapter", name=name, spec=spec)
    return home.store.publish(directory, draft).digest


async def test_adapters_of_a_deployment_reach_replicas_and_what_starts_them(home):
    poems, model = lora(home, "poems"), home.gguf("a")
    wanted = inference_pb2.AdapterSpec(adapter=poems, name="rhymes", scale=0.5)
    await home.deploy(model, adapters=[wanted])
    assert dict(home.supervisor.adapters) == {"rhymes": wanted}
    (settings,) = started_with(home)
    assert (settings.name, settings.adapter, settings.scale) == ("rhymes", poems, 0.5)
    (pin,) = home.store.pins()
    assert poems in pin.digests
    # The next deployment wants none; the same replicas may serve it.
    await home.deploy(model, "second")
    assert home.supervisor.adapters == {}


def started_with(home: Home) -> tuple[AdapterSettings, ...]:
    return ReplicaSettings.from_env(home.supervisor.desired("zh")["environment"]).adapters


async def test_adapters_come_and_go_while_an_endpoint_serves(home):
    await home.deploy(home.gguf("a"))
    poems, laws = lora(home, "poems"), lora(home, "laws")
    endpoint = await home.endpoints.add_adapter("zh", inference_pb2.AdapterSpec(adapter=poems))
    assert [a.name for a in endpoint.spec.adapters] == ["poems"]
    await home.endpoints.add_adapter("zh", inference_pb2.AdapterSpec(adapter=poems))
    await home.endpoints.add_adapter("zh", inference_pb2.AdapterSpec(adapter=laws, scale=2))
    scales = {name: adapter.scale for name, adapter in home.supervisor.adapters.items()}
    assert scales == {"poems": 1, "laws": 2}
    assert [item.name for item in started_with(home)] == ["poems", "laws"]
    with pytest.raises(AlreadyExists, match="remove it first"):
        await home.endpoints.add_adapter(
            "zh", inference_pb2.AdapterSpec(adapter=laws, name="poems")
        )
    await home.endpoints.remove_adapter("zh", "poems")
    assert list(home.supervisor.adapters) == ["laws"]
    with pytest.raises(NotFound, match="adapters: laws"):
        await home.endpoints.remove_adapter("zh", "poems")
    await home.endpoints.remove_adapter("zh", "poems", allow_missing=True)
    await home.close()
    home.open()
    assert [a.name for a in home.endpoints.get("zh").spec.adapters] == ["laws"]


async def test_an_adapter_that_replicas_refuse_is_not_recorded(home):
    await home.deploy(home.gguf("a"))
    poems, odd = lora(home, "poems"), lora(home, "odd")
    await home.endpoints.add_adapter("zh", inference_pb2.AdapterSpec(adapter=poems))
    home.supervisor.refused.add(odd)
    with pytest.raises(FailedPrecondition, match="does not fit"):
        await home.endpoints.add_adapter("zh", inference_pb2.AdapterSpec(adapter=odd))
    assert [a.name for a in home.endpoints.get("zh").spec.adapters] == ["poems"]
    assert list(home.supervisor.adapters) == ["poems"]


async def test_a_replica_that_lost_an_adapter_is_given_it_again(home):
    model, poems = home.gguf("a"), lora(home, "poems")
    await home.deploy(model, adapters=[inference_pb2.AdapterSpec(adapter=poems)])
    home.supervisor.adapters.clear()
    await home.close()
    home.open()
    async with asyncio.timeout(300):
        while "poems" not in home.supervisor.adapters:
            await asyncio.sleep(0.05)


async def test_adapters_that_do_not_belong_are_refused_before_anything_starts(home):
    model = home.artifact("gguf", "m", spec={"model": "sha256:aa", "adapters": ["sha256:cc"]})

    async def refused(adapter: str, error: type[Exception], words: str) -> None:
        with pytest.raises(error, match=words):
            await home.deploy(model, adapters=[inference_pb2.AdapterSpec(adapter=adapter)])

    await refused(lora(home, "odd", model="sha256:bb"), FailedPrecondition, "made from sha256:aa")
    merged = home.store.staging("test", "merged")
    (merged / "merged.gguf").write_text("merged")
    spec = {"model": "sha256:aa", "adapters": ["sha256:cc"]}
    twice = home.store.publish(merged, ManifestDraft(kind="adapter", name="m", spec=spec)).digest
    await refused(twice, FailedPrecondition, "merged into the model already")
    await refused(home.artifact("adapter", "peft"), FailedPrecondition, "adapter_only")
    await refused(home.gguf("b"), InvalidArgument, "of kind gguf; expected adapter")
    assert home.supervisor.desired("zh") is None
