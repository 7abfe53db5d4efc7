"""What goes wrong in a training: memory, numbers that are none, a resume that differs."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from arriero.errors import DiskFull, FailedPrecondition, Preempted  # noqa: E402
from arriero.gates import Verdict  # noqa: E402
from arriero.testing.jobs import run_job  # noqa: E402
from arriero.training import allocator, stopping  # noqa: E402
from arriero.training.adapter import attach, load_base  # noqa: E402
from arriero.training.checkpoints import Checkpoints  # noqa: E402
from arriero.training.forward import Forward  # noqa: E402
from arriero.training.job import train  # noqa: E402
from arriero.training.loop import Loop  # noqa: E402
from arriero.training.numerics import Numerics  # noqa: E402
from arriero.training.plan import Lora, Plan  # noqa: E402
from arriero.training.recovery import _Sink  # noqa: E402
from arriero.training.rows import Rows  # noqa: E402
from arriero.training.spec import resolve  # noqa: E402
from arriero.v1 import training_pb2, types_pb2  # noqa: E402

CPU = Numerics("cpu", torch.float32)
PLAN = Plan(rows=12, max_steps=6, batch_size=4, micro_batch_size=4, learning_rate=1e-2, warmup=1)
FAST = {
    "max_steps": 6,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "dtype": "float32",
    "save_steps": 2,
    "lora": {"r": 4, "target_modules": ["all-linear"], "lora_dropout": 0.1},
}


@pytest.fixture
def make(model, dataset, val_dataset):
    """Makes loops over the same tiny model and rows, whose micro batches stay in one piece."""

    def make(plan: Plan = PLAN, **more) -> Loop:
        base = load_base(model.path, torch.float32, "cpu")
        made = attach(base, Lora(rank=4, dropout=0.0), base="sha256:0", seed=1)
        return Loop(made, Rows(dataset.path), Rows(val_dataset.path), plan, CPU, **more)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make
    torch.set_num_threads(threads)


def run(loop: Loop, save=lambda: None) -> list[float]:
    loop.run(report=lambda _: None, save=save)
    return loop.state.losses


@pytest.fixture
def room(kit, model, dataset, val_dataset, tmp_path: Path):
    """Resolves and runs a spec, as the service and its job do."""
    inputs = {"model": model, "dataset": dataset, "val_dataset": val_dataset}

    def run(prepare=None, attempt=1, last_failure="", **fields):
        spec = training_pb2.TrainSpec(**{**FAST, **fields})
        resolved = resolve(spec, kit.context(**inputs)).spec
        return run_job(
            train,
            "train",
            resolved,
            inputs,
            kit.store,
            tmp_path,
            attempt=attempt,
            last_failure=last_failure,
            prepare=prepare,
        )

    return run


class Watch:
    """Keeps the job and what it reports; asks it to leave at a step."""

    def __init__(self, leave_at: int | None = None) -> None:
        self.leave_at = leave_at
        self.seen: list[dict] = []

    def __call__(self, job) -> None:
        self.job = job
        update = job.meter.update

        def watched(**now):
            update(**now)
            self.seen.append(now)
            leave = self.leave_at is not None and now["phase"] == "training"
            if leave and now["step"] >= self.leave_at:
                job.preempted.set()

        job.meter.update = watched

    def verdict(self, gate: str):
        return next(item for item in self.job.gates.results if item.gate == gate)


def test_a_real_allocation_that_fails_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert allocator.ran_out(caught.value)
    assert allocator.ran_out(torch.OutOfMemoryError("CUDA out of memory"))
    assert not allocator.ran_out(RuntimeError("shapes do not match"))


class Tight:
    """Memory that holds so many rows and no more, as a forward pass finds it."""

    def __init__(self, monkeypatch, rows: int) -> None:
        self.refused: list[int] = []
        forward = Forward.forward

        def loss(model, micro):
            if len(micro.lengths) > rows:
                self.refused.append(len(micro.lengths))
                torch.empty(1 << 50)  # a real failure of the real allocator
            return forward(model, micro)

        monkeypatch.setattr(Forward, "forward", loss)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(make, monkeypatch, caplog):
    expected = run(make())
    tight = Tight(monkeypatch, rows=1)
    loop = make()
    reports = []
    with caplog.at_level(logging.WARNING):
        loop.run(report=reports.append, save=lambda: None)
    assert tight.refused == [4, 2]
    assert loop.state.losses == pytest.approx(expected, abs=1e-5)
    assert reports[-1].micro_batch_size == loop.state.micro_batch_size == 1
    said = "with micro_batch_size 4: from here on it is 2, with 2 accumulated a step"
    assert said in caplog.text


def test_the_smaller_micro_batch_outlives_the_process(make, monkeypatch):
    Tight(monkeypatch, rows=2)
    first = make()
    run(first)
    second = make()
    second.restore(first.tensors(), json.loads(json.dumps(first.state.to_dict())))
    assert second.micro_batch_size == 2


def test_a_row_that_does_not_fit_is_refused_with_advice(make, monkeypatch):
    Tight(monkeypatch, rows=0)
    with pytest.raises(FailedPrecondition, match="gradient_checkpointing, load_in_4bit") as caught:
        run(make())
    assert caught.value.reason == "OUT_OF_MEMORY"


def test_validation_shrinks_too(make, monkeypatch):
    expected = make()
    run(expected)
    forward = Forward.forward

    def loss(model, micro):
        if not model.training and len(micro.lengths) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, micro)

    monkeypatch.setattr(Forward, "forward", loss)
    loop = make()
    run(loop)
    assert loop.micro_batch_size == 2
    assert [v for _, v in loop.state.val_losses] == pytest.approx(
        [v for _, v in expected.state.val_losses], abs=1e-5
    )


def test_a_gradient_larger_than_any_real_one_ends_the_training(room, monkeypatch):
    """It is finite, and would be clipped to a step like any other."""
    taken = Loop._gradients

    def garbage(loop, *args):
        value = taken(loop, *args)
        next(iter(loop._weights.values())).grad.view(-1)[0] = 1e15
        return value

    monkeypatch.setattr(Loop, "_gradients", garbage)
    with pytest.raises(FailedPrecondition, match=r"the gradient is 1e\+15 at step 1 of"):
        room()


def test_what_memory_can_not_hold_is_refused_before_anything_is_loaded(room, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # of the host's memory
    monkeypatch.setattr("arriero.training.job.available_bytes", lambda: 500_000_000)
    monkeypatch.setattr("arriero.training.job._load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(FailedPrecondition, match=r"this host has 0.50 GB free") as caught:
        room()
    assert "libraries 0.90 GB" in caught.value.message


def test_what_memory_can_not_hold_at_once_is_taken_in_smaller_parts(room, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # of the host's memory
    from arriero.training import memory

    sizes: list[int] = []
    need = memory.Demand.need

    def measured(demand):
        found = need(demand)
        sizes.append(found.total)
        return found

    monkeypatch.setattr(memory.Demand, "need", measured)
    room()
    least = min(sizes)
    # Between what two rows and what four rows need.
    monkeypatch.setattr("arriero.training.job.available_bytes", lambda: least - 1)
    watch = Watch()
    with caplog.at_level(logging.WARNING):
        made, _ = room(watch)
    assert "too much for micro_batch_size 4: it is 2" in caplog.text
    assert made.metrics["micro_batch_size"] == 2
    assert watch.job.meter.read().micro_batch_size == 2


def test_after_a_kill_for_want_of_memory_each_attempt_takes_half(room, tmp_path, monkeypatch):
    """The attempts are ended as a kill ends them: without a word of theirs."""

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    sizes = []
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_gradients", killed)
        for attempt, last in ((1, ""), (2, "OUT_OF_MEMORY"), (3, "OUT_OF_MEMORY")):
            watch = Watch()
            with pytest.raises(Killed):
                room(watch, attempt, last)
            sizes.append(watch.seen[-1]["micro_batch_size"])
        with pytest.raises(FailedPrecondition, match="ended because memory ran out with micro"):
            room(None, 4, "OUT_OF_MEMORY")
    assert sizes == [4, 2, 1]


def test_a_kill_for_other_reasons_changes_nothing(room):
    watch = Watch()
    room(watch, 2, "JOB_KILLED")
    assert watch.seen[-1]["phase"] == "proving"
    assert watch.job.meter.read().micro_batch_size == 4


def test_a_step_without_a_finite_loss_is_named_with_its_rows(make, monkeypatch):
    forward = Forward.forward
    calls = iter(range(1000))
    monkeypatch.setattr(
        Forward, "forward", lambda *a: forward(*a) * (float("nan") if next(calls) == 1 else 1)
    )
    loop = make(replace(PLAN, max_steps=6))
    with pytest.raises(
        FailedPrecondition, match=r"train.finite: the loss is nan at step"
    ) as caught:
        run(loop)
    rows = [str(row) for row in loop._batch(int(caught.value.metadata["step"]) - 1)]
    assert caught.value.metadata["rows"] == ", ".join(rows)
    assert f"rows {', '.join(rows)}" in caught.value.message
    assert "learning rate" in caught.value.message
    assert caught.value.reason == "LOSS_NOT_FINITE"


def test_where_the_gate_warns_such_a_step_is_left_out(room, monkeypatch):
    forward = Loop._gradients
    monkeypatch.setattr(
        Loop,
        "_gradients",
        lambda loop, *a: forward(loop, *a) * (float("nan") if loop.state.step == 2 else 1),
    )
    watch = Watch()
    gates = {"train.finite": types_pb2.GATE_MODE_WARN}
    made, golden = room(watch, gates=gates)
    verdict = watch.verdict("train.finite")
    assert (verdict.verdict, verdict.figure) == (Verdict.WARNED, 1)
    assert "left out: 3" in verdict.detail
    assert made.metrics["steps"] == 6
    assert len(json.loads((golden.path / "report.json").read_text())["losses"]) == 5


def test_weights_that_are_not_finite_end_it_in_any_mode(make):
    loop = make(replace(PLAN, max_steps=100), leaves_out=True)
    with torch.no_grad():
        next(iter(loop._weights.values())).fill_(float("nan"))
    with pytest.raises(FailedPrecondition, match=r"train.finite"):
        run(loop)
    assert len(loop.state.not_finite) == 30


def test_a_resume_proves_that_it_is_the_same_training(room):
    with pytest.raises(Preempted, match="step 3 of 6"):
        room(Watch(3))
    watch = Watch()
    room(watch, 2)
    verdict = watch.verdict("train.resume")
    assert verdict.verdict is Verdict.PASSED
    assert verdict.figure < 1e-6
    assert "resumed at step 3" in verdict.detail


@pytest.mark.parametrize("wrong", ["data position", "random state", "weights"])
def test_a_resume_that_differs_is_refused(room, monkeypatch, wrong):
    with pytest.raises(Preempted):
        room(Watch(3))
    restore = Loop.restore

    def restored(loop, tensors, state):
        restore(loop, tensors, state)
        if wrong == "data position":
            loop.state.step += 1
        elif wrong == "random state":
            loop._seed = lambda: torch.manual_seed(5)
        else:
            with torch.no_grad():
                for weight in loop._weights.values():
                    weight *= 1.5

    monkeypatch.setattr(Loop, "restore", restored)
    with pytest.raises(FailedPrecondition, match=r"train.resume: resumed at step") as caught:
        room(None, 2)
    assert caught.value.reason == "RESUME_DIFFERS"
    watch = Watch()
    room(watch, 3, gates={"train.resume": types_pb2.GATE_MODE_WARN})
    assert watch.verdict("train.resume").verdict is Verdict.WARNED


def test_the_base_is_measured_before_the_first_step(room):
    watch = Watch()
    made, _ = room(watch)
    verdict = watch.verdict("train.improves")
    found = made.metrics["val_loss"] - made.metrics["base_val_loss"]
    assert verdict.figure == pytest.approx(found)
    assert verdict.verdict is (Verdict.PASSED if found < 0 else Verdict.WARNED)


def test_a_gate_that_is_skipped_costs_no_validation(room):
    made, _ = room(gates={"train.improves": types_pb2.GATE_MODE_SKIP})
    assert "base_val_loss" not in made.metrics


def test_the_best_is_the_earliest_of_the_lowest():
    assert stopping.best([]) is None
    assert stopping.best([[2, 3.0], [4, 2.0], [6, 2.0], [8, 2.5]]) == (4, 2.0)
    assert stopping.best([[2, float("nan")]]) is None


@pytest.mark.parametrize(
    ("losses", "patience", "threshold", "over"),
    [
        ([3, 2, 1], 1, 0, False),
        ([3, 2, 2], 1, 0, True),
        ([3, 2, 2.1, 2.2], 3, 0, False),
        ([3, 2, 2.1, 2.2, 2.3], 3, 0, True),
        ([3, 2.95, 2.92], 2, 0.1, True),
        ([3, 4, 5, 6], 0, 0, False),
        ([float("nan"), float("nan")], 2, 0, True),
    ],
)
def test_patience_counts_validations_without_an_improvement(losses, patience, threshold, over):
    taken = [[step, loss] for step, loss in enumerate(losses, start=1)]
    assert stopping.exhausted(taken, patience, threshold) is over


def scripted(monkeypatch, losses: list[float]) -> None:
    """Let validations find these losses."""
    found = iter(losses)
    monkeypatch.setattr(Loop, "_validate", lambda *_: next(found))


def test_a_training_that_gets_no_better_ends_and_hands_on_its_best(room, monkeypatch, tmp_path):
    scripted(monkeypatch, [4.0, 3.0, 2.0, 2.5, 2.6, 1.0])
    kept = {}
    save = Checkpoints.save

    def saved(checkpoints, step, *a, **k):
        kept[step] = json.loads((save(checkpoints, step, *a, **k) / "state.json").read_text())

    monkeypatch.setattr(Checkpoints, "save", saved)
    made, _ = room(
        max_steps=20,
        eval_steps=1,
        save_steps=1,
        save_total_limit=1,
        early_stopping_patience=2,
        load_best_model_at_end=True,
    )
    assert made.metrics["steps"] == 4
    assert (made.metrics["best_step"], made.metrics["val_loss"]) == (2, 2.0)
    whole = sorted(path.name for path in (tmp_path / "staging/checkpoints").glob("step-*"))
    assert [int(name[5:]) for name in whole] == [2, 3]  # the best, and the last one saved
    from safetensors.torch import load_file

    path = tmp_path / "staging/checkpoints" / whole[0] / "tensors.pt"
    best = torch.load(path, map_location="cpu")["weights"]
    adapter = load_file(str(made.path / "adapter_model.safetensors"))
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, best[name.replace(".weight", ".default.weight")])


def test_without_the_knob_the_last_weights_are_handed_on(room, monkeypatch):
    scripted(monkeypatch, [4.0, 2.0, 3.0])
    made, _ = room(eval_steps=3)
    assert (made.metrics["best_step"], made.metrics["val_loss"]) == (6, 3.0)


def test_a_disk_that_is_full_while_tensors_are_written_is_named_as_such(tmp_path):
    def write(directory: Path) -> None:
        with _Sink(Path("/dev/full")) as sink:
            sink.fill(lambda: torch.save({"a": torch.zeros(1 << 20)}, sink))

    with pytest.raises(DiskFull, match="123 bytes needed") as caught:
        Checkpoints(tmp_path / "kept").save(1, write, needed=123)
    assert caught.value.free > 0
    assert list((tmp_path / "kept").iterdir()) == []


def test_freed_memory_goes_back_to_the_kernel_now_and_then(monkeypatch):
    trimmed, now = [], [0.0]
    monkeypatch.setattr(allocator, "_trim", lambda: trimmed.append(now[0]))
    tidy = allocator.Tidy("cpu", clock=lambda: now[0])
    for second in range(25):
        now[0] = float(second)
        tidy()
    assert trimmed == [10, 20]
    elsewhere = allocator.Tidy("cuda", clock=lambda: now[0])
    now[0] = 100.0
    elsewhere()
    assert trimmed == [10, 20]
