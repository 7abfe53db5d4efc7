"""Slots: beginnings are shared, what was used last stays, and no gaps remain."""

import random

import numpy as np
import pytest

from arriero.inference.slots import MIN_COPY, Move, Placement, Slots

LONG = list(range(1000, 1000 + 2 * MIN_COPY))


def run(slots: Slots, prompt: list[int]) -> Placement:
    placement = slots.place(prompt)
    assert placement is not None
    slots.append(placement.slot, prompt[placement.reused :])
    return placement


def test_the_same_prompt_again_evaluates_only_its_last_token() -> None:
    slots = Slots(3, 512)
    first = run(slots, LONG)
    assert first.reused == 0
    slots.release(first.slot)
    assert slots.place(LONG) == Placement(first.slot, first.slot, len(LONG) - 1)


def test_a_beginning_is_copied_from_a_request_that_still_runs() -> None:
    slots = Slots(2, 512)
    first = run(slots, [*LONG, 1])
    second = slots.place([*LONG, 2, 3])
    assert second == Placement(1 - first.slot, first.slot, len(LONG))
    assert slots.tokens(second.slot).tolist() == LONG


def test_short_beginnings_are_not_worth_a_copy() -> None:
    slots = Slots(2, 512)
    run(slots, [*LONG[: MIN_COPY - 1], 1])
    second = slots.place([*LONG[: MIN_COPY - 1], 2])
    assert second is not None
    assert (second.source, second.reused) == (second.slot, 0)


def test_another_prompt_takes_the_slot_that_was_not_used_for_longest() -> None:
    slots = Slots(2, 512)
    old, new = run(slots, LONG), run(slots, [7] * 100)
    slots.release(old.slot)
    slots.release(new.slot)
    assert slots.place([9] * 100) == Placement(old.slot, old.slot, 0)


def test_all_in_use_means_none() -> None:
    slots = Slots(1, 512)
    run(slots, LONG)
    assert slots.place([1, 2]) is None
    assert slots.idle() is None


def test_a_gap_is_closed_by_moving_the_last() -> None:
    slots = Slots(4, 512)
    placed = [run(slots, [number] * 10).slot for number in range(4)]
    assert sorted(placed) == [0, 1, 2, 3]
    assert slots.compact() is None
    kept = slots.tokens(3).tolist()
    slots.release(1)
    assert slots.compact() == Move(3, 1)
    assert slots.tokens(1).tolist() == kept
    assert slots.compact() is None
    assert slots.busy == 3


@pytest.mark.parametrize("adapters", [1, 3])
def test_whatever_comes_and_goes_the_books_tell_the_truth(adapters: int) -> None:
    dice = random.Random(5)
    slots = Slots(5, 400)
    truth: dict[int, list[int]] = {}
    running: dict[int, list[int]] = {}
    for _ in range(2000):
        if running and dice.random() < 0.5:
            slot = dice.choice(list(running))
            running.pop(slot)
            slots.release(slot)
            while (move := slots.compact()) is not None:
                truth[move.target] = list(truth[move.source])
                running[move.target] = running.pop(move.source)
        else:
            prompt = [*LONG[: dice.randrange(1, len(LONG))], *dice.choices(range(9), k=5)]
            placement = slots.place(prompt, key=dice.randrange(adapters))
            if placement is None:
                assert len(running) == 5
                continue
            if (move := placement.makes_room) is not None:
                assert move.target not in running
                truth[move.target] = list(truth[move.source])
                running[move.target] = running.pop(move.source)
            assert placement.slot not in running
            assert truth.get(placement.source, [])[: placement.reused] == prompt[: placement.reused]
            assert placement.reused < len(prompt)
            truth[placement.slot] = prompt[: placement.reused]
            slots.append(placement.slot, prompt[placement.reused :])
            truth[placement.slot] += prompt[placement.reused :]
            running[placement.slot] = prompt
        used = sorted(running)
        assert not used or used[-1] - used[0] + 1 == len(used)
        for slot, ids in running.items():
            assert slots.tokens(slot).tolist() == ids
    assert isinstance(slots.tokens(0), np.ndarray)


def test_nothing_is_reused_of_what_another_adapter_computed() -> None:
    slots = Slots(2, 512)
    first = slots.place(LONG, key=1)
    assert first is not None
    slots.append(first.slot, LONG)
    other = slots.place(LONG, key=2)
    assert other is not None
    assert other.reused == 0
    slots.release(first.slot)
    slots.release(other.slot)
    again = slots.place(LONG, key=1)
    assert again is not None
    assert (again.slot, again.reused) == (first.slot, len(LONG) - 1)


def test_a_moved_slot_is_still_its_adapters() -> None:
    slots = Slots(4, 512)
    for prompt, key in ((LONG[:5], 1), (LONG[:6], 1), (LONG, 2)):
        placement = slots.place(prompt, key)
        assert placement is not None
        slots.append(placement.slot, prompt)
    used = sorted(i for i in range(4) if len(slots.tokens(i)))
    holder = next(i for i in used if len(slots.tokens(i)) == len(LONG))
    middle = next(i for i in used if 0 < i < 3 and i != holder)
    slots.release(middle)
    move = slots.compact()
    target = move.target if move is not None and move.source == holder else holder
    slots.release(target)
    again = slots.place(LONG, key=2)
    assert again is not None
    assert again.reused == len(LONG) - 1


def test_requests_of_one_adapter_come_to_lie_together() -> None:
    slots = Slots(4, 512)
    for number, key in enumerate((1, 2, 1, 2)):
        placement = slots.place([number] * 10, key)
        assert placement is not None
        slots.append(placement.slot, [number] * 10)
    assert [int(slots.tokens(slot)[0]) % 2 for slot in range(4)] in ([0, 0, 1, 1], [1, 1, 0, 0])


def test_what_its_own_cache_saves_is_worth_more_than_company() -> None:
    slots = Slots(3, 512)
    (first, _, _) = [slots.place(prompt, key) for prompt, key in ((LONG, 1), ([5], 2), ([6], 1))]
    assert first is not None
    slots.append(first.slot, LONG)
    slots.release(first.slot)
    again = slots.place(LONG, 1)
    assert again == Placement(first.slot, first.slot, len(LONG) - 1)
