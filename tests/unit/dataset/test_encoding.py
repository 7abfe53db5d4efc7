from pathlib import Path

import pytest

from arriero import prompts
from arriero.dataset.encoding import EncodedRow, Encoder, template_of
from arriero.dataset.formats import Example, RowFormat
from arriero.dataset.vocabulary import Vocabulary, chat_template, special_tokens
from arriero.errors import FailedPrecondition, InvalidArgument
from arriero.prompts import Template


def alpaca(instruction: str, output: str, **more: str) -> Example:
    example = RowFormat("alpaca").parse({"instruction": instruction, "output": output, **more})
    assert isinstance(example, Example)
    return example


EXAMPLE = alpaca("Name a river.", "The Urubamba, in Peru.", input="In Peru")
BOS, EOS = 1, 2


def encoder(directory: Path, name: str | Template, **settings) -> Encoder:
    vocabulary = Vocabulary.load(directory)
    template = name if isinstance(name, Template) else template_of(name, directory)
    settings.setdefault("cutoff_len", 512)
    bound = template.bind(bos_token=vocabulary.bos, eos_token=vocabulary.eos)
    return Encoder(template=bound, vocabulary=vocabulary, **settings)


def trained_from(row: EncodedRow) -> int:
    """Index of the first trained token."""
    return int(row.trained.argmax()) if row.trained.any() else len(row.ids)


def encode(made: Encoder, example: Example = EXAMPLE) -> EncodedRow:
    return made.encode([made.render(example)])[0]


@pytest.fixture(params=["sentencepiece", "bytes"])
def any_dir(request: pytest.FixtureRequest, sentencepiece_dir: Path, bytes_dir: Path) -> Path:
    return sentencepiece_dir if request.param == "sentencepiece" else bytes_dir


@pytest.mark.parametrize("name", ["alpaca", "vicuna", "llama-2", "chinese-alpaca-2"])
def test_one_bos_by_tokenizer_or_template_and_a_trained_end(
    name: str, sentencepiece_dir: Path
) -> None:
    row = encode(encoder(sentencepiece_dir, name))
    assert row.ids[0] == BOS
    assert row.ids.tolist().count(BOS) == 1
    assert row.ids[-1] == EOS
    assert row.ends_turn
    assert 1 < trained_from(row) < len(row.ids) - 1
    assert not row.straddles
    assert not row.truncated


@pytest.mark.parametrize("name", ["alpaca", "vicuna", "llama-2", "chatml", "model"])
def test_exactly_the_answer_and_its_end_are_trained(name: str, bytes_dir: Path) -> None:
    made = encoder(bytes_dir, name)
    row = encode(made)
    trained = bytes_text(made, row.ids[trained_from(row) :])
    assert trained.strip() in (
        "The Urubamba, in Peru.<|im_end|>",
        "The Urubamba, in Peru. <|im_end|>",
    )
    assert (
        bytes_text(made, row.ids[: trained_from(row)])
        .rstrip()
        .endswith(("### Response:", "ASSISTANT:", "[/INST]", "<|im_start|>assistant"))
    )
    assert row.ends_turn


def bytes_text(made: Encoder, ids: list[int]) -> str:
    from tokenizers import Tokenizer

    backend = made.vocabulary._backend
    assert isinstance(backend, Tokenizer)
    return str(backend.decode(ids, skip_special_tokens=False))


def test_a_template_that_begins_with_the_tokenizers_bos_gets_no_second(bytes_dir: Path) -> None:
    row = encode(encoder(bytes_dir, "chatml"))
    assert row.ids[0] == BOS
    assert row.ids[1] != BOS


def test_a_tokenizer_that_adds_no_bos_gets_none(bytes_dir: Path) -> None:
    row = encode(encoder(bytes_dir, "alpaca"))
    assert BOS not in row.ids


def test_the_prompts_ids_are_those_that_serving_makes(any_dir: Path) -> None:
    for name in prompts.known():
        made = encoder(any_dir, name)
        rendered = made.render(EXAMPLE)
        row = made.encode([rendered])[0]
        cut = len(made.vocabulary.bos or "") if made.template.writes_bos else 0
        prompt = rendered.text[cut : rendered.spans[0][0]]
        ids, _ = made.vocabulary.encode([prompt])[0]
        begins = row.ids[0] == BOS and (made.template.writes_bos or made.vocabulary.adds_bos)
        assert row.ids[int(begins) : trained_from(row)].tolist() == ids, name


def test_the_whole_row_is_trained_when_asked(any_dir: Path) -> None:
    row = encode(encoder(any_dir, "alpaca", train_on_inputs=True))
    # Nothing predicts the first.
    assert row.trained.tolist() == [False, *[True] * (len(row.ids) - 1)]


def test_without_the_wish_rows_end_with_the_answer(bytes_dir: Path) -> None:
    for name in ("alpaca", "chatml", "model"):
        made = encoder(bytes_dir, name, add_eos_token=False)
        assert made.render(EXAMPLE).text.endswith("The Urubamba, in Peru.")
        assert not encode(made).ends_turn


def test_an_end_that_the_template_leaves_out_is_added(bytes_dir: Path) -> None:
    silent = Template(
        "silent", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    made = encoder(bytes_dir, silent)
    assert made.render(EXAMPLE).text.endswith("Peru.<|im_end|>")
    assert encode(made).ends_turn


def test_an_end_of_turn_that_is_no_token_is_not_trained(sentencepiece_dir: Path) -> None:
    made = encoder(sentencepiece_dir, "chatml")
    assert made.vocabulary.count("<|im_end|>") > 1
    assert not encode(made).ends_turn


def test_long_rows_are_cut_and_may_train_nothing(any_dir: Path) -> None:
    whole = encode(encoder(any_dir, "alpaca"))
    cut = encode(encoder(any_dir, "alpaca", cutoff_len=trained_from(whole) + 2))
    assert cut.truncated
    assert cut.ids.tolist() == whole.ids[: trained_from(whole) + 2].tolist()
    assert cut.trained.sum() == 2
    assert not cut.ends_turn
    nothing = encode(encoder(any_dir, "alpaca", cutoff_len=8))
    assert (len(nothing.ids), nothing.trained.sum()) == (8, 0)


def test_a_template_whose_prompt_is_not_kept_is_refused(bytes_dir: Path) -> None:
    moody = Template("moody", "{{ messages | length }}{{ messages[-1].content }}")
    with pytest.raises(InvalidArgument, match="'moody' cannot be trained with"):
        encoder(bytes_dir, moody).render(EXAMPLE)


def test_whitespace_that_a_template_trims_does_not_hide_the_answer(bytes_dir: Path) -> None:
    made = encoder(bytes_dir, "llama-2")
    text = made.render(alpaca("Name a river.", "\n Yes. \n")).text
    assert text.endswith("[/INST] Yes. <|im_end|>")


def test_a_token_across_the_end_of_the_prompt_is_seen(bytes_dir: Path) -> None:
    glued = Template(
        "glued",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    made = encoder(bytes_dir, glued)
    row = encode(made, alpaca("Each ll", "ama"))
    assert row.straddles


def test_ids_equal_those_of_transformers(any_dir: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(any_dir, local_files_only=True)
    vocabulary = Vocabulary.load(any_dir)
    for text in ("### Instruction:\nHello,  world\n", "你好 llama </s><|im_end|>", " x", ""):
        ids, _ = vocabulary.encode([text])[0]
        assert ids == theirs(text, add_special_tokens=False).input_ids
    begins = theirs("a").input_ids[0] == vocabulary.bos_id
    assert begins == vocabulary.adds_bos
    assert vocabulary.eos_id == theirs.eos_token_id


def test_the_configurations_word_on_bos_wins(sentencepiece_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((sentencepiece_dir / "tokenizer.json").read_bytes())
    for asked in (True, False):
        (tmp_path / "tokenizer_config.json").write_text(
            f'{{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": {str(asked).lower()}}}'
        )
        assert Vocabulary.load(tmp_path).adds_bos is asked


def test_what_a_tokenizer_says_is_read_without_loading_it(bytes_dir: Path, tmp_path: Path) -> None:
    tokens = special_tokens(bytes_dir)
    assert (tokens.bos, tokens.eos, tokens.add_bos) == ("<|im_start|>", "<|im_end|>", None)
    assert "im_start" in (chat_template(bytes_dir) or "")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "tools", "template": "t"}, '
        '{"name": "default", "template": "d"}]}'
    )
    assert chat_template(tmp_path) == "d"
    with pytest.raises(FailedPrecondition, match="cannot be loaded"):
        Vocabulary.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(FailedPrecondition, match="not JSON"):
        special_tokens(tmp_path)


def test_a_tuned_models_stored_template_is_its_own(bytes_dir: Path, tmp_path: Path) -> None:
    prompts.load("vicuna").write(tmp_path)
    assert template_of("model", tmp_path).name == "vicuna"
    assert template_of("model", bytes_dir).name == "model"


TEXTS = (
    "Plain words.",
    "  spaces\n\nand\tlines  ",
    "你好，世界。 Ünïcödé e\u0301",
    "emoji 🦙🏔️ and \u200b joiners",
    "special </s> and <|im_end|> and <unk> inside",
    "▁ already",
    "1234567890 + - * / = <html>&amp;</html>",
)


@pytest.mark.parametrize("name", ["alpaca", "llama-2", "chatml", "vicuna"])
def test_tokens_widths_mask_as_their_offsets_do(any_dir: Path, name: str) -> None:
    by_widths, by_offsets = encoder(any_dir, name), encoder(any_dir, name)
    # No text adds up to these, so every one is tokenized with offsets.
    by_offsets.vocabulary._widths = by_offsets.vocabulary._widths + (1 << 20)
    rows = [by_widths.render(alpaca(a, b)) for a in TEXTS for b in TEXTS]
    one, other = by_widths.encode_batch(rows), by_offsets.encode_batch(rows)
    assert (one.ids == other.ids).all()
    assert (one.trained == other.trained).all()
    assert (one.straddles == other.straddles).all()
    assert (one.ends_turn == other.ends_turn).all()


def test_a_tokenizer_that_normalizes_is_tokenized_with_offsets(
    bytes_dir: Path, tmp_path: Path
) -> None:
    import json
    import shutil

    shutil.copytree(bytes_dir, tmp_path / "nfc")
    data = json.loads((bytes_dir / "tokenizer.json").read_text())
    data["normalizer"] = {"type": "NFC"}
    (tmp_path / "nfc" / "tokenizer.json").write_text(json.dumps(data))
    made = encoder(tmp_path / "nfc", "chatml")
    tokens = made.vocabulary.encode_batch(["plain", "cafe\u0301"])
    assert list(tokens.offsets) == [1]
    row = encode(made, alpaca("cafe\u0301 cafe\u0301", "une re\u0301ponse"))
    assert bytes_text(made, row.ids[row.trained].tolist()) == "une r\u00e9ponse<|im_end|>"


@pytest.mark.parametrize("add_eos_token", [True, False])
def test_rows_rendered_by_shape_are_those_that_the_template_renders(
    any_dir: Path, add_eos_token: bool
) -> None:
    for name in prompts.known():
        made = encoder(any_dir, name, add_eos_token=add_eos_token)
        for text in TEXTS:
            for more in ({}, {"input": text[::-1]}, {"system": text}):
                example = alpaca(f"{text}?", f" {text} ", **more)
                assert made.renderer.render(example) == made.renderer.render_whole(
                    example.messages
                ), name


def test_a_template_that_looks_into_texts_is_rendered_row_by_row(bytes_dir: Path) -> None:
    curious = Template(
        "curious",
        "{% for m in messages %}{{ m.role }}: {{ m.content | replace('llama', 'alpaca') }}\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    )
    made = encoder(bytes_dir, curious)
    texts = [made.render(alpaca(f"A llama {i}?", "Yes.")).text for i in range(2)]
    assert [text.splitlines()[0] for text in texts] == ["user: A alpaca 0?", "user: A alpaca 1?"]
