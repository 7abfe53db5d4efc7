"""`gguf.template`: rows as the dataset room encodes them, against files that serve them."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arriero.gates import GateResult, Gates, Verdict
from arriero.gates.golden import Golden
from arriero.llama import Model, insert_metadata
from arriero.prompts import Template, load
from arriero.quantization.frames import frames_of
from arriero.quantization.template_proof import Trained, prove_template, trained_rows
from arriero.store import Artifact, Store

TURNS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Name three animals."}],
    [{"role": "user", "content": "Translate into French.", "input": "Good morning!"}],
    [{"role": "user", "content": "How many llamas are there in the train? Say so in words."}],
]
Made = Callable[[Template | None], Path]


@pytest.fixture
def served(tiny_gguf: Path, tmp_path: Path) -> Made:
    """The tiny model's file with a template in its metadata."""

    def make(template: Template | None) -> Path:
        path = tmp_path / f"{template.name if template else 'none'}.gguf"
        shutil.copy(tiny_gguf, path)
        if template is not None:
            insert_metadata(
                path,
                {
                    "arriero.template": template.to_json(),
                    "tokenizer.chat_template": template.chat_template,
                },
            )
        return path

    return make


def bound(name: str) -> Template:
    return load(name).bind(bos_token="<s>", eos_token="</s>")


def rows(
    gguf: Path, template: Template, turns: Sequence[list[dict[str, Any]]], longest: int = 400
) -> Trained:
    """Rows of a template, tokenized whole with one BOS, as training sees them."""
    sequences = []
    with Model(gguf, vocab_only=True) as model:
        for turn in turns:
            messages = [*turn, {"role": "assistant", "content": "llama, alpaca, vicuna."}]
            text = template.render(messages, bos_token="<s>", eos_token="</s>")
            ids = model.tokenize(text, add_special=not template.writes_bos)
            sequences.append(ids[:longest])
    count = sum(len(ids) for ids in sequences)
    golden = Golden(
        np.concatenate([np.array(ids, dtype=np.int32) for ids in sequences]),
        np.array([len(ids) for ids in sequences], dtype=np.int32),
        np.zeros((count, 4), dtype=np.float16),
    )
    return Trained(golden, template.name)


def judged(gguf: Path, recorded: Template | None, trained: Trained | None) -> GateResult:
    gates = Gates()
    prove_template(gates, gguf=gguf, recorded=recorded, rows=trained, log=logging.getLogger("test"))
    (result,) = gates.results
    return result


@pytest.mark.parametrize("name", ["alpaca", "chatml", "llama-2", "vicuna", "chinese-alpaca-2"])
def test_rows_of_the_files_own_template_pass(served: Made, name: str) -> None:
    template = bound(name)
    gguf = served(template)
    result = judged(gguf, template, rows(gguf, template, TURNS))
    assert result.verdict is Verdict.PASSED, result.detail
    assert result.figure == 0.0


@pytest.mark.parametrize(
    ("trained", "name"),
    [("alpaca", "chatml"), ("vicuna", "alpaca"), ("chatml", "llama-2"), ("llama-2", "vicuna")],
)
def test_another_template_in_serving_fails(served: Made, trained: str, name: str) -> None:
    gguf = served(bound(name))
    result = judged(gguf, None, rows(gguf, bound(trained), TURNS))
    assert result.verdict is Verdict.FAILED
    assert repr(trained) in result.detail
    assert repr(name) in result.detail
    assert "quantize the model with the template" in result.detail


def test_a_template_with_one_word_changed_fails(served: Made) -> None:
    template = bound("alpaca")
    changed = Template(
        "mine", template.chat_template.replace("### Response:", "### Answer:"), template.stop
    )
    gguf = served(changed)
    assert judged(gguf, None, rows(gguf, template, TURNS)).verdict is Verdict.FAILED
    result = judged(gguf, template, None)
    assert result.verdict is Verdict.FAILED
    assert "renders" in result.detail


def test_a_bos_too_many_in_serving_fails(served: Made) -> None:
    template = bound("llama-2")
    # Says that it writes no BOS, so that tokenizing adds a second one.
    doubled = Template("llama-2", template.chat_template, writes_bos=False)
    gguf = served(doubled)
    result = judged(gguf, None, rows(gguf, template, TURNS))
    assert result.verdict is Verdict.FAILED
    assert "from token 1 on [1" in result.detail


def test_system_messages_and_rows_that_were_cut_pass(served: Made) -> None:
    template = bound("chatml")
    gguf = served(template)
    system = {"role": "system", "content": "Answer in one word."}
    own = [[system, *turn] for turn in TURNS]
    assert judged(gguf, template, rows(gguf, template, own)).verdict is Verdict.PASSED
    cut = judged(gguf, template, rows(gguf, template, TURNS, longest=12))
    assert cut.verdict is Verdict.SKIPPED
    assert judged(gguf, template, rows(gguf, bound("alpaca"), TURNS, longest=12)).verdict is (
        Verdict.FAILED
    )


def test_one_odd_row_among_many_is_only_told(
    served: Made, caplog: pytest.LogCaptureFixture
) -> None:
    template = bound("alpaca")
    gguf = served(template)
    good = rows(gguf, template, TURNS).golden
    odd = rows(gguf, bound("vicuna"), TURNS[:1]).golden
    both = Golden(
        np.concatenate([good.tokens, odd.tokens]),
        np.concatenate([good.lengths, odd.lengths]),
        np.concatenate([good.logprobs, odd.logprobs]),
    )
    result = judged(gguf, template, Trained(both, "alpaca"))
    assert result.verdict is Verdict.PASSED
    assert result.figure == 0.25
    assert "no prompt of it" in caplog.text


def test_a_file_without_a_template_cannot_serve_what_was_trained(served: Made) -> None:
    gguf = served(None)
    assert judged(gguf, None, None).verdict is Verdict.SKIPPED
    result = judged(gguf, bound("alpaca"), None)
    assert result.verdict is Verdict.FAILED
    assert "no prompt template; it was trained with 'alpaca'" in result.detail


def test_only_rows_that_a_template_rendered_are_compared_with(
    store: Store, publish: Callable[..., Artifact], golden_dir: Path, tmp_path: Path
) -> None:
    source = tmp_path / "rows"
    source.mkdir()
    (source / "dataset.json").write_text(json.dumps({}))
    found = {}
    for form in ("alpaca", "alpaca,text", "text", ""):
        labels = {"template": "chatml", "formats": form}
        dataset = publish(source, "dataset", labels=labels)
        golden = publish(golden_dir, "report", parents=[dataset.digest], labels=labels)
        found[form] = trained_rows(store, golden)
    alpaca = found.pop("alpaca")
    assert alpaca is not None
    assert alpaca.template == "chatml"
    assert set(found.values()) == {None}
    assert trained_rows(store, publish(golden_dir, "report", name="of-nothing")) is None
    assert trained_rows(store, None) is None


def test_frames_are_what_a_template_writes_around_what_is_said() -> None:
    plain, with_input, *_ = frames_of(bound("alpaca"), bos_token="<s>", eos_token="</s>")
    assert plain.names == ("user",)
    assert plain.literals[0].endswith("### Instruction:\n")
    text = with_input.literals[0] + "Add." + with_input.literals[1] + "1 2" + "\n\n### Response:\n3"
    assert with_input.messages(text) == [{"role": "user", "content": "Add.", "input": "1 2"}]
    assert plain.messages("USER: hello ASSISTANT: hi") is None
