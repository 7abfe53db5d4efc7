"""The examples in the client's docstrings run."""

import doctest

import pytest

import arriero.client
from arriero.client import load_pipeline, sync, sync_endpoint
from arriero.v1.orchestrator_pb2 import RunState

_EXAMPLES = [
    test
    for module in (sync, sync_endpoint)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module)
    if test.examples
]


def test_there_are_examples():
    assert len(_EXAMPLES) >= 6


@pytest.mark.parametrize("example", _EXAMPLES, ids=lambda example: example.name)
def test_an_example_does_what_it_says(example, platform, pipeline_text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faq.yaml").write_text(pipeline_text)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    example.globs = {
        "Client": arriero.client.Client,
        "load_pipeline": load_pipeline,
        "RunState": RunState,
    }
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(example, out=output.append)
    assert runner.failures == 0, "".join(output)
