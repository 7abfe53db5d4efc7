"""Steps and warmup follow from rows and epochs."""

import pytest

from arriero.training.plan import Plan, memory_bytes, trained_parameters


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


def test_memory_grows_with_batch_and_shrinks_with_gradient_checkpointing():
    config = {"hidden_size": 64, "num_hidden_layers": 8, "intermediate_size": 256, "vocab_size": 99}

    def need(rows: int, checkpointing: bool = False) -> int:
        return memory_bytes(
            config,
            parameters=10**6,
            trained=10**4,
            rows=rows,
            length=512,
            gradient_checkpointing=checkpointing,
        )

    assert need(8) > need(4) > need(4, checkpointing=True)


def test_lora_parameters_are_counted_over_both_matrices():
    assert trained_parameters({"a": (10, 20), "b": (5, 5)}, 4) == 4 * 30 + 4 * 10
