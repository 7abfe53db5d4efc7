"""The loop: accumulation is exact, and a resumed training is the same training."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from arriero.errors import FailedPrecondition  # noqa: E402
from arriero.training.adapter import attach, load_base, spare_activations  # noqa: E402
from arriero.training.loop import Loop, Stopped  # noqa: E402
from arriero.training.numerics import Numerics, choose, cpu_has_fast_bfloat16  # noqa: E402
from arriero.training.plan import Lora, Plan  # noqa: E402
from arriero.training.rows import MASKED, Rows  # noqa: E402

CPU = Numerics("cpu", torch.float32)
PLAN = Plan(rows=12, max_steps=8, batch_size=4, micro_batch_size=2, learning_rate=1e-2, warmup=1)


@pytest.fixture
def workshop(kit, model, dataset, val_dataset):
    """Makes loops over the same tiny model and rows."""
    rows, val_rows = Rows(dataset.path), Rows(val_dataset.path)

    def make(plan: Plan = PLAN, *, dropout: float = 0.0, how: Numerics = CPU, clock=None) -> Loop:
        base = load_base(model.path, how.dtype, how.device)
        lora = Lora(rank=4, alpha=8, dropout=dropout, targets="all-linear")
        wrapped = attach(base, lora, base="sha256:0", seed=plan.seed)
        if plan.gradient_checkpointing:
            spare_activations(wrapped)
        return Loop(wrapped, rows, val_rows, plan, how, **({"clock": clock} if clock else {}))

    return SimpleNamespace(make=make, rows=rows, val_rows=val_rows)


def run(loop: Loop, stop_after: int | None = None) -> list[float]:
    """Train, to the end or until so many micro batches were asked for; the losses."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return stop_after is not None and asked > stop_after

    try:
        loop.run(report=lambda _: None, save=lambda: None, should_stop=should_stop)
    except Stopped:
        assert stop_after is not None
    return loop.state.losses


def through_a_file(loop: Loop, tmp_path) -> tuple[dict, dict]:
    """What a checkpoint would give back."""
    torch.save(loop.tensors(), tmp_path / "tensors")
    loaded = torch.load(tmp_path / "tensors", weights_only=True)
    return loaded, copy.deepcopy(loop.state.to_dict())


def test_it_learns_the_rows_by_heart(workshop):
    losses = run(workshop.make(replace(PLAN, max_steps=40)))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("micro", [1, 2])
def test_the_micro_batch_changes_nothing(workshop, micro):
    whole = run(workshop.make(replace(PLAN, micro_batch_size=4)))
    parts = run(workshop.make(replace(PLAN, micro_batch_size=micro)))
    assert parts == pytest.approx(whole, abs=1e-5)


def test_the_loss_is_the_mean_over_the_trained_tokens_of_the_step(workshop):
    """Against transformers' own loss, one row at a time and without padding."""
    loop = workshop.make(replace(PLAN, max_steps=1))
    chosen = loop._batch(0)
    total, count = 0.0, 0
    loop.model.eval()
    for row in chosen:
        ids = torch.tensor([workshop.rows.ids(int(row)).tolist()])
        labels = torch.tensor([workshop.rows.labels(int(row)).tolist()])
        trained = int((labels[:, 1:] != MASKED).sum())
        with torch.no_grad():
            total += float(loop.model(input_ids=ids, labels=labels).loss) * trained
        count += trained
    assert run(loop)[0] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("stop_after", [1, 6, 13])
def test_a_resumed_training_has_the_same_losses(workshop, tmp_path, dropout, stop_after):
    """Also when it was stopped in the middle of a step, with dropout's randomness."""
    straight = workshop.make(dropout=dropout)
    expected = run(straight)
    first = workshop.make(dropout=dropout)
    done = len(run(first, stop_after))
    assert done < len(expected)
    torch.rand(7)  # a new process has another random state
    second = workshop.make(dropout=dropout)
    second.restore(*through_a_file(first, tmp_path))
    assert run(second) == pytest.approx(expected, abs=1e-5)
    assert second.state.val_losses == [
        [step, pytest.approx(loss, abs=1e-5)] for step, loss in straight.state.val_losses
    ]
    for name, weight in straight.tensors()["weights"].items():
        torch.testing.assert_close(second.tensors()["weights"][name], weight)


def test_held_out_loss_is_taken_after_each_epoch_and_at_the_end(workshop):
    loop = workshop.make()  # 3 steps an epoch, 8 steps
    run(loop)
    assert [step for step, _ in loop.state.val_losses] == [3, 6, 8]
    assert all(math.isfinite(loss) for _, loss in loop.state.val_losses)


def test_a_training_stopped_in_its_last_validation_makes_up_for_it(workshop, tmp_path):
    plan = replace(PLAN, max_steps=3)
    straight = workshop.make(plan)
    run(straight)
    first = workshop.make(plan)
    run(first, stop_after=3 * 2 + 1)
    assert first.state.step == 3
    assert first.state.val_losses == []
    second = workshop.make(plan)
    second.restore(*through_a_file(first, tmp_path))
    run(second)
    assert second.state.val_losses[0][1] == pytest.approx(straight.state.val_losses[0][1], abs=1e-6)


def saves(workshop, plan: Plan, seconds_per_reading: float) -> list[int]:
    time = 0.0

    def clock() -> float:
        nonlocal time
        time += seconds_per_reading
        return time

    loop = workshop.make(plan, clock=clock)
    steps: list[int] = []
    loop.run(report=lambda _: None, save=lambda: steps.append(loop.state.step))
    return steps


def test_the_first_step_is_saved_and_then_every_so_many(workshop):
    assert saves(workshop, replace(PLAN, save_steps=3), 0.0) == [1, 3, 6]


def test_without_a_number_of_steps_one_a_minute_is_saved(workshop):
    # The clock is read three times a step, and once more when something is saved.
    assert saves(workshop, PLAN, 10.0) == [1, 3, 5, 7]
    assert saves(workshop, PLAN, 0.001) == [1]


def test_a_loss_that_is_not_finite_ends_it_with_advice(workshop):
    loop = workshop.make()
    run(loop, stop_after=5)
    with torch.no_grad():
        next(iter(loop._weights.values())).fill_(float("nan"))
    with pytest.raises(FailedPrecondition, match="lower learning_rate") as caught:
        run(loop)
    assert caught.value.reason == "LOSS_NOT_FINITE"
    assert caught.value.metadata["step"] == "3"
    assert len(loop.state.losses) == 2


def test_a_checkpoint_of_another_model_is_refused(workshop, tmp_path):
    loop = workshop.make()
    tensors, state = through_a_file(loop, tmp_path)
    tensors["weights"].popitem()
    with pytest.raises(FailedPrecondition, match="are not the"):
        workshop.make().restore(tensors, state)


def test_bfloat16_trains_float32_weights_and_nearly_the_same_losses(workshop):
    loop = workshop.make(how=Numerics("cpu", torch.bfloat16))
    assert {weight.dtype for weight in loop._weights.values()} == {torch.float32}
    frozen = {p.dtype for p in loop.model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    assert run(loop) == pytest.approx(run(workshop.make()), rel=0.05)


@pytest.fixture
def one_thread():
    """Dropout follows the lanes, of which there are as many as threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_gradient_checkpointing_changes_nothing(workshop):
    spared = run(workshop.make(replace(PLAN, gradient_checkpointing=True), dropout=0.2))
    assert spared == pytest.approx(run(workshop.make(dropout=0.2)), abs=1e-5)


def test_gradient_checkpointing_takes_one_lane(workshop):
    """What is computed again must draw as it drew before, which only torch's own draws do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        spared = workshop.make(replace(PLAN, gradient_checkpointing=True), dropout=0.2)
        assert spared.path.endswith("1 at a time")
        assert workshop.make(dropout=0.2).path.endswith("2 at a time")
    finally:
        torch.set_num_threads(threads)


def test_reports_carry_real_tokens_and_the_scheduled_rate(workshop):
    loop, reports = workshop.make(replace(PLAN, warmup=4.0)), []
    loop.run(report=reports.append, save=lambda: None)
    steps = [r for r in reports if r.phase == "training"]
    assert [r.step for r in steps] == list(range(1, 9))
    assert {r.total for r in steps} == {8}
    assert [r.learning_rate for r in steps[:4]] == pytest.approx([0, 2.5e-3, 5e-3, 7.5e-3])
    seen = int(sum(workshop.rows.lengths[loop._batch(step)].sum() for step in range(8)))
    assert steps[-1].tokens == loop.state.tokens == seen
    assert steps[-1].tokens_per_second > 0
    assert steps[-1].mfu is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_float16_without_a_gpu_is_refused():
    with pytest.raises(FailedPrecondition, match="needs a GPU"):
        choose("float16")


def test_bfloat16_is_chosen_where_the_cpu_multiplies_it(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nflags : fpu avx2 amx_bf16 sse\n")
    assert cpu_has_fast_bfloat16(info)
    info.write_text("processor : 0\nflags : fpu avx2 bf16x\n")
    assert not cpu_has_fast_bfloat16(info)
    assert not cpu_has_fast_bfloat16(tmp_path / "absent")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_lanes_change_nothing_and_draw_the_same_each_time(workshop, two_threads):
    """Two threads, each with half of a micro batch; an odd one and one row included."""
    for micro in (4, 2, 1):
        plan = replace(PLAN, micro_batch_size=micro, batch_size=4)
        parallel = workshop.make(plan)
        assert parallel._lanes.count == min(2, micro)
        torch.set_num_threads(1)
        alone = workshop.make(plan)
        torch.set_num_threads(2)
        assert alone._lanes.count == 1
        assert run(parallel) == pytest.approx(run(alone), abs=1e-5)
    first, second = (run(workshop.make(plan, dropout=0.3)) for plan in (PLAN, PLAN))
    assert first == second
    assert torch.get_num_threads() == 2


def test_what_fails_in_a_lane_is_not_lost(workshop, two_threads, monkeypatch):
    """Memory that runs out in one thread halves the micro batch, as it does alone."""
    loop = workshop.make(replace(PLAN, micro_batch_size=4, max_steps=2))
    forward, calls = loop._forward.forward, []

    def short(micro):
        calls.append(micro)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("DefaultCPUAllocator: can't allocate memory")
        return forward(micro)

    monkeypatch.setattr(loop._forward, "forward", short)
    run(loop)
    assert loop.micro_batch_size == 2
    assert loop.state.step == 2


def test_a_step_that_moves_nothing_does_not_make_the_schedule_warn(workshop, recwarn):
    loop = workshop.make(replace(PLAN, max_steps=1))
    loop._apply = lambda *_: False
    run(loop)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]
