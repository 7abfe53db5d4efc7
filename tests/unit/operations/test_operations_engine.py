"""An engine over real job processes of the toy room."""

import asyncio
import json
import shutil
import time
from dataclasses import replace

import pytest
from google.rpc import code_pb2
from toyroom_support import asked, metadata_of, order, result_of, trace_of

from arriero import errors
from arriero.operations.process import marked
from arriero.v1 import merging_pb2, types_pb2

PENDING = types_pb2.OPERATION_STATE_PENDING
RUNNING = types_pb2.OPERATION_STATE_RUNNING
SUCCEEDED = types_pb2.OPERATION_STATE_SUCCEEDED
FAILED = types_pb2.OPERATION_STATE_FAILED
CANCELLED = types_pb2.OPERATION_STATE_CANCELLED


async def until(condition, what="the condition", timeout=300.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        await asyncio.sleep(0.02)


async def test_work_is_published_with_its_spec_gates_metrics_and_lineage(make_engine, store, model):
    engine = make_engine()
    await engine.recover()
    spec = merging_pb2.MergeSpec(model=model.digest)
    started = await engine.start("merge", spec, asked("merge-1", owner="ann"))
    assert started.name.startswith("operations/")
    assert not started.done

    done = await engine.wait(started.name, 300)

    outputs = {output.name: output for output in result_of(done).outputs}
    assert list(outputs) == ["main", "same"]
    made = store.get(outputs["main"].digest)
    assert made.file("data.txt").read_text() == "modelmodel"
    assert made.manifest.parents == (model.digest,)
    assert made.manifest.licenses == ("mit",)
    assert made.manifest.owner == "ann"
    assert made.manifest.spec == {"model": model.digest}
    assert made.manifest.creator.endswith("merging")
    assert outputs["same"].digest == model.digest
    metadata = metadata_of(done)
    assert metadata.state == SUCCEEDED
    assert (metadata.run, metadata.stage, metadata.attempt) == ("run-1", "toy", 1)
    assert (
        metadata.jobs[0].end_time.ToMilliseconds() >= metadata.jobs[0].start_time.ToMilliseconds()
    )
    assert metadata.end_time.ToMilliseconds() >= metadata.create_time.ToMilliseconds()


async def test_outputs_may_refer_to_each_other_and_keep_their_order(make_engine, store):
    engine = make_engine()
    await engine.recover()
    started = await engine.start("import", order(steps=1, gate="pass"), asked("a"))
    done = await engine.wait(started.name, 300)
    main, report = result_of(done).outputs
    assert (main.name, report.name) == ("main", "report")
    manifest = store.get(main.digest).manifest
    assert manifest.golden == report.digest
    assert manifest.name == "toy"
    assert manifest.labels == {"toy": "yes"}
    assert main.metrics["steps"] == 1
    assert [gate.verdict for gate in manifest.gates] == ["passed"]
    await engine.close()
    assert not any((store.root / "staging/merging").iterdir())


async def test_a_second_start_with_the_same_request_id_is_the_first(make_engine):
    engine = make_engine()
    await engine.recover()
    first, second = await asyncio.gather(
        engine.start("import", order(steps=1), asked("same")),
        engine.start("import", order(steps=1), asked("same")),
    )
    assert first.name == second.name
    await engine.wait(first.name, 300)
    await engine.close()

    restarted = make_engine()
    await restarted.recover()
    again = await restarted.start("import", order(steps=1), asked("same"))
    assert again.name == first.name
    assert again.done
    assert not metadata_of(again).cached


async def test_a_request_id_is_refused_for_other_work(make_engine):
    engine = make_engine()
    await engine.recover()
    await engine.start("import", order(steps=0), asked("same"))
    with pytest.raises(errors.AlreadyExists, match="'same' was used for other work"):
        await engine.start("import", order(steps=1), asked("same"))


async def test_work_that_the_store_has_is_not_done_again_unless_forced(make_engine, tmp_path):
    engine = make_engine()
    await engine.recover()
    trace = tmp_path / "trace"
    spec = order(steps=1, trace=str(trace))
    first = await engine.wait((await engine.start("import", spec, asked("a"))).name, 120)
    cached = await engine.start("import", spec, asked("b"))
    assert cached.done
    assert metadata_of(cached).cached
    assert result_of(cached).cached
    digests = [output.digest for output in result_of(cached).outputs]
    assert digests == [output.digest for output in result_of(first).outputs]
    assert len(trace_of(trace)) == 1

    forced = await engine.start("import", spec, asked("c", force=True))
    forced = await engine.wait(forced.name, 300)
    assert not metadata_of(forced).cached
    assert len(trace_of(trace)) == 2


async def test_unkeyed_fields_do_not_change_the_key_and_others_do(make_engine):
    engine = make_engine()
    plain = await engine.start("import", order(), asked(validate_only=True))
    spec = order()
    spec.token_secret = "hub"
    same = await engine.start("import", spec, asked(validate_only=True))
    spec.sha256 = "00"
    other = await engine.start("import", spec, asked(validate_only=True))
    default_written_out = order()
    default_written_out.dtype = "bfloat16"
    fourth = await engine.start("import", default_written_out, asked(validate_only=True))
    keys = [metadata_of(o).result_key for o in (plain, same, other, fourth)]
    assert keys[0] == keys[1] == keys[3] != keys[2]


async def test_validate_only_starts_nothing_and_tells_what_would_be(make_engine, store):
    engine = make_engine()
    await engine.recover()
    dry = await engine.start("import", order(disk=5000), asked("x", validate_only=True))
    assert dry.name == ""
    metadata = metadata_of(dry)
    assert metadata.estimate.disk_bytes == 5000
    assert not metadata.cached
    assert not engine.list()[0]

    done = await engine.start("import", order(disk=5000), asked("x"))
    done = await engine.wait(done.name, 300)
    dry = await engine.start("import", order(disk=5000), asked("y", validate_only=True))
    assert metadata_of(dry).cached
    assert [o.name for o in metadata_of(dry).outputs] == ["main", "report"]


async def test_equal_work_in_flight_is_shared_and_one_may_leave(make_engine, tmp_path):
    engine = make_engine()
    await engine.recover()
    trace = tmp_path / "trace"
    go = tmp_path / "go"
    spec = order(steps=20, hold=2, go=str(go), trace=str(trace))
    first = await engine.start("import", spec, asked("a"))
    second = await engine.start("import", spec, asked("b"))
    await until(lambda: trace_of(trace), "the job runs")

    await engine.cancel(first.name)
    left = engine.get(first.name)
    assert left.done
    assert left.error.code == code_pb2.CANCELLED
    go.touch()

    done = await engine.wait(second.name, 300)
    assert len(result_of(done).outputs) == 2
    assert [step for _, _, step in trace_of(trace)] == list(range(1, 21))
    assert metadata_of(engine.get(first.name)).state == CANCELLED


async def test_cancelling_the_last_waiter_kills_the_job_and_publishes_nothing(
    make_engine, store, tmp_path
):
    engine = make_engine()
    await engine.recover()
    trace = tmp_path / "trace"
    spec = order(steps=10_000, seconds=0.05, trace=str(trace), stubborn=True, child=True)
    started = await engine.start("import", spec, asked("a"))
    await until(lambda: len(trace_of(trace)) > 2, "the job runs")
    (staging,) = (store.root / "staging/merging").iterdir()

    await engine.cancel(started.name)
    done = await engine.wait(started.name, 300)
    assert metadata_of(done).state == CANCELLED
    assert done.error.code == code_pb2.CANCELLED
    assert not list(marked(staging.name))
    assert not store.list()
    await engine.cancel(started.name)  # idempotent
    assert store.get_result("merging", metadata_of(done).result_key) is None


async def test_cancelled_work_starts_again_from_its_checkpoint(make_engine, tmp_path):
    engine = make_engine()
    await engine.recover()
    trace = tmp_path / "trace"
    go = tmp_path / "go"
    spec = order(steps=12, hold=6, go=str(go), trace=str(trace), save=True)
    first = await engine.start("import", spec, asked("a"))
    await until(lambda: len(trace_of(trace)) >= 4, "steps")
    await engine.cancel(first.name)
    await engine.wait(first.name, 300)
    before = len(trace_of(trace))
    go.touch()
    second = await engine.start("import", spec, asked("b"))
    await engine.wait(second.name, 300)
    after = [step for _, _, step in trace_of(trace)][before:]
    assert after[0] >= before
    assert after[-1] == 12


async def test_more_work_than_jobs_waits_and_can_be_cancelled_while_it_waits(make_engine, tmp_path):
    engine = make_engine(max_jobs=1)
    await engine.recover()
    trace = tmp_path / "trace"
    go = tmp_path / "go"
    spec = order(steps=2, hold=1, go=str(go), trace=str(trace))
    first = await engine.start("import", spec, asked("a"))
    second = await engine.start("import", order(steps=1, text="second"), asked("b"))
    third = await engine.start("import", order(steps=1, text="third"), asked("c"))
    await until(lambda: trace_of(trace), "the first runs")
    assert metadata_of(engine.get(first.name)).state == RUNNING
    assert metadata_of(engine.get(second.name)).state == PENDING
    await engine.cancel(second.name)
    assert metadata_of(await engine.wait(second.name, 300)).state == CANCELLED
    go.touch()
    assert metadata_of(await engine.wait(third.name, 300)).state == SUCCEEDED
    assert metadata_of(engine.get(second.name)).attempt == 0


async def test_a_failed_gate_quarantines_what_was_made_and_fails_the_operation(make_engine, store):
    engine = make_engine()
    await engine.recover()
    spec = order(gate="fail")
    started = await engine.start("import", spec, asked("a"))
    done = await engine.wait(started.name, 300)
    assert done.error.code == code_pb2.FAILED_PRECONDITION
    assert "found 2 rows, expected 1" in done.error.message
    metadata = metadata_of(done)
    assert metadata.state == FAILED
    assert metadata.attempt == 1
    assert [o.quarantined for o in metadata.outputs] == [True, True]
    assert metadata.gates[0].verdict == types_pb2.GATE_VERDICT_FAILED
    artifact = store.get(metadata.outputs[0].digest)
    assert artifact.quarantined
    with pytest.raises(errors.FailedPrecondition):
        store.tag("model/toy:v1", artifact.digest)

    with pytest.raises(errors.FailedPrecondition, match=r"model: model .* is quarantined"):
        await engine.start("merge", merging_pb2.MergeSpec(model=artifact.digest), asked("b"))


async def test_what_gates_cost_is_told_apart_from_the_work(make_engine):
    engine = make_engine()
    await engine.recover()
    size = 200_000_000
    started = await engine.start("import", order(gate="pass", proof=size), asked("a"))
    done = await engine.wait(started.name, 300)

    usage = result_of(done).usage
    assert usage == metadata_of(done).usage
    assert usage.gate_seconds >= 0.3
    assert usage.gate_memory_bytes >= size
    assert usage.work_seconds > 0
    assert 0 < usage.work_memory_bytes < size
    [gate] = result_of(done).gates
    assert (gate.seconds, gate.memory_bytes) == (usage.gate_seconds, usage.gate_memory_bytes)


async def test_a_waived_gate_lets_the_same_work_be_answered_from_the_store(make_engine, store):
    engine = make_engine()
    await engine.recover()
    spec = order(gate="fail", steps=1)
    started = await engine.start("import", spec, asked("a"))
    metadata = metadata_of(await engine.wait(started.name, 300))
    for output in metadata.outputs:
        store.waive(output.digest, metadata.gates[0].gate, "looked at it", "ann")
    again = await engine.start("import", spec, asked("b"))
    assert again.done
    assert metadata_of(again).cached


async def test_a_job_that_dies_is_started_again_from_its_checkpoint(
    make_engine, tmp_path, monkeypatch
):
    # Whatever the kernel kills beside this.
    monkeypatch.setattr("arriero.operations.runner.oom_kills", lambda: 7)
    engine = make_engine()
    await engine.recover()
    trace = tmp_path / "trace"
    spec = order(steps=6, save=True, trace=str(trace), kill_at=4)
    done = await engine.wait((await engine.start("import", spec, asked("a"))).name, 120)
    assert len(result_of(done).outputs) == 2
    metadata = metadata_of(done)
    assert metadata.attempt == 2
    assert [(attempt, step) for _, attempt, step in trace_of(trace)] == [
        (1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)
    ]  # fmt: skip
    assert metadata.jobs[0].status.code == code_pb2.UNAVAILABLE
    assert "SIGKILL" in metadata.jobs[0].status.message
    assert metadata.jobs[1].status.code == code_pb2.OK


async def test_attempts_end_and_the_last_error_names_the_killer(make_engine, monkeypatch):
    from toyroom_service import KINDS

    kills = iter([7, 8])  # before and after the job, by the kernel's own count
    monkeypatch.setattr("arriero.operations.runner.oom_kills", lambda: next(kills))
    engine = make_engine(kinds=[replace(KINDS[0], max_attempts=1)])
    await engine.recover()
    spec = order(steps=2, kill_at=1)
    done = await engine.wait((await engine.start("import", spec, asked("a"))).name, 120)
    assert done.error.code == code_pb2.RESOURCE_EXHAUSTED
    assert "killed by the kernel's out-of-memory killer" in done.error.message
    assert metadata_of(done).attempt == 1


@pytest.mark.parametrize(("grown", "reason"), [(1, "OUT_OF_MEMORY"), (0, "JOB_KILLED")])
async def test_an_attempt_knows_how_the_one_before_ended(
    make_engine, monkeypatch, tmp_path, grown, reason
):
    kills = iter([7, 7 + grown, 9, 9])
    monkeypatch.setattr("arriero.operations.runner.oom_kills", lambda: next(kills))
    engine = make_engine()
    await engine.recover()
    spec = order(steps=2, kill_at=1, reasons=str(tmp_path / "reasons"))
    done = await engine.wait((await engine.start("import", spec, asked("a"))).name, 120)
    assert metadata_of(done).attempt == 2
    assert (tmp_path / "reasons").read_text() == reason


@pytest.mark.parametrize(
    ("fault", "code", "attempts", "said"),
    [
        ({"fail": "InvalidArgument", "message": "no such row"}, "INVALID_ARGUMENT", 1, "no such"),
        ({"fail": "Unavailable"}, "UNAVAILABLE", 3, "as ordered"),
        ({"bug": True}, "INTERNAL", 1, "KeyError: 'bug'"),
    ],
)
async def test_only_what_may_pass_is_tried_again(make_engine, store, fault, code, attempts, said):
    engine = make_engine()
    await engine.recover()
    done = await engine.wait((await engine.start("import", order(**fault), asked("a"))).name, 120)
    assert done.error.code == code_pb2.Code.Value(code)
    assert said in done.error.message
    assert "Traceback" not in done.error.message
    assert metadata_of(done).attempt == attempts
    assert not store.list()


async def test_a_full_disk_is_refused_with_the_figures_before_anything_is_written(
    make_engine, store, monkeypatch
):
    engine = make_engine(max_jobs=1)
    await engine.recover()
    monkeypatch.setenv("ARRIERO_STORE_QUOTA_BYTES", "100000")
    with pytest.raises(errors.DiskFull) as caught:
        await engine.start("import", order(disk=200_000), asked("a"))
    assert caught.value.needed == 200_000
    assert caught.value.free < 100_000
    assert not engine.list()[0]
    assert not any((store.root / "staging").glob("*/*"))

    # Room at the start that is gone when the job's turn comes.
    before = await engine.start("import", order(steps=10_000, seconds=0.05), asked("a"))
    started = await engine.start("import", order(disk=50_000), asked("b"))
    monkeypatch.setenv("ARRIERO_STORE_QUOTA_BYTES", "10")
    await engine.cancel(before.name)
    done = await engine.wait(started.name, 300)
    assert done.error.code == code_pb2.RESOURCE_EXHAUSTED
    assert metadata_of(done).attempt == 0
    assert not store.list()


@pytest.mark.parametrize(
    ("digest", "error", "said"),
    [
        ("", errors.InvalidArgument, "model: is not set"),
        ("model/x:y", errors.InvalidArgument, "model: 'model/x:y' is not a digest"),
        ("sha256:" + "0" * 64, errors.NotFound, "model: no artifact"),
    ],
)
async def test_wrong_inputs_are_refused_with_their_field(make_engine, digest, error, said):
    engine = make_engine()
    with pytest.raises(error, match=said):
        await engine.start("merge", merging_pb2.MergeSpec(model=digest), asked("a"))
    assert not engine.list()[0]


async def test_an_artifact_of_another_kind_is_refused(make_engine, model):
    engine = make_engine()
    spec = merging_pb2.MergeSpec(model=model.digest, adapters=[model.digest])
    with pytest.raises(errors.InvalidArgument, match=r"adapters\[0\]: .* expected a adapter"):
        await engine.start("merge", spec, asked("a"))


async def test_unknown_gates_are_refused(make_engine):
    engine = make_engine()
    spec = order()
    spec.gates["no.such"] = types_pb2.GATE_MODE_SKIP
    with pytest.raises(errors.InvalidArgument, match="unknown gate"):
        await engine.start("import", spec, asked("a"))


async def test_closing_lets_the_job_save_and_the_next_engine_goes_on(make_engine, tmp_path):
    engine = make_engine()
    await engine.recover()
    trace = tmp_path / "trace"
    go = tmp_path / "go"
    spec = order(steps=30, seconds=0.01, hold=20, go=str(go), trace=str(trace), save=True)
    started = await engine.start("import", spec, asked("a"))
    await until(lambda: len(trace_of(trace)) >= 3, "steps")
    await engine.close()
    taken = len(trace_of(trace))
    go.touch()
    assert not engine.get(started.name).done
    assert metadata_of(engine.get(started.name)).state == RUNNING

    restarted = make_engine()
    assert metadata_of(restarted.get(started.name)).state == RUNNING
    await restarted.recover()
    done = await restarted.wait(started.name, 300)
    assert len(result_of(done).outputs) == 2
    steps = [step for _, _, step in trace_of(trace)]
    assert steps == list(range(1, 31)), "no step was lost or taken twice"
    assert taken < 30
    assert metadata_of(done).jobs[0].status.code == code_pb2.UNAVAILABLE


async def test_closing_does_not_wait_for_a_job_that_has_nothing_to_save(make_engine, tmp_path):
    engine = make_engine(job_grace=600)
    await engine.recover()
    trace = tmp_path / "trace"
    spec = order(steps=1, seconds=600, deaf=True, trace=str(trace))
    started = await engine.start("import", spec, asked("a"))
    await until(lambda: trace_of(trace), "the job runs")
    begin = time.monotonic()
    await engine.close()
    assert time.monotonic() - begin < 60  # a tenth of the job's time, and of its grace
    assert metadata_of(engine.get(started.name)).state == RUNNING


async def test_records_that_a_crash_left_apart_are_brought_together(make_engine, store):
    first = make_engine(max_jobs=0)  # accepts work and runs none
    lost = await first.start("import", order(text="lost"), asked("a"))
    orphan = await first.start("import", order(text="orphan"), asked("b"))
    records = store.record_dir("merging")
    by_name = {f"operations/{r.id}": r.execution for r in first._operations.values()}
    await first.close()
    shutil.rmtree(records / "executions" / by_name[lost.name])
    shutil.rmtree(records / orphan.name.removeprefix("operations/"))

    second = make_engine()
    await second.recover()
    failed = second.get(lost.name)
    assert failed.done
    assert "gone" in failed.error.message
    (left,) = second._executions.values()
    await asyncio.wait_for(left.task, 120)
    assert left.record.state == "CANCELLED", "nobody waits for it"
    again = await second.start("import", order(text="orphan"), asked("b"))
    assert (await second.wait(again.name, 300)).response.ByteSize() > 0


async def test_an_outcome_that_was_complete_is_published_after_a_restart(
    make_engine, store, tmp_path, monkeypatch
):
    from arriero.operations import attempts as module

    engine = make_engine()
    await engine.recover()
    trace = tmp_path / "trace"
    real = module.publish

    def publish_half_and_die(store, service, record, outcome, directory):
        real(store, service, record, replace(outcome, outputs=outcome.outputs[1:]), directory)
        raise RuntimeError("as if the service had been killed here")

    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", publish_half_and_die)
        patch.setattr(module.Attempts, "_end", lambda *_: None)
        started = await engine.start("import", order(steps=1, trace=str(trace)), asked("a"))
        (execution,) = engine._executions.values()
        await asyncio.wait_for(execution.task, 120)
    assert len(store.list()) == 1

    restarted = make_engine()
    await restarted.recover()
    done = await restarted.wait(started.name, 300)
    assert [o.name for o in result_of(done).outputs] == ["main", "report"]
    assert len(store.list()) == 2, "what was published before is found, not made again"
    assert len(trace_of(trace)) == 1


async def test_reports_are_taken_from_the_current_attempt_alone(make_engine, tmp_path):
    engine = make_engine()
    await engine.recover()
    trace = tmp_path / "trace"
    started = await engine.start(
        "import", order(steps=10_000, seconds=0.05, trace=str(trace)), asked("a")
    )
    await until(lambda: trace_of(trace), "the job runs")
    (execution,) = engine._executions
    token = engine._executions[execution].token
    progress = types_pb2.Progress(phase="training", step=3, total_steps=9, loss=1.5)
    engine.reports.progress(execution, 1, token, progress)
    seen = metadata_of(engine.get(started.name)).progress
    assert (seen.phase, seen.step, seen.loss) == ("training", 3, 1.5)
    with pytest.raises(errors.Unauthenticated):
        engine.reports.progress(execution, 1, "guess", progress)
    with pytest.raises(errors.FailedPrecondition):
        engine.reports.progress(execution, 2, token, progress)
    with pytest.raises(errors.FailedPrecondition):
        engine.reports.progress("nobody", 1, token, progress)
    await engine.cancel(started.name)
    await engine.wait(started.name, 300)
    with pytest.raises(errors.FailedPrecondition):
        engine.reports.progress(execution, 1, token, progress)


async def test_lists_are_paged_newest_first(make_engine):
    engine = make_engine()
    names = []
    for i in range(5):
        names.append((await engine.start("import", order(text=str(i)), asked(f"r{i}"))).name)
    seen, token = [], ""
    while True:
        page, token = engine.list(2, token)
        seen += [operation.name for operation in page]
        if not token:
            break
    assert seen == names[::-1]
    with pytest.raises(errors.InvalidArgument):
        engine.list(2, "elsewhere")


async def test_records_hold_neither_tokens_nor_more_than_json(make_engine, store, tmp_path):
    engine = make_engine()
    await engine.recover()
    started = await engine.start("import", order(steps=1), asked("a"))
    await engine.wait(started.name, 300)
    token = next(iter(engine._executions.values())).token
    for path in store.record_dir("merging").rglob("*.json*"):
        assert token not in path.read_text()
        for line in path.read_text().splitlines():
            assert line == "a raw line" or json.loads(line)


async def test_a_pause_lets_a_job_save_and_leave_and_a_resume_goes_on(make_engine, tmp_path):
    engine = make_engine()
    await engine.recover()
    trace = tmp_path / "trace"
    go = tmp_path / "go"
    spec = order(steps=12, hold=8, go=str(go), save=True, trace=str(trace))
    started = await engine.start("import", spec, asked("a"))
    await until(lambda: len(trace_of(trace)) > 2, "some steps are done")
    (execution,) = engine._executions
    await engine.pause(started.name, paused=True)
    await until(lambda: not list(marked(execution)), "its process is gone")
    held = len(trace_of(trace))
    assert metadata_of(engine.get(started.name)).paused
    go.touch()
    await engine.close()  # a restart leaves it held

    again = make_engine()
    await again.recover()
    await asyncio.sleep(0.3)
    assert len(trace_of(trace)) == held
    await again.pause(started.name, paused=False)
    done = await again.wait(started.name, 300)
    assert result_of(done).outputs
    assert [step for _, _, step in trace_of(trace)] == list(range(1, 13))
    assert [job.counted for job in again._executions[execution].record.jobs] == [False, True]


async def test_shared_work_is_held_when_all_who_wait_have_paused_it(make_engine, tmp_path):
    engine = make_engine()
    await engine.recover()
    trace = tmp_path / "trace"
    spec = order(steps=10_000, seconds=0.05, trace=str(trace))
    first = await engine.start("import", spec, asked("a"))
    second = await engine.start("import", spec, asked("b"))
    await until(lambda: trace_of(trace), "the job runs")
    (execution,) = engine._executions
    await engine.pause(first.name, paused=True)
    await asyncio.sleep(0.2)
    assert list(marked(execution))
    await engine.pause(second.name, paused=True)
    await until(lambda: not list(marked(execution)), "its process is gone")
    await engine.cancel(first.name)
    assert not list(marked(execution))
    await engine.cancel(second.name)
    done = await engine.wait(second.name, 300)
    assert metadata_of(done).state == CANCELLED


async def test_who_waits_for_a_place_is_told_why(make_engine, tmp_path):
    engine = make_engine(max_jobs=1)
    await engine.recover()
    long = await engine.start("import", order(steps=10_000, seconds=0.05), asked("a"))
    short = await engine.start("import", order(steps=1), asked("b"))
    said = lambda: metadata_of(engine.get(short.name)).waits_for.message  # noqa: E731
    await until(lambda: "1 of 1 jobs are at work" in said(), "it is told")
    await engine.cancel(long.name)
    assert result_of(await engine.wait(short.name, 300)).outputs


def test_jobs_of_another_build_are_read_within_a_format(tmp_path):
    from arriero.operations.handoff import Assignment, Outcome

    known = Assignment("s", "k", "m:T", {}, {}, "store", str(tmp_path), "e", 1)
    path = known.write()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"of_tomorrow": 1}))
    assert Assignment.read(path) == known
    outcome = Outcome(1, {}, "2026-01-01T00:00:00Z")
    outcome.write(tmp_path)
    data = json.loads((tmp_path / "outcome.json").read_text())
    (tmp_path / "outcome.json").write_text(json.dumps(data | {"of_tomorrow": 1}))
    assert Outcome.read(tmp_path / "outcome.json") == outcome
