"""A preview says what preparing would do, without doing it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arriero.dataset.preview import Preview, preview
from arriero.dataset.sources import locate_all
from arriero.operations.defaults import with_defaults
from arriero.v1 import dataset_pb2

Look = Callable[..., Preview]


@pytest.fixture
def look(publish, data: Path, store, allowed, bytes_dir: Path) -> Look:
    """Previews rows with the byte-level tokenizer."""
    tokenizer = publish(bytes_dir, "tokenizer", "bytes")

    def look(*files: list[Any], samples: int = 3, rows: int = 1000, **fields: Any) -> Preview:
        paths = []
        for number, values in enumerate(files):
            path = data / f"rows{number}.jsonl"
            path.write_text("".join(json.dumps(value) + "\n" for value in values))
            paths.append(str(path))
        spec = with_defaults(dataset_pb2.DatasetSpec(sources=paths, **fields))
        located = locate_all(spec.sources, (), store, allowed)
        return preview(spec, tokenizer, located, samples=samples, rows=rows)

    return look


def row(number: int, **fields: Any) -> dict[str, Any]:
    return {"instruction": f"What is {number}?", "input": "", "output": f"It is {number}."} | fields


def test_samples_say_token_by_token_what_is_trained_on(look: Look) -> None:
    found = look([row(i, output=f"Größe {i} 🦙") for i in range(9)], template="chatml", samples=2)
    assert [sample.row.number for sample in found.samples] == [1, 2]
    sample = found.samples[0]
    trained = "".join(t for t, on in zip(sample.texts, sample.trained, strict=True) if on)
    assert trained == "Größe 0 🦙<|im_end|>"
    whole = "".join(sample.texts)
    assert whole.startswith("<|im_start|>")
    assert "What is 0?" in whole
    assert sample.ids[0] in found.special
    assert found.template == "chatml"
    assert list(found.formats) == ["alpaca"]


def test_counts_are_those_of_a_whole_preparation(look: Look) -> None:
    rows = [row(i) for i in range(40)] + [row(3), row(5), {"instruction": "x"}, 7]
    rows.append(row(50, output="llama " * 100))
    found = look(rows, cutoff_len=100)
    assert (found.rows, found.all_rows) == (45, True)
    assert (found.duplicates, found.bad.count, found.truncated) == (2, 2, 1)
    assert "row 43" in str(found.bad)
    assert sum(found.lengths.values()) == 43
    assert max(found.lengths) > 100
    assert 0 < found.trained_tokens < found.tokens


def test_only_the_first_rows_are_looked_at_of_each_source(look: Look) -> None:
    found = look([row(i) for i in range(50)], [row(i) for i in range(50)], rows=20)
    assert (found.rows, found.all_rows, found.duplicates) == (20, False, 10)


def test_plain_text_has_no_template(look: Look) -> None:
    found = look([{"text": "The driver walks."}], format="auto")
    assert (found.template, list(found.formats)) == ("", ["text"])
    assert all(found.samples[0].trained[1:])
