"""Steps of one context: whose tokens come when, and what is evaluated only once."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from arriero.inference.lane import BESIDE, CHUNK, Lane, allot
from arriero.inference.slots import MIN_COPY
from arriero.inference.stream import Stream
from arriero.inference.text import TextStream
from arriero.llama import Batch, Context, Model
from arriero.llama.sampler import Sampler, Sampling

BEGINNING = 2 * MIN_COPY


class Watched(Context):
    """A context that keeps what each decode evaluated: (sequence, tokens)."""

    def decode(self, batch: Batch) -> None:
        sequences, counts = np.unique(batch.sequences[: batch.size], return_counts=True)
        self.seen.append(dict(zip(sequences.tolist(), counts.tolist(), strict=True)))
        super().decode(batch)

    seen: list[dict[int, int]]


class Bench:
    """A lane, driven step by step."""

    def __init__(self, model: Model, context: Watched) -> None:
        self.model, self.context = model, context
        context.seen = []
        self.events: list[dict[str, Any]] = []
        self.lane = Lane(model, context, model.pieces(special=False), self.events.append)
        self.ids = np.random.default_rng(7).integers(10, model.n_vocab - 10, 4096).tolist()
        self.streams = 0

    def ask(self, prompt: list[int], max_tokens: int = 8) -> Stream:
        sampling = Sampling(temperature=0, ignore_eos=True)
        self.streams += 1
        stream = Stream(
            id=self.streams,
            prompt=prompt,
            sampler=Sampler(sampling, self.model, prompt, window=self.context.n_ctx),
            text=TextStream([]),
            max_tokens=max_tokens,
        )
        self.lane.waiting.append(stream)
        return stream

    def step(self) -> None:
        self.lane.admit()
        self.lane.step()

    def run(self) -> None:
        while self.lane.waiting or self.lane.busy:
            self.step()

    def text(self, stream: Stream) -> str:
        return "".join(event.get("delta", "") for event in self.events if event["id"] == stream.id)

    def usage(self, stream: Stream) -> dict[str, Any]:
        (last,) = [e for e in self.events if e["id"] == stream.id and e.get("done")]
        found: dict[str, Any] = last["usage"]
        return found


@pytest.fixture
def bench(tiny_gguf: Path) -> Iterator[Bench]:
    with (
        Model(tiny_gguf) as model,
        Watched(model, n_ctx=2048, n_seq=4, n_batch=1024, n_threads=1) as context,
    ):
        yield Bench(model, context)


def alone(bench: Bench, prompt: list[int]) -> str:
    """What it says when nothing is reused."""
    bench.context.clear()
    fresh = Bench(bench.model, bench.context)
    stream = fresh.ask(prompt)
    fresh.run()
    return fresh.text(stream)


def test_of_prompts_that_come_together_and_begin_alike_one_is_evaluated(bench: Bench) -> None:
    beginning, ends = bench.ids[:BEGINNING], [bench.ids[1000 + 9 * i :][:9] for i in range(4)]
    streams = [bench.ask(beginning + end) for end in ends]
    bench.run()
    evaluated = sum(sum(step.values()) for step in bench.context.seen)
    made = sum(bench.usage(stream)["completion_tokens"] - 1 for stream in streams)
    assert evaluated - made == BEGINNING + 4 * 9
    assert [bench.usage(stream)["cached_tokens"] for stream in streams] == [0, *3 * [BEGINNING]]
    assert bench.lane.cached_tokens == 3 * BEGINNING
    said = [bench.text(stream) for stream in streams]
    assert said == [alone(bench, beginning + end) for end in ends]


def test_who_followed_one_that_left_goes_on_without_it(bench: Bench) -> None:
    beginning = bench.ids[: CHUNK + MIN_COPY]
    streams = [bench.ask([*beginning, *bench.ids[1000 + i : 1009 + i]]) for i in range(3)]
    bench.step()
    assert streams[0].filled == CHUNK
    assert streams[1].leader is streams[2].leader is streams[0]
    assert bench.lane.cancel(streams[0].id)
    bench.run()
    # One of the two evaluates what was lost, the other one follows it.
    cached = [bench.usage(stream)["cached_tokens"] for stream in streams[1:]]
    assert cached == [0, len(beginning)]
    for stream in streams[1:]:
        assert bench.text(stream) == alone(bench, stream.prompt)


def test_a_long_prompt_stops_nobody(bench: Bench) -> None:
    talking = bench.ask(bench.ids[:20], max_tokens=100)
    bench.step()
    late = bench.ask(bench.ids[100:400])
    before = talking.made
    while not late.made:
        bench.step()
    steps = -(-300 // BESIDE)
    assert talking.made - before == steps
    assert all(sum(step.values()) <= 1 + BESIDE for step in bench.context.seen[1:])


def test_those_who_come_together_speak_together(bench: Bench) -> None:
    streams = [bench.ask(bench.ids[300 * i : 300 * i + 250]) for i in range(4)]
    bench.step()
    assert [stream.made for stream in streams] == [1, 1, 1, 1]


def fake(number: int, left: int, making: bool = False) -> Any:
    made = Stream(
        id=number, prompt=[1] * left, sampler=None, text=None, max_tokens=1, admitted=number
    )  # type: ignore[arg-type]
    made.next_token = 1 if making else None
    return made


def test_where_most_wait_for_a_first_token_a_step_takes_a_chunk() -> None:
    running = [fake(0, 9, making=True), fake(1, 400), fake(2, 400)]
    assert allot(running, 1024) == {1: 400, 2: CHUNK - 400}


def test_who_came_first_is_evaluated_first_whatever_its_slot() -> None:
    making = [fake(i, 9, making=True) for i in range(10, 70)]
    assert allot([fake(3, 100), *making, fake(2, 10)], 1024) == {2: 10, 3: len(making) // 3 - 10}


def test_nobody_follows_what_another_adapter_computes(bench: Bench) -> None:
    first, other, same = (bench.ask([*bench.ids[:BEGINNING], i]) for i in (1, 2, 3))
    other.adapter = SimpleNamespace(key=5)  # type: ignore[assignment]
    bench.lane.admit()
    assert (other.leader, same.leader) == (None, first)


def test_texts_to_embed_are_never_more_at_once_than_one_computation_takes(bench: Bench) -> None:
    texts = [bench.ids[:300], bench.ids[300:600], bench.ids[600:1300]]
    vectors = bench.lane.embed(texts[:2], None)
    vectors += bench.lane.embed(texts[1:2], None) + bench.lane.embed(texts[2:], None)
    assert [len(rows) for rows in vectors] == [300, 300, 700]
    assert max(sum(step.values()) for step in bench.context.seen) <= CHUNK
