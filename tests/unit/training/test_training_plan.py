"""Steps and warmup follow from rows and epochs."""

import pytest

from arriero.training.plan import Lora, Plan


def test_a_fraction_of_an_epoch_is_whole_steps():
    plan = Plan(rows=100, batch_size=16, num_epochs=0.5)
    assert plan.steps_per_epoch == 7
    assert plan.total_steps == 4


def test_fewer_rows_than_a_batch_make_one_step_an_epoch():
    assert Plan(rows=3, batch_size=16, num_epochs=2).total_steps == 2


def test_max_steps_overrides_epochs():
    assert Plan(rows=100, num_epochs=3, max_steps=5).total_steps == 5


def test_rounding_errors_of_floating_point_add_no_step():
    assert Plan(rows=30, batch_size=1, num_epochs=0.1).total_steps == 3


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"),
    [(0.05, 100, 5), (0.05, 30, 2), (0.05, 1, 0), (7, 100, 7), (0, 10, 0), (0.99, 2, 1)],
)
def test_warmup_is_steps_or_a_share_and_leaves_a_step_to_learn_in(warmup, steps, expected):
    assert Plan(rows=1, max_steps=steps, warmup=warmup).warmup_steps == expected


def test_lora_parameters_are_counted_over_both_matrices_and_magnitudes():
    modules = {"a": (10, 20), "b": (5, 5)}
    assert Lora(rank=4).parameters(modules) == 4 * 30 + 4 * 10
    assert Lora(rank=4, dora=True).parameters(modules) == 4 * 30 + 4 * 10 + 15


def test_a_pattern_sets_the_rank_of_the_modules_that_end_in_it():
    lora = Lora(rank=4, rank_pattern={"layers.1.q_proj": 16, "v_proj": 2})
    assert lora.rank_of("model.layers.1.q_proj") == 16
    assert lora.rank_of("model.layers.11.q_proj") == 4
    assert lora.rank_of("model.layers.0.v_proj") == 2


def test_validation_is_after_each_epoch_or_every_so_many_steps_and_at_the_end():
    plan = Plan(rows=12, batch_size=4, max_steps=8)
    assert [step for step in range(9) if plan.validates_at(step)] == [3, 6, 8]
    often = Plan(rows=12, batch_size=4, max_steps=5, eval_steps=2)
    assert [step for step in range(6) if often.validates_at(step)] == [2, 4, 5]
