"""Pace, the log of answers, and what is read from an answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arriero.dataset.transform.answers import Answers
from arriero.dataset.transform.asking import read_fields
from arriero.dataset.transform.pace import Pace


class Clock:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


async def starts(pace: Pace, clock: Clock, count: int, tokens: int = 0) -> list[float]:
    found = []
    for _ in range(count):
        await pace.start(tokens)
        found.append(round(clock.now - 100, 3))
    return found


async def test_requests_start_evenly() -> None:
    clock = Clock()
    pace = Pace(120, 0, clock=clock, sleep=clock.sleep)
    assert await starts(pace, clock, 5) == [0, 0.5, 1.0, 1.5, 2.0]


async def test_tokens_per_minute_hold_over_a_minute_whatever_was_expected() -> None:
    clock = Clock()
    pace = Pace(0, 6000, clock=clock, sleep=clock.sleep)
    for _ in range(60):
        await pace.start(500)
        pace.correct(500, 200)
    # 60 requests of 200 tokens are two minutes' worth, less the ten seconds' that may go at once.
    assert 105 <= clock.now - 100 <= 120


async def test_a_pause_holds_everybody() -> None:
    clock = Clock()
    pace = Pace(0, 0, clock=clock, sleep=clock.sleep)
    pace.pause(7)
    assert await starts(pace, clock, 2) == [7, 7]


async def test_answers_are_found_again_and_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Answers(path, forgive=True) as answers:
        await answers.add("a", "eins\nzwei", {"prompt_tokens": 3, "completion_tokens": 2})
        await answers.fail("b", "too long")
    with path.open("ab") as file:
        file.write(b'{"key": "c", "answer": "dr')
    with Answers(path, forgive=False) as answers:
        assert answers.read("a") == "eins\nzwei"
        assert (answers.read("b"), answers.failures) == (None, {"b": "too long"})
        assert "c" not in answers
        assert (answers.prompt_tokens, answers.completion_tokens) == (3, 2)
        await answers.add("c", "drei", {})
        assert answers.read("c") == "drei"
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "c"]


async def test_failures_are_forgiven_once_and_for_all_attempts_after(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Answers(path, forgive=True) as answers:
        await answers.fail("a", "no")
    with Answers(path, forgive=True) as answers:
        assert answers.failures == {}
        await answers.fail("b", "no")
    with Answers(path, forgive=False) as answers:
        assert answers.failures == {"b": "no"}


def test_a_damaged_line_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"key": "a", "answer": "x", "usage": {}}\n\x00\x00\n[]\n')
    with Answers(path, forgive=False) as answers:
        assert len(answers) == 1
        assert answers.read("a") == "x"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ('{"q": "a", "a": 3}', {"q": "a", "a": "3"}),
        ('Here:\n```json\n{"q": "{", "a": ["x"]}\n```', {"q": "{", "a": '["x"]'}),
        ('Sure! {"q": "a", "a": "b", "more": 1} Done.', {"q": "a", "a": "b"}),
    ],
)
def test_several_fields_come_from_an_object(answer: str, found: dict[str, str]) -> None:
    assert read_fields(answer, ["q", "a"]) == found


@pytest.mark.parametrize("answer", ["no object", '{"q": "a"}', "{", '["q", "a"]', '{"q": 1, "a"'])
def test_an_answer_without_the_fields_is_refused(answer: str) -> None:
    with pytest.raises(ValueError, match="the answer"):
        read_fields(answer, ["q", "a"])


def test_one_field_takes_the_whole_text() -> None:
    assert read_fields(' {"x": 1}\n', ["output"]) == {"output": '{"x": 1}'}
