"""A fake platform for clients: blocking tests get a thread, asyncio tests start their own."""

from collections.abc import Iterator

import pytest

from arriero.testing.servicers import FakePlatform, running_platform

PIPELINE = """\
name: faq
stages:
- {name: base, import: {source: ./model}}
- {name: rows, dataset: {sources: [./rows.jsonl], tokenizer: base}}
- name: sft
  train:
    model: base
    dataset: rows
    lora: {r: 8}
"""


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePlatform]:
    with running_platform() as running:
        monkeypatch.setenv("ARRIERO_ADDRESS", running.address)
        yield running


@pytest.fixture
def pipeline_text() -> str:
    return PIPELINE
