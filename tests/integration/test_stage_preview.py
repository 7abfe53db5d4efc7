"""`arriero dataset preview` and `report`, through all services."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from arriero.client import AsyncClient
from arriero.errors import InvalidArgument

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def shared(platform_at: Any) -> Iterator[Any]:
    """One platform for the module."""
    with platform_at() as made:
        yield made


def test_a_preview_needs_the_tokenizer_and_says_what_to_run(
    shared: Any, tiny_pipeline: Write, tmp_path: Path
) -> None:
    path = tiny_pipeline(tmp_path)
    refused = shared.cli("dataset", "preview", str(path), check=False)
    assert refused.returncode == 1
    said = " ".join(refused.stderr.split())
    assert f"{path}:" in said
    assert "stage 'rows' needs stage 'base' (import), of which the store has no result yet" in said
    command = said[said.index("run arriero import ") + 4 : said.index(" first, which")].split()
    assert command[:2] == ["arriero", "import"]
    shared.cli(*command[1:])

    seen = shared.cli("dataset", "preview", str(path), "--samples", "1")
    assert "rows.jsonl row 1" in seen.stdout
    assert "⟦llama 0 of the herd</s>⟧" in " ".join(seen.stdout.split())
    assert "24 (all rows)" in seen.stdout
    found = shared.json("dataset", "preview", str(path), "--stage", "rows", "--rows", "10")
    assert found["stage"] == "rows"
    assert int(found["dataset"]["rows"]) == 10
    assert "all_rows" not in found["dataset"]
    assert len(found["dataset"]["samples"]) == 3


def test_what_is_wrong_is_said_with_its_place(
    shared: Any, tiny_pipeline: Write, tmp_path: Path
) -> None:
    path = tiny_pipeline(tmp_path)
    wrong = shared.cli("dataset", "preview", str(path), "--stage", "sft", check=False)
    assert wrong.returncode == 2
    assert "'sft' is no dataset stage; expected one of the dataset stages: rows" in wrong.stderr
    body = yaml.safe_load(path.read_text())
    body["stages"][1]["dataset"]["cutoff_len"] = 1
    path.write_text(yaml.safe_dump(body))
    wrong = shared.cli("dataset", "preview", str(path), check=False)
    assert wrong.returncode == 2
    assert f"{path}:" in wrong.stderr
    assert "cutoff_len" in wrong.stderr


async def asked_with_asyncio(platform: Any, ref: str) -> Any:
    async with AsyncClient(platform.home.running()["address"]) as client:
        return await client.artifacts.dataset_report(ref)


def test_reports_are_shown(shared: Any, tiny_llama_dir: Path, tmp_path: Path, write_rows) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Ο αγωγιάτης οδηγεί ένα καραβάνι από λάμα.\n" * 40)
    path = tmp_path / "pipeline.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "reports",
                "stages": [
                    {"name": "base", "import": {"source": str(tiny_llama_dir)}},
                    {
                        "name": "vocab",
                        "extend_tokenizer": {
                            "model": "base",
                            "corpus": ["corpus.txt"],
                            "vocab_size": 420,
                        },
                    },
                    {"name": "rows", "dataset": {"sources": [str(rows)], "tokenizer": "vocab"}},
                ],
            }
        )
    )
    run = shared.json("run", str(path))
    digests = {
        stage["name"]: next(o["digest"] for o in stage["outputs"] if o["name"] == "report")
        for stage in run["stages"]
        if stage["name"] != "base"
    }
    grown = shared.cli("dataset", "report", digests["vocab"]).stdout
    assert "compression gained" in grown
    assert "420" in grown
    prepared = shared.cli("dataset", "report", digests["rows"]).stdout
    assert "rows.jsonl row 1" in prepared
    assert "trained on" in prepared
    assert json.loads(shared.cli("dataset", "report", digests["rows"], "--output", "json").stdout)[
        "rows"
    ]["train"]
    with shared.client() as client:
        report = client.artifacts.dataset_report(digests["rows"])
        assert (report.rows.read, report.rows.train, report.spec.cutoff_len) == (24, 24, 512)
        assert sum(bucket.rows for bucket in report.encoded.lengths) == report.encoded.rows == 24
        assert "⟦llama 0 of the herd</s>⟧" in report.encoded.samples[0].text
        assert report.sources[0].rows == 24
        with pytest.raises(InvalidArgument, match="is a report of 'extend_tokenizer'; expected"):
            client.artifacts.dataset_report(digests["vocab"])
    assert asyncio.run(asked_with_asyncio(shared, digests["rows"])) == report
    model = next(s for s in run["stages"] if s["name"] == "base")["outputs"][0]["digest"]
    wrong = shared.cli("dataset", "report", model, check=False)
    assert wrong.returncode == 2
    assert "is a model; expected the report" in wrong.stderr
