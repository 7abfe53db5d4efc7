import pytest

from arriero.dataset.formats import Example, RowFormat, detect

GOOD = {"instruction": "Name a river.", "output": "The Urubamba."}
USER = {"role": "user", "content": "Name a river."}
ANSWER = {"role": "assistant", "content": "The Urubamba."}


def parse(value: object, name: str = "alpaca", **columns: str) -> Example | str:
    return RowFormat(name, columns).parse(value)


def messages(value: object, name: str = "alpaca", **columns: str) -> list[dict[str, str]]:
    example = parse(value, name, **columns)
    assert isinstance(example, Example), example
    return list(example.messages)


def test_an_alpaca_row_becomes_a_conversation() -> None:
    assert messages(GOOD | {"input": "In Peru", "system": "Be brief.", "id": 7}) == [
        {"role": "system", "content": "Be brief."},
        USER | {"input": "In Peru"},
        ANSWER,
    ]


@pytest.mark.parametrize("empty", [{}, {"input": None}, {"input": ""}, {"history": []}])
def test_what_may_be_left_out(empty: dict[str, None]) -> None:
    assert messages(GOOD | empty) == [USER, ANSWER]


def test_alpacas_history_comes_first() -> None:
    found = messages(GOOD | {"history": [["Hello", "Hi"], ["Who?", "A llama."]], "system": "Be."})
    assert [m["content"] for m in found] == [
        *("Be.", "Hello", "Hi", "Who?", "A llama.", "Name a river.", "The Urubamba.")
    ]
    assert [m["role"] for m in found] == ["system", *["user", "assistant"] * 3]


def test_sharegpt_and_messages_are_the_same_conversation() -> None:
    turns = [("human", "Name a river."), ("gpt", "The Urubamba."), ("human", "b"), ("gpt", "c")]
    shared = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    chat = {"messages": [USER, ANSWER, USER | {"content": "b"}, ANSWER | {"content": "c"}]}
    assert messages(shared, "sharegpt") == messages(chat, "messages") == chat["messages"]
    found = messages(shared | {"system": "Be brief."}, "sharegpt")
    assert found[0] == {"role": "system", "content": "Be brief."}


def test_plain_text_is_an_object_or_the_text_itself() -> None:
    for value in ({"text": "Llamas walk."}, "Llamas walk."):
        assert parse(value, "text") == Example(text="Llamas walk.")


def test_columns_give_fields_other_names() -> None:
    row = {"question": "Name a river.", "answer": "The Urubamba.", "instruction": 3}
    assert messages(row, instruction="question", output="answer") == [USER, ANSWER]
    assert parse({"q": "x"}, instruction="q") == "field 'output' is missing"
    assert parse({"document": "x"}, "text", text="document") == Example(text="x")
    unused = RowFormat("alpaca", {"instruction": "question", "output": "answer"}).unused(row)
    assert unused == ["instruction"]


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
        (GOOD | {"history": "x"}, "field 'history' is text, expected an array"),
        (GOOD | {"history": [["x"]]}, "field 'history', turn 1 is an array, expected [question"),
        (GOOD | {"history": [["x", 3]]}, "field 'history', turn 1 is a number, expected text"),
    ],
)
def test_an_alpaca_row_that_cannot_be_used_says_why(row: object, problem: str) -> None:
    found = parse(row)
    assert isinstance(found, str)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("turns", "problem"),
    [
        ("x", "field 'messages' is text, expected an array"),
        ([3], "messages[0] is a number, expected an object"),
        ([{"content": "x"}], "messages[0].role is None, expected one of system, user, assistant"),
        ([USER | {"role": "tool"}], "messages[0].role is 'tool', expected one of"),
        ([USER, ANSWER | {"content": None}], "messages[1].content is null, expected text"),
        ([USER, ANSWER | {"content": " "}], "messages[1].content is empty"),
        ([USER], "messages ends without an answer"),
        ([], "messages ends without an answer"),
        ([ANSWER], "messages has a message of the assistant first; expected the user's"),
        ([USER, USER, ANSWER], "messages has a message of the user after the user's"),
        ([USER, ANSWER, ANSWER], "messages has a message of the assistant after the assistant's"),
        ([USER, USER | {"role": "system"}, ANSWER], "messages has a system message after others"),
    ],
)
def test_a_conversation_that_cannot_be_used_says_why(turns: object, problem: str) -> None:
    found = parse({"messages": turns}, "messages")
    assert isinstance(found, str)
    assert found.startswith(problem)


def test_fields_that_are_not_read_are_named_when_they_hold_something() -> None:
    row = GOOD | {"history": [["a", "b"]], "id": 0, "text": "", "source": "wiki"}
    assert RowFormat("alpaca").unused(row) == ["source"]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (GOOD, "alpaca"),
        ({"conversations": [], "id": 1}, "sharegpt"),
        ({"messages": []}, "messages"),
        ({"text": "x"}, "text"),
        ("x", "text"),
        ({"question": "x"}, None),
        (3, None),
    ],
)
def test_a_format_is_known_by_its_fields(row: object, name: str | None) -> None:
    assert detect(row, {}) == name


def test_a_format_is_known_by_mapped_fields_too() -> None:
    columns = {"instruction": "question", "output": "answer"}
    assert detect({"question": "x", "answer": "y"}, columns) == "alpaca"
