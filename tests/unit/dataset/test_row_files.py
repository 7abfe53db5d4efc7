import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from arriero.dataset import row, rows
from arriero.errors import InvalidArgument

LINES = b'{"a": 1}\n{"a": 2}\n'


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


def values(path: Path) -> list[Any]:
    return [item.value for item in rows.read(path)]


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)],
)
def test_compressed_files_are_read_as_they_are(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    for name, data in (
        ("rows.jsonl", LINES),
        ("rows.json", b'[{"a": 1}, {"a": 2}]'),
        ("rows.csv", b"a\n1\n2\n"),
        ("rows.TXT", b"one\n\ntwo\n"),
    ):
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(pack(data))
        plain = tmp_path / name
        plain.write_bytes(data)
        assert values(path) == values(plain)
        assert len(values(path)) == 2


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)],
)
def test_a_damaged_compressed_file_is_refused_by_name(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]
) -> None:
    import random

    letters = random.Random(1)
    body = "".join(f'{{"a": "{letters.random()}"}}\n' for _ in range(5000)).encode()
    for data in (pack(body)[:-2000], b"no archive at all\n"):
        path = tmp_path / f"rows.jsonl.{suffix}"
        path.write_bytes(data)
        with pytest.raises(InvalidArgument, match=rf"rows.jsonl.{suffix}"):
            values(path)


def test_csv_rows_have_the_headers_names(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b"\xef\xbb\xbfinstruction, output\r\n"
        b'Name a river,"The ""Urubamba"",\r\nin Peru"\r\n\r\nx,\xe4\xbd\xa0\r\n'
    )
    found = list(rows.read(path))
    assert [item.value for item in found] == [
        {"instruction": "Name a river", "output": 'The "Urubamba",\r\nin Peru'},
        {"instruction": "x", "output": "你"},
    ]
    assert [(item.number, item.line) for item in found] == [(1, 2), (2, 5)]
    (tmp_path / "rows.tsv").write_text("a\tb\n1,2\t3\n")
    assert values(tmp_path / "rows.tsv") == [{"a": "1,2", "b": "3"}]
    (tmp_path / "empty.csv").write_text("a,b\n")
    assert values(tmp_path / "empty.csv") == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a,b\n1,2\n3\n", "row 2, line 3: malformed CSV: 1 values, but 2 columns"),
        ("a,b\n1,2,3\n", "row 1, line 2: malformed CSV: 3 values, but 2 columns"),
        ("a,a\n1,2\n", "the header names 'a' twice"),
        ('a,b\n1,"2\n', "row 1, line 2: malformed CSV: unexpected end of data"),
        (b"a\ncaf\xe9\n", "byte 0xe9 is not UTF-8"),
    ],
)
def test_malformed_csv_names_file_row_and_line(
    tmp_path: Path, text: str | bytes, problem: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InvalidArgument, match=problem):
        values(path)


def test_a_quote_without_end_does_not_take_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row, "MAX_ROW", 1000)
    path = tmp_path / "rows.csv"
    path.write_text('a,b\n1,"' + "x\n" * 3000)
    with pytest.raises(InvalidArgument, match=r"row 1, line 2: .*field larger than"):
        values(path)


def test_parquet_rows_keep_lists_of_objects(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
    table = pa.table({"conversations": [turns] * 3000, "id": list(range(3000))})
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=700)
    found = list(rows.read(path))
    assert len(found) == 3000
    assert found[1500].value == {"conversations": turns, "id": 1500}
    assert (found[1500].number, found[1500].line) == (1501, 1501)


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(LINES)
    with pytest.raises(InvalidArgument, match=r"rows.parquet: .*no readable Parquet"):
        values(path)
    (tmp_path / "rows.parquet.gz").write_bytes(b"")
    with pytest.raises(InvalidArgument, match="compressed inside"):
        values(tmp_path / "rows.parquet.gz")


def test_a_line_of_text_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text("Llamas walk. \n\n  Alpacas don't.\r\n")
    assert [(item.line, item.value) for item in rows.read(path)] == [
        (1, "Llamas walk. "),
        (3, "  Alpacas don't."),
    ]


def test_archives_are_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "rows.zip").write_bytes(b"PK")
    with pytest.raises(InvalidArgument, match="is an archive; unpack it"):
        values(tmp_path / "rows.zip")


@pytest.mark.parametrize(
    ("name", "yes"),
    [
        ("a.jsonl", True),
        ("a.v2.CSV.gz", True),
        ("a.parquet", True),
        ("a.parquet.gz", False),
        ("a.txt.zst", True),
        ("a.md", False),
        ("gz", False),
        ("a.gz", False),
    ],
)
def test_which_files_of_a_directory_hold_rows(name: str, yes: bool) -> None:
    assert rows.is_rows(name) is yes
