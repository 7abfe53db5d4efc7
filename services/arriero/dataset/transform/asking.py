"""All questions of a stage, several at once, each once.

Responsibility: workers between rows, the log of answers and the endpoint, and
when to give up on all of it. Does not know HTTP, files of rows or jobs.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from arriero.dataset.transform.answers import Answers
from arriero.dataset.transform.chat import Answer, NotAnswered, Question
from arriero.errors import FailedPrecondition, Unavailable

__all__ = ["Asker", "Asking", "Task", "read_fields"]

# So many failures in a row, without one answer between them, are the endpoint's.
_GIVE_UP = 20
_FENCED = re.compile(r"```(?:json)?\s*(\{.*\})\s*```", re.DOTALL)


class Asker(Protocol):
    """What is needed of `chat.Chat`."""

    async def ask(self, question: Question) -> Answer:
        """The answer, or NotAnswered."""
        ...


@dataclass(frozen=True, slots=True)
class Task:
    """A question, and what its answer is kept by."""

    key: str
    question: Question


@dataclass
class Asking:
    """Asks every task that has no answer yet.

    Args:
        asker: who answers.
        answers: what is known; grows.
        fields: that each answer must give.
        concurrency: questions at once.
        again: tries of a question whose answer does not give the fields.
        advance: called when a task is done, in any way.
        stopping: asked before each task; True begins no more.

    Attributes:
        failures: why, by key; those of this run that may go better next time, too.
    """

    asker: Asker
    answers: Answers
    fields: Sequence[str]
    concurrency: int
    again: int
    advance: Callable[[], None]
    stopping: Callable[[], bool]
    failures: dict[str, str] = field(default_factory=dict)
    _under_way: set[str] = field(default_factory=set)
    _in_a_row: int = 0
    _lasting: bool = True

    async def run(self, tasks: Iterable[Task]) -> None:
        """Return when every task is done, or `stopping` says so.

        Raises:
            Unavailable: the endpoint stopped answering.
            FailedPrecondition: the endpoint refuses all questions.
            ArrieroError: what the asker raises about the endpoint.
        """
        source = iter(tasks)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.concurrency):
                    group.create_task(self._work(source))
        except ExceptionGroup as errors:
            # One is enough: workers fail alike.
            raise errors.exceptions[0] from None

    async def _work(self, source: Iterator[Task]) -> None:
        for task in source:
            if self.stopping():
                return
            if task.key in self.answers.failures:
                self.failures[task.key] = self.answers.failures[task.key]
            elif task.key not in self.answers and task.key not in self._under_way:
                self._under_way.add(task.key)
                await self._ask(task)
                self._under_way.discard(task.key)
            else:
                await asyncio.sleep(0)
            self.advance()

    async def _ask(self, task: Task) -> None:
        try:
            answer = await self._usable(task.question)
        except NotAnswered as error:
            self.failures[task.key] = error.why
            if error.lasting:
                await self.answers.fail(task.key, error.why)
            self._count(error)
            return
        self._in_a_row = 0
        await self.answers.add(task.key, answer.text, answer.usage)

    async def _usable(self, question: Question) -> Answer:
        """An answer that gives the fields."""
        for left in range(self.again, -1, -1):
            answer = await self.asker.ask(question)
            try:
                read_fields(answer.text, self.fields)
                return answer
            except ValueError as error:
                if not left:
                    raise NotAnswered(str(error), lasting=True) from None
        raise AssertionError("the last try returns or raises")

    def _count(self, error: NotAnswered) -> None:
        self._lasting = error.lasting and (self._lasting or not self._in_a_row)
        self._in_a_row += 1
        if self._in_a_row < max(_GIVE_UP, 2 * self.concurrency):
            return
        said = f"{self._in_a_row} rows in a row were not answered, the last one: {error.why}"
        kept = f"{len(self.answers)} answers are kept for the next try"
        if self._lasting:
            raise FailedPrecondition(
                f"{said}; {kept}: mend the prompt or the limits", reason="NOT_ANSWERED"
            )
        raise Unavailable(f"{said}; {kept}", reason="ENDPOINT_AWAY")


def read_fields(answer: str, names: Sequence[str]) -> dict[str, str]:
    """What an answer gives for each field: its whole text for one, a JSON object's for several.

    The object may stand in a fenced block, or among other text.

    Raises:
        ValueError: no such object, or a field is missing.
    """
    if len(names) == 1:
        return {names[0]: answer.strip()}
    fenced = _FENCED.search(answer)
    text = fenced[1] if fenced else answer[answer.find("{") : answer.rfind("}") + 1]
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"the answer is no JSON object with {', '.join(names)}: {_short(answer)}"
        ) from None
    if missing := [name for name in names if found.get(name) is None]:
        raise ValueError(f"the answer's object has no {', '.join(missing)}: {_short(answer)}")
    return {name: _text(found[name]) for name in names}


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(text: str) -> str:
    words = " ".join(text.split())
    return repr(words if len(words) <= 80 else words[:80] + "…")
