"""Who may start a job now."""

import asyncio

import pytest

from arriero.errors import InvalidArgument
from arriero.operations.queue import Demand, JobQueue


class Herd:
    """Places by name, and what each was told last."""

    def __init__(self, queue):
        self.queue, self.told, self.order, self.places = queue, {}, [], {}

    async def ask(self, name, owner="", **demand):
        def tell(error):
            self.told[name] = str(error) if error else ""

        place = self.places[name] = self.queue.place(owner, Demand(**demand), tell)

        async def take():
            await self.queue.take(place)
            self.order.append(name)

        task = asyncio.create_task(take())
        await asyncio.sleep(0)
        return task

    async def leave(self, name):
        self.queue.give_back(self.places[name])
        await asyncio.sleep(0.01)


async def test_first_come_first_served_and_told_why():
    herd = Herd(JobQueue(1))
    for name in "abc":
        await herd.ask(name)
    assert herd.order == ["a"]
    assert herd.told == {
        "a": "",
        "b": "the job waits: 1 of 1 jobs are at work",
        "c": herd.told["b"],
    }
    await herd.leave("a")
    await herd.leave("b")
    assert herd.order == ["a", "b", "c"]


async def test_priorities_go_first_and_a_large_job_is_not_overtaken():
    herd = Herd(JobQueue(9, gpus=8))
    await herd.ask("running", gpus=4)
    await herd.ask("large", gpus=8)
    await herd.ask("small", gpus=1)
    await herd.ask("urgent", gpus=2, priority=5)
    assert herd.order == ["running", "urgent"]
    assert "6 of 8 GPUs are in use, it needs 8" in herd.told["small"]
    await herd.leave("running")
    await herd.leave("urgent")
    assert herd.order[2:] == ["large"]
    await herd.leave("large")
    assert herd.order[3:] == ["small"]


async def test_an_owner_at_its_limit_is_overtaken_by_others():
    herd = Herd(JobQueue(9, per_owner=1))
    for name, owner in (("a1", "ann"), ("a2", "ann"), ("b1", "bo")):
        await herd.ask(name, owner)
    assert herd.order == ["a1", "b1"]
    assert "ann has 1 jobs at work" in herd.told["a2"]
    await herd.leave("a1")
    assert herd.order[2:] == ["a2"]


async def test_who_no_longer_waits_is_forgotten():
    herd = Herd(JobQueue(1))
    await herd.ask("a")
    waiting = await herd.ask("b")
    await herd.ask("c")
    waiting.cancel()
    await asyncio.sleep(0)
    await herd.leave("a")
    assert herd.order == ["a", "c"]


def test_what_never_fits_is_refused():
    with pytest.raises(InvalidArgument, match="asks for 16 GPUs, and the budget"):
        JobQueue(9, gpus=8).check(Demand(gpus=16))
