"""Runs through a real orchestrator, DBOS and gRPC; the rooms are fakes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from google.rpc import code_pb2
from prometheus_client import generate_latest

from arriero.errors import (
    AlreadyExists,
    FailedPrecondition,
    GateFailed,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from arriero.gates import Verdict
from arriero.rpc import connect
from arriero.settings import ClientSettings
from arriero.store import ManifestDraft
from arriero.testing.orchestrator import LocalOrchestrator
from arriero.testing.replicas import WRONG_MODEL
from arriero.v1 import orchestrator_pb2 as pb
from arriero.v1 import orchestrator_pb2_grpc, pipeline_pb2, types_pb2

# Two trainings, each merged; one of them in three quants; one of those chosen and served.
WIDE: list[dict[str, Any]] = [
    {"name": "base", "import": {"source": "/m", "as": "model"}},
    {"name": "rows", "dataset": {"sources": ["/d"], "tokenizer": "base", "val_set_size": 4}},
    {"name": "one", "train": {"model": "base", "dataset": "rows", "lora": {"r": 4}}},
    {"name": "two", "train": {"model": "base", "dataset": "rows", "lora": {"r": 8}}},
    {"name": "merged-one", "merge": {"model": "base", "adapters": ["one"]}},
    {"name": "merged-two", "merge": {"model": "base", "adapters": ["two"]}},
    {
        "name": "quants",
        "quantize": {
            "model": "merged-two",
            "types": ["Q8_0", "Q4_K_M", "q4_0"],
            "golden": "two.golden",
        },
    },
    {"name": "best", "evaluate": {"models": ["quants"], "golden": "two.golden"}},
    {"name": "live", "deploy": {"model": "best", "endpoint": "zh", "replicas": 2}},
]


def pipeline(*stages: dict[str, Any], **more: Any) -> pipeline_pb2.Pipeline:
    data = {"name": "p", "stages": list(stages), **more}
    return json_format.ParseDict(data, pipeline_pb2.Pipeline())


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[LocalOrchestrator]:
    async with LocalOrchestrator(tmp_path) as made:
        yield made


async def create(home: LocalOrchestrator, *stages: dict[str, Any], **more: Any) -> pb.Run:
    return await home.runs.create(pipeline(*stages, **more), request_id="", owner="me")


def states(run: pb.Run) -> dict[str, str]:
    return {s.name: pb.StageState.Name(s.state).removeprefix("STAGE_STATE_") for s in run.stages}


def outputs(run: pb.Run, stage: str) -> dict[str, str]:
    (status,) = (s for s in run.stages if s.name == stage)
    return {o.name: o.digest for o in status.outputs}


async def test_two_trainings_three_quants_one_chosen_and_served(home):
    run = await create(home, *WIDE, tags={"gguf/zh:prod": "best", "model/zh:one": "merged-one"})
    run = await home.ended(run.id)
    assert run.state == pb.RUN_STATE_SUCCEEDED, run.error
    assert set(states(run).values()) == {"SUCCEEDED"}

    base = outputs(run, "base")["model"]
    for name in ("one", "two"):
        (merge,) = home.rooms.of(f"merged-{name}")
        assert list(merge.spec.adapters) == [outputs(run, name)["adapter"]]
        assert merge.spec.model == base
    (train,) = home.rooms.of("two")
    assert train.spec.val_dataset == outputs(run, "rows")["val"]
    (evaluate,) = home.rooms.of("best")
    assert list(evaluate.spec.models) == list(outputs(run, "quants").values())
    assert list(outputs(run, "quants")) == ["Q8_0", "Q4_K_M", "Q4_0"]

    chosen = outputs(run, "best")["chosen"]
    assert home.store.resolve("gguf/zh:prod") == chosen
    assert home.store.resolve("model/zh:one") == outputs(run, "merged-one")["model"]
    endpoint = home.endpoints.get("zh")
    assert (endpoint.spec.model, endpoint.ready_replicas, endpoint.run) == (chosen, 2, run.id)
    assert [g.gate for g in endpoint.gates] == ["serve.smoke"]
    assert endpoint.replicas[0].kl_divergence == pytest.approx(0.05)
    page = generate_latest(home.registry).decode()
    assert 'arriero_gate_results_total{gate="serve.smoke",verdict="passed"} 1.0' in page
    assert 'arriero_endpoint_kl_to_trained{endpoint="zh"} 0.05' in page
    assert f'arriero_run_state{{run="{run.id}",state="SUCCEEDED"}} 1.0' in page


async def test_independent_branches_run_at_the_same_time(home):
    home.rooms.held = {"one", "two"}
    run = await create(home, *WIDE[:6])
    await home.rooms.started("one")
    await home.rooms.started("two")
    home.rooms.release("two")
    await home.rooms.started("merged-two")
    assert home.rooms.of("merged-one") == []
    home.rooms.release("one")
    assert (await home.ended(run.id)).state == pb.RUN_STATE_SUCCEEDED


async def test_a_failure_skips_its_dependents_and_leaves_other_branches_alone(home):
    home.rooms.failures["two"] = GateFailed("loss is nan; lower the learning rate")
    run = await create(home, *WIDE)
    run = await home.ended(run.id)
    assert run.state == pb.RUN_STATE_FAILED
    assert "stage 'two': loss is nan" in run.error.message
    assert run.error.code == code_pb2.FAILED_PRECONDITION
    found = states(run)
    assert found["merged-one"] == "SUCCEEDED"
    assert found["two"] == "FAILED"
    assert {found[n] for n in ("merged-two", "quants", "best", "live")} == {"SKIPPED"}
    assert home.endpoints.all() == []


async def test_a_retry_repeats_what_did_not_succeed_and_keeps_the_rest(home):
    home.rooms.failures["two"] = FailedPrecondition("out of luck")
    run = await create(home, *WIDE)
    first = await home.ended(run.id)
    with pytest.raises(NotFound):
        await home.runs.retry("p-nothing", request_id="")
    home.rooms.failures.clear()
    again = await home.runs.retry(run.id, request_id="again")
    assert again.state == pb.RUN_STATE_RUNNING
    assert (await home.runs.retry(run.id, request_id="again")).id == run.id
    run = await home.ended(run.id)
    assert run.state == pb.RUN_STATE_SUCCEEDED, run.error
    tries = {s.name: getattr(s, "try") for s in run.stages}
    assert tries == {
        "base": 1, "rows": 1, "one": 1, "merged-one": 1,
        "two": 2, "merged-two": 2, "quants": 2, "best": 2, "live": 2,
    }  # fmt: skip
    assert outputs(run, "one") == outputs(first, "one")
    assert len(home.rooms.of("base")) == 1
    with pytest.raises(FailedPrecondition, match="nothing to retry"):
        await home.runs.retry(run.id, request_id="third")


async def test_a_run_cannot_be_retried_while_it_is_active(home):
    home.rooms.held = {"base"}
    run = await create(home, *WIDE[:1])
    with pytest.raises(FailedPrecondition, match="is active"):
        await home.runs.retry(run.id, request_id="")
    home.rooms.release("base")
    await home.ended(run.id)


@pytest.mark.parametrize("stage", ["base", "rows", "two", "quants"])
async def test_a_cancelled_run_stops_at_once_and_its_operations_are_told(home, stage):
    home.rooms.held = {stage}
    run = await create(home, *WIDE)
    operation = await home.rooms.started(stage)
    await home.runs.cancel(run.id)
    run = await home.ended(run.id)
    assert run.state == pb.RUN_STATE_CANCELLED
    assert operation.name in home.rooms.cancelled
    assert states(run)[stage] == "CANCELLED"
    assert states(run)["live"] == "CANCELLED"
    assert (await home.runs.cancel(run.id)).state == pb.RUN_STATE_CANCELLED


async def test_a_paused_run_holds_what_runs_and_starts_no_more(home):
    home.rooms.held = {"one"}
    run = await create(home, *WIDE[:3], WIDE[4])
    await home.rooms.started("one")
    (operation,) = home.rooms.of("one")
    assert (await home.runs.pause(run.id, paused=True)).paused
    await _until(lambda: operation.paused)
    home.rooms.release("one")
    await _until(lambda: states(home.runs.get(run.id))["one"] == "SUCCEEDED")
    await asyncio.sleep(0.3)
    assert home.rooms.of("merged-one") == []
    assert home.runs.get(run.id).state == pb.RUN_STATE_RUNNING

    assert not (await home.runs.pause(run.id, paused=False)).paused
    assert (await home.ended(run.id)).state == pb.RUN_STATE_SUCCEEDED
    with pytest.raises(FailedPrecondition, match="has ended"):
        await home.runs.pause(run.id, paused=True)


async def test_a_service_that_missed_a_pause_is_told_by_its_next_word(home):
    home.rooms.held = {"one"}
    run = await create(home, *WIDE[:3])
    await home.rooms.started("one")
    (operation,) = home.rooms.of("one")
    await home.runs.pause(run.id, paused=True)
    await _until(lambda: operation.paused)
    operation.paused = False  # a service that forgot
    await _until(lambda: operation.paused)
    await home.runs.cancel(run.id)
    assert (await home.ended(run.id)).state == pb.RUN_STATE_CANCELLED


async def _until(condition, seconds=300.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_a_cancelled_run_can_be_retried(home):
    home.rooms.held = {"one"}
    run = await create(home, *WIDE)
    await home.rooms.started("one")
    await home.runs.cancel(run.id)
    await home.ended(run.id)
    home.rooms.release("one")
    run = await home.ended((await home.runs.retry(run.id, request_id="")).id)
    assert run.state == pb.RUN_STATE_SUCCEEDED, states(run)
    assert [getattr(s, "try") for s in run.stages[:3]] == [1, 1, 2]


async def test_a_run_is_cancelled_in_time_though_a_service_is_away_which_is_told_later(home):
    home.rooms.held = {"one"}
    run = await create(home, *WIDE[:3])
    operation = await home.rooms.started("one")
    await _until(lambda: home.runs.get(run.id).stages[2].operation)
    await home.rooms.stop("training")
    await home.runs.cancel(run.id)
    assert (await home.ended(run.id)).state == pb.RUN_STATE_CANCELLED
    assert home.rooms.cancelled == []
    await home.rooms.start("training")
    await asyncio.wait_for(operation.ended.wait(), 120)
    assert home.rooms.cancelled == [operation.name]


async def test_a_service_that_is_away_is_waited_for_and_shown(home):
    await home.rooms.stop("training")
    run = await create(home, *WIDE[:3])
    async for seen in home.runs.live(run.id).watch():
        if seen.stages[2].error.message:
            break
    assert seen.stages[2].state == pb.STAGE_STATE_RUNNING
    assert seen.stages[2].error.code == code_pb2.UNAVAILABLE
    await home.rooms.start("training")
    run = await home.ended(run.id)
    assert run.state == pb.RUN_STATE_SUCCEEDED
    assert run.stages[2].error.code == 0
    assert len(home.rooms.of("one")) == 1


async def test_a_service_that_goes_away_in_the_middle_is_attached_to_again(home):
    home.rooms.held = {"one"}
    run = await create(home, *WIDE[:3])
    await home.rooms.started("one")
    await home.rooms.stop("training")
    home.rooms.release("one")
    await asyncio.sleep(0.3)
    await home.rooms.start("training")
    assert (await home.ended(run.id)).state == pb.RUN_STATE_SUCCEEDED
    assert len(home.rooms.of("one")) == 1


async def test_creating_twice_with_one_request_id_makes_one_run(home):
    made = await asyncio.gather(
        *(home.runs.create(pipeline(*WIDE[:1]), request_id="x", owner="me") for _ in range(3))
    )
    assert len({run.id for run in made}) == 1
    with pytest.raises(AlreadyExists, match="another pipeline"):
        await home.runs.create(pipeline(*WIDE[:2]), request_id="x", owner="me")
    await home.ended(made[0].id)
    assert len(home.rooms.operations) == 1


async def test_references_are_resolved_when_the_run_is_created(home):
    digest = _artifact(home, "model", "m")
    home.store.tag("model/m:prod", digest)
    home.rooms.held = {"rows"}
    stages = [
        {"name": "rows", "dataset": {"sources": ["/d"], "tokenizer": digest}},
        {"name": "one", "train": {"model": "model/m:prod", "dataset": "rows"}},
    ]
    run = await create(home, *stages)
    home.store.tag("model/m:prod", _artifact(home, "model", "m2"))
    home.rooms.release("rows")
    await home.ended(run.id)
    assert home.rooms.of("one")[0].spec.model == digest
    (pin,) = [p for p in home.store.pins() if p.owner == "runs"]
    assert digest in pin.digests
    assert pin.expires is not None
    assert pin.expires > time.time() + 6 * 24 * 3600


async def test_bad_references_are_refused_before_anything_starts(home):
    adapter = _artifact(home, "adapter", "a")
    merge = {"name": "m", "merge": {"model": "model/none:prod", "adapters": [adapter]}}
    with pytest.raises(NotFound):
        await create(home, merge)
    merge["merge"]["model"] = adapter
    with pytest.raises(InvalidArgument, match=r"stages\[0\].merge.model"):
        await create(home, merge)
    merge["merge"]["model"] = "model/../x"
    with pytest.raises(InvalidArgument, match=r"stages\[0\].merge.model"):
        await create(home, merge)
    assert home.runs.list(0, "") == ([], "")


async def test_what_a_room_refuses_is_refused_when_the_run_is_created(home):
    def check(kind: str, spec: Any) -> None:
        if kind == "train" and spec.lora.HasField("r") and spec.lora.r < 1:
            raise InvalidArgument.field("lora.r", f"{spec.lora.r} is below 1")

    home.rooms.check = check
    bad = {"name": "one", "train": {"model": "base", "dataset": "rows", "lora": {"r": 0}}}
    with pytest.raises(InvalidArgument) as caught:
        await create(home, *WIDE[:2], bad)
    assert [v.field for v in caught.value.violations] == ["stages[2].train.lora.r"]

    def missing(kind: str, spec: Any) -> None:
        if kind == "dataset":
            raise NotFound("sources[0]: '/d' does not exist")

    home.rooms.check = missing
    with pytest.raises(NotFound, match=r"stages\[1\].dataset: sources\[0\]"):
        await create(home, *WIDE)
    assert home.rooms.operations == {}


async def test_a_plan_tells_what_is_known_and_starts_nothing(home):
    home.rooms.caching = True
    plan = await home.runs.plan(pipeline(*WIDE), owner="me")
    assert plan.id == ""
    assert [s.name for s in plan.stages] == [s["name"] for s in WIDE]
    assert plan.stages[0].metadata.result_key
    assert not plan.stages[0].metadata.cached
    assert not plan.stages[2].metadata.result_key
    assert home.rooms.operations == {}

    run = await home.ended((await create(home, *WIDE[:8])).id)
    home.rooms.failures["one"] = FailedPrecondition("is not asked again")
    plan = await home.runs.plan(pipeline(*WIDE), owner="me")
    assert all(s.metadata.cached for s in plan.stages[:8])
    assert {o.name: o.digest for o in plan.stages[7].outputs} == outputs(run, "best")
    again = await home.ended((await create(home, *WIDE[:8])).id)
    assert again.state == pb.RUN_STATE_SUCCEEDED
    assert outputs(again, "best") == outputs(run, "best")
    page = generate_latest(home.registry).decode()
    assert 'arriero_cache_hits_total{kind="train"} 2.0' in page


async def test_a_plan_needs_the_services(home):
    await home.rooms.stop("merging")
    with pytest.raises(Unavailable, match=r"stages\[0\].import"):
        await home.runs.plan(pipeline(*WIDE), owner="me")


async def test_a_deployment_whose_gate_fails_fails_the_stage(home):
    home.supervisor.scores = _Always(WRONG_MODEL)
    run = await home.ended((await create(home, *WIDE)).id)
    assert run.state == pb.RUN_STATE_FAILED
    live = run.stages[8]
    assert live.state == pb.STAGE_STATE_FAILED
    assert "serve.smoke failed" in live.error.message
    assert "confident disagreements" in live.error.message
    endpoint = home.endpoints.get("zh")
    assert endpoint.gates[0].verdict == types_pb2.GATE_VERDICT_FAILED


async def test_progress_is_seen_by_watchers_and_metrics(home):
    home.rooms.held = {"one"}
    run = await create(home, *WIDE[:3])
    operation = await home.rooms.started("one")
    operation.progress.CopyFrom(
        types_pb2.Progress(phase="training", step=5, total_steps=20, loss=1.25, eta_seconds=9)
    )
    async for seen in home.runs.live(run.id).watch():
        if seen.stages[2].metadata.progress.step == 5:
            break
    page = generate_latest(home.registry).decode()
    labels = f'{{kind="train",run="{run.id}",stage="one"}}'
    assert f"arriero_training_loss_nats{labels} 1.25" in page
    assert f"arriero_stage_eta_seconds{labels} 9.0" in page
    home.rooms.release("one")
    await home.ended(run.id)


async def test_logs_of_all_stages_are_read_and_followed(home):
    home.rooms.held = {"rows"}
    run = await create(home, *WIDE[:2])
    await home.rooms.started("rows")
    followed: list[tuple[str, str]] = []

    async def follow() -> None:
        async for stage, line in home.runs.logs(run.id, "", follow=True):
            followed.append((stage, line.message))

    task = asyncio.create_task(follow())
    home.rooms.release("rows")
    await home.ended(run.id)
    await asyncio.wait_for(task, 120)
    assert sorted(followed) == [
        ("base", "base begins"), ("base", "base works"),
        ("rows", "rows begins"), ("rows", "rows works"),
    ]  # fmt: skip
    read = [(s, line.message) async for s, line in home.runs.logs(run.id, "rows", follow=False)]
    assert read == [("rows", "rows begins"), ("rows", "rows works")]
    with pytest.raises(NotFound, match="has no stage"):
        _ = [x async for x in home.runs.logs(run.id, "nope", follow=False)]


async def test_runs_are_listed_newest_first_in_pages(home):
    ids = []
    for _ in range(3):
        ids.append((await home.ended((await create(home, *WIDE[:1])).id)).id)
    first, token = home.runs.list(2, "")
    rest, end = home.runs.list(2, token)
    assert [r.id for r in [*first, *rest]] == ids[::-1]
    assert end == ""
    with pytest.raises(InvalidArgument, match="page_token"):
        home.runs.list(2, "x")


async def test_an_orderly_restart_goes_on_where_it_was(home):
    home.rooms.held = {"one", "two"}
    run = await create(home, *WIDE)
    await home.rooms.started("one")
    await home.rooms.started("two")
    await home.close()
    home.rooms.release("two")
    home.rooms.release("one")
    await home.open()
    run = await home.ended(run.id)
    assert run.state == pb.RUN_STATE_SUCCEEDED, run.error
    assert all(len(home.rooms.of(s.name)) <= 1 for s in run.stages)


class _Always(dict[str, Any]):
    """One score for every artifact."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self._value = value

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: str) -> Any:
        return self._value


def _artifact(home: LocalOrchestrator, kind: str, name: str) -> str:
    directory = home.store.staging("test", name)
    (directory / "content.txt").write_text(name)
    return home.store.publish(directory, ManifestDraft(kind=kind, name=name)).digest


def refusal(gate: str, detail: str = "too far") -> types_pb2.GateResult:
    return types_pb2.GateResult(
        gate=gate,
        mode=types_pb2.GATE_MODE_ENFORCE,
        verdict=types_pb2.GATE_VERDICT_FAILED,
        detail=detail,
    )


def waiver(gate: str, reason: str = "looked at by hand", stage: str = "") -> pb.GateWaiver:
    return pb.GateWaiver(gate=gate, reason=reason, stage=stage)


async def test_a_waived_gate_lets_the_stage_through_without_its_work_being_repeated(home):
    home.rooms.gates["merged-two"] = [refusal("merge.logits"), refusal("merge.delta")]
    run = await create(home, *WIDE, tags={"gguf/zh:prod": "best"})
    run = await home.ended(run.id)
    assert states(run)["merged-two"] == "FAILED"
    assert states(run)["quants"] == "SKIPPED"
    model = outputs(run, "merged-two")["model"]
    assert home.store.get(model).quarantined

    waivers = [waiver("merge.logits"), waiver("merge.delta", "rounding")]
    await home.runs.retry(run.id, request_id="w", waivers=waivers, who="ann")
    run = await home.ended(run.id)
    assert run.state == pb.RUN_STATE_SUCCEEDED, run.error
    assert set(states(run).values()) == {"SUCCEEDED"}
    (operation,) = home.rooms.of("merged-two")
    assert home.rooms.calls[operation.request_id] == 1
    assert outputs(run, "merged-two")["model"] == model
    (quants,) = home.rooms.of("quants")
    assert quants.spec.model == model

    (stage,) = (s for s in run.stages if s.name == "merged-two")
    assert not stage.outputs[0].quarantined
    assert not stage.HasField("error")
    verdicts = {g.gate: (g.verdict, g.detail) for g in stage.metadata.gates}
    waived = types_pb2.GATE_VERDICT_WAIVED
    assert verdicts == {
        "merge.logits": (waived, "waived by ann: looked at by hand (too far)"),
        "merge.delta": (waived, "waived by ann: rounding (too far)"),
    }
    assert [g.verdict for g in home.store.get(model).gates] == [Verdict.WAIVED] * 2
    assert {w.who for w in home.store.waivers(model)} == {"ann"}
    page = generate_latest(home.registry).decode()
    assert 'arriero_gate_results_total{gate="merge.delta",verdict="waived"} 1.0' in page
    # The same request again starts nothing, whatever it says.
    again = await home.runs.retry(run.id, request_id="w", waivers=[waiver("train.finite")])
    assert again.state == pb.RUN_STATE_SUCCEEDED


async def test_the_last_stage_waived_is_the_run_done(home):
    home.rooms.gates["base"] = [refusal("adapter.health")]
    run = await home.ended((await create(home, WIDE[0], tags={"model/m:v1": "base"})).id)
    assert run.state == pb.RUN_STATE_FAILED
    await home.runs.retry(run.id, request_id="", waivers=[waiver("adapter.health")], who="me")
    run = await home.ended(run.id)
    assert run.state == pb.RUN_STATE_SUCCEEDED
    assert home.store.resolve("model/m:v1") == outputs(run, "base")["model"]


async def test_waivers_that_do_not_fit_are_refused_and_change_nothing(home):
    home.rooms.gates["merged-one"] = [refusal("merge.logits")]
    home.rooms.gates["merged-two"] = [refusal("merge.logits"), refusal("merge.delta")]
    home.rooms.failures["rows"] = FailedPrecondition("no rows")
    run = await home.ended((await create(home, *WIDE)).id)
    home.rooms.failures.clear()
    await home.runs.retry(run.id, request_id="1")
    run = await home.ended(run.id)
    assert run.state == pb.RUN_STATE_FAILED

    async def refused(kind: type[Exception], match: str, *waivers: pb.GateWaiver) -> None:
        with pytest.raises(kind, match=match):
            await home.runs.retry(run.id, request_id="", waivers=list(waivers), who="me")

    await refused(InvalidArgument, "not a gate", waiver("merge.nonsense"))
    await refused(InvalidArgument, "says why", waiver("merge.logits", " "))
    await refused(InvalidArgument, "no stage 'nine'", waiver("merge.logits", stage="nine"))
    await refused(InvalidArgument, "merged-one, merged-two; say which", waiver("merge.logits"))
    await refused(
        FailedPrecondition, "failed by merge.delta too", waiver("merge.logits", stage="merged-two")
    )
    await refused(FailedPrecondition, "'one' did not fail by", waiver("merge.logits", stage="one"))
    await refused(FailedPrecondition, "no stage of run .* failed by train", waiver("train.finite"))
    await refused(FailedPrecondition, "judged on live replicas", waiver("serve.smoke"))
    for stage in ("merged-one", "merged-two"):
        assert home.store.waivers(outputs(run, stage)["model"]) == []
    assert home.runs.get(run.id).state == pb.RUN_STATE_FAILED


async def test_a_gate_that_kept_nothing_cannot_be_waived(home):
    home.rooms.gates["rows"] = [refusal("dataset.schema")]
    home.rooms.failures["rows"] = GateFailed("row 7 has no instruction")
    run = await home.ended((await create(home, *WIDE[:2])).id)
    with pytest.raises(FailedPrecondition, match="kept nothing"):
        await home.runs.retry(run.id, request_id="", waivers=[waiver("dataset.schema")], who="me")


async def test_the_endpoint_shows_what_was_waived_on_the_way_to_it(home):
    home.rooms.gates["merged-two"] = [refusal("merge.logits")]
    run = await home.ended((await create(home, *WIDE)).id)
    await home.runs.retry(
        run.id, request_id="", waivers=[waiver("merge.logits", "known drift")], who="ann"
    )
    assert (await home.ended(run.id)).state == pb.RUN_STATE_SUCCEEDED
    async with connect(home.address, ClientSettings(timeout_seconds=60)) as channel:
        stub: Any = orchestrator_pb2_grpc.EndpointServiceStub(channel)
        endpoint = (await stub.GetEndpoint(pb.GetEndpointRequest(name="zh"))).endpoint
    (shown,) = (g for g in endpoint.gates if g.verdict == types_pb2.GATE_VERDICT_WAIVED)
    assert shown.gate == "merge.logits"
    assert "model merged-two: waived by ann: known drift" in shown.detail
