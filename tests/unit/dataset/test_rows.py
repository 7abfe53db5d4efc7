import json
from pathlib import Path

import pytest

from arriero.dataset import json_rows, row, rows
from arriero.errors import InvalidArgument, NotFound


def read(path: Path, text: str | bytes) -> list[rows.Row]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return list(rows.read(path, "rows.json"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows"


def test_an_array_is_read_with_row_and_line(file: Path) -> None:
    found = read(file, '\n[\n {"a": 1},\n {"a":\n 2}\n,"x"]\n')
    assert [(r.number, r.line, r.value) for r in found] == [
        (1, 3, {"a": 1}),
        (2, 4, {"a": 2}),
        (3, 6, "x"),
    ]


def test_lines_are_read_with_blank_ones_skipped(file: Path) -> None:
    found = read(file, '{"a": 1}\r\n\r\n{"a": 2}')
    assert [(r.number, r.line, r.value["a"]) for r in found] == [(1, 1, 1), (2, 3, 2)]


@pytest.mark.parametrize("text", ["", "  \n ", "[]", "[ \n ]"])
def test_a_file_without_rows_is_empty(file: Path, text: str) -> None:
    assert read(file, text) == []


def test_a_byte_order_mark_is_no_text(file: Path) -> None:
    assert read(file, b'\xef\xbb\xbf{"a": 1}\n')[0].value == {"a": 1}
    assert read(file, b'\xef\xbb\xbf[{"a": 1}]')[0].value == {"a": 1}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_rows_are_the_same_wherever_reading_cuts(
    file: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK", chunk)
    values = [{"a": 'é"\\u\n' * 5, "b": [1.5e3, None, True]}, 123456, -7.25, "x", {}, "你好"]
    found = read(file, json.dumps(values, indent=1))
    assert [row.value for row in found] == values
    with pytest.raises(InvalidArgument, match="row 2, line 2: malformed JSON"):
        read(file, '[{"a": 1},\n{"a": tru}, {"a": 3}]' + " " * 200)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('[{"a": 1},\n {"a": 2},\n {"a" 3}]', "rows.json: row 3, line 3: malformed JSON"),
        ('[{"a": 1},\n {"a":\n\n 2,}]', "row 2, line 4: malformed JSON"),
        ('[{"a": 1}\n {"a": 2}]', "row 1, line 2: .*expected ',' or ']', found '{'"),
        ('[{"a": 1},\n{"a": 2},\n]', "row 3, line 3: .*expected a row after ','"),
        ('[{"a": 1},\n{"a": 2}', "row 2, line 2: .*found the end of the file"),
        ('[{"a": 1},\n{"a": "2', "row 2, line 2: malformed JSON: Unterminated string"),
        ('[{"a": 1}]\nx', "row 1, line 2: .*text after the closing"),
        ('{"a": 1}\n\n{"a": 2', "row 2, line 3: malformed JSON: .*column"),
        ('{"a": 1}\n{"a": 2} {"a": 3}', "row 2, line 2: malformed JSON: Extra data"),
        ('{\n "data": []\n}', "row 1, line 1: .*one JSON object per line"),
        (b'{"a": "caf\xe9"}\n', "byte 0xe9 is not UTF-8"),
        (b'[{"a": "caf\xe9"}]\n', "byte 0xe9 is not UTF-8"),
        ("[" * 200_000, "row 1, line 1"),
        ('[{"a": ' + "9" * 5000 + "}]", "row 1, line 1: cannot be decoded"),
    ],
)
def test_malformed_json_names_file_row_and_line(file: Path, text: str | bytes, where: str) -> None:
    with pytest.raises(InvalidArgument, match=where) as caught:
        read(file, text)
    assert caught.value.violations[0].field == "sources"
    assert caught.value.reason == "MALFORMED_ROW"


def test_a_row_without_end_is_not_read_into_memory(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row, "MAX_ROW", 1000)
    monkeypatch.setattr(json_rows, "_CHUNK", 100)
    with pytest.raises(InvalidArgument, match="row 1, line 1: the row is longer than 1000"):
        read(file, '[{"a": "' + "x" * 5000)
    with pytest.raises(InvalidArgument, match="row 2, line 2: the line is longer than 1000"):
        read(file, '{"a": 1}\n{"a": "' + "x" * 5000)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        list(rows.read(tmp_path / "nothing"))
