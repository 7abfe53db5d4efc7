import pytest

from arriero.dataset import alpaca

GOOD = {"instruction": "Name a river.", "output": "The Urubamba."}


def test_a_row_becomes_a_conversation() -> None:
    example = alpaca.parse(GOOD | {"input": "In Peru", "system": "Be brief.", "id": 7})
    assert isinstance(example, alpaca.Example)
    assert example.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a river.", "input": "In Peru"},
        {"role": "assistant", "content": "The Urubamba."},
    ]
    assert example.prompt == example.messages[:-1]


@pytest.mark.parametrize("empty", [{}, {"input": None}, {"input": ""}])
def test_input_and_system_may_be_left_out(empty: dict[str, None]) -> None:
    example = alpaca.parse(GOOD | empty)
    assert isinstance(example, alpaca.Example)
    assert example.prompt == [{"role": "user", "content": "Name a river."}]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([GOOD], "expected an object, found an array"),
        ("text", "expected an object, found text"),
        (None, "expected an object, found null"),
        ({"output": "x"}, "field 'instruction' is missing"),
        ({"instruction": "x"}, "field 'output' is missing"),
        (GOOD | {"output": None}, "field 'output' is null, expected text"),
        (GOOD | {"output": 3}, "field 'output' is a number, expected text"),
        (GOOD | {"output": True}, "field 'output' is true or false, expected text"),
        (GOOD | {"input": ["x"]}, "field 'input' is an array, expected text"),
        (GOOD | {"system": {}}, "field 'system' is an object, expected text"),
        (GOOD | {"output": " \n"}, "field 'output' is empty"),
        (GOOD | {"instruction": ""}, "field 'instruction' is empty"),
        (GOOD | {"output": "\ud83d"}, "field 'output' holds half of a surrogate pair"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row: object, problem: str) -> None:
    found = alpaca.parse(row)
    assert isinstance(found, str)
    assert found.startswith(problem)


def test_fields_that_are_not_read_are_named_when_they_hold_something() -> None:
    assert alpaca.unused(GOOD | {"history": [["a", "b"]], "id": 0, "text": ""}) == ["history"]
